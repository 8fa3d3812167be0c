"""What a layout of a stage takes: bytes, FLOPs, seconds."""
