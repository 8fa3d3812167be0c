"""Estimates of the memory, the FLOPs and the seconds of a step in a layout.

- `step_costs`: the estimate itself, put together from the others.
- `stage_costs`: what a step of each kind of stage consists of; the registry of kinds.
- `model_sizes`: counts of a model, and the part of its weights in one device.
- `step_memory`: bytes of activations, of the loss and of the backward pass.
- `exchanges`: seconds of what devices send to each other.
- `rollout_costs`: the decode mesh and the slots of a rollout, and its seconds.
- `judge_costs`: memory and seconds of the local models that score completions.
- `factors`: fitted numbers of the memory estimate.
"""
