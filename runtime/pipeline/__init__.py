"""Runs a plan, stage by stage, with what the stages share.

- `execute_plan`: runs the stages of a plan in order, under their locks.
- `training_stage`: runs a training stage: weights, data, programs, the loop.
- `fused_sweep`: branches of a sweep trained by one program.
- `run_context`: what the stages of a run share, and who is told of its progress.
- `weight_sources`: references to models and stages, resolved to weights in the store.
"""
