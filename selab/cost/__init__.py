"""Count parameters, MACs, FLOPs and bytes."""
