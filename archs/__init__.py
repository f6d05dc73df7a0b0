"""Networks in plain PyTorch, each family beside a TOML of its variants and what others published about them."""
