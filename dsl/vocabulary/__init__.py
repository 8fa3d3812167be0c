"""The vocabulary of specs: nouns, kinds, attributes, functions, and the words of other tools.

- `base`: how a kind or function is written as a class, and how tools read it.
- `types`: the types of attributes.
- `tables`: every noun, kind and function by its word.
- `models`: tokenizers, models and hardware.
- `data`: sources, methods, conditions and templates.
- `rewards`: rewards, judges and evals.
- `stages`: the run block, and the bases of all stages.
- `supervised_stages`: `pretrain`, `sft` and `distill`.
- `preference_stages`: `dpo` and its presets, `kto` and `reward_model`.
- `policy_stages`: `grpo` and its presets, and `ppo`.
- `utility_stages`: `sample`, `merge`, `evaluate` and `export`.
- `optimizer_kinds`: optimizers and their schedules.
- `training`: adapters, sampling, clipping, KL terms, merge methods, divergences, meshes, trackers.
- `custom`: a user's Python functions.
- `foreign`: words of other tools, and what is written here in their place.
- `raw_values`: values that only exist before they are fitted to an attribute.
"""
