"""What channel attention costs and what it buys: insert SE blocks, count them, measure them, make them cheap."""

__version__ = "0.1.0"
