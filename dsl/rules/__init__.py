"""Rules for a resolved Program: values against each other, and against files outside the spec.

- `apply_rules`: the entry; calls all others.
- `rule_context`: the state that the rules share.
- `model_rules`: models and hardware.
- `file_rules`: files and folders of models and tokenizers.
- `data_rules`: data files, fields and templates.
- `data_fields`: the sources of a data expression with their fields and roles.
- `function_rules`: a user's Python functions.
- `reward_rules`: rewards, groups and the length of completions.
- `reward_inputs`: the fields that a reward reads.
- `stage_rules`: starts, batches, meshes, evals and outputs of stages.
- `sweep_rules`: winners of sweeps.
- `contradictions`: attributes of one declaration that exclude each other.
- `named_files`: reading the files that a spec names.
"""
