"""The jitted training step, and the loop around it.

- `objective`: batches, the protocol of objectives, and the likelihood.
- `step_config`: the static settings of a training step.
- `train_state`: what a step changes, and what it only reads.
- `train_step`: the jitted call that makes one or more supervised steps.
- `accumulate`: gradient accumulation over micro-batches.
- `cross_entropy`: cross entropy and log-probabilities, in chunks over the sequence.
- `optimizers`: schedules, clipping, weight decay and update rules, by optax.
- `offload`: optimizer moments in host memory.
- `training_loop`: steps, metrics, evals, checkpoints and interruption.
- `checkpoints`: parameters and optimizer states, written by Orbax.
- `metrics`: lines of metrics, completions to read, trackers.
"""
