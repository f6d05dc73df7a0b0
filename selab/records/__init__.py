"""Records of measurements and their statistics; no torch."""
