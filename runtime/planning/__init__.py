"""Plans checked specs: the part of planning that reads files and looks up devices.

- `prepare`: from a spec to a plan with layouts.
- `declared_models`: architectures of the models that stages work with.
- `local_devices`: the devices of this machine, and those of each stage.
- `estimate_steps`: how many steps a stage has whose length its data decides.
"""
