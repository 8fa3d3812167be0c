"""Models as data: nothing here reads weights or touches a device.

- `architecture`: a decoder-only transformer by its sizes and choices.
- `adapters`: which matrices a declared adapter is on.
- `parameter_counts`: parameters, FLOPs and cache bytes of an architecture.
- `families`: architectures from configurations of `transformers`, and back.
- `presets`: architectures of well-known models by name.
"""
