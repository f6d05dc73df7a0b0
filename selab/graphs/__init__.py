"""ONNX networks as they are: read safely, their SE blocks found by structure, and the same network without them."""
