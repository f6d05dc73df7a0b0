"""Training recipes as facts with their sources."""
