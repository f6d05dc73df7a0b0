"""Networks in plain PyTorch: one file per family, and a TOML with its variants and their published numbers."""
