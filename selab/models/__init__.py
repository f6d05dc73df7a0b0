"""The catalog of networks, and building them."""
