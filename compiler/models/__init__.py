"""Decoders as data: sizes, adapters, families of checkpoints, presets."""
