"""Plans checked specs: the part of planning that reads files and looks up devices.

- `prepare`: plans a spec, with layouts.
- `declared_models`: architectures of the models that stages work with.
- `local_devices`: the devices of this machine, and those of each stage.
- `estimate_steps`: estimates the steps of a stage whose length depends on its data.
"""
