"""Make SE blocks cheap: fuse their operations."""
