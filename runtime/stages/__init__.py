"""Kinds of stages: one object for each, found by its class of the vocabulary.

- `stage_kinds`: the base classes of kinds, and their registry.
- `abstract_programs`: what kinds share to describe their programs by shapes, for the rehearsal.
- `supervised`: training on given sequences; the likelihood of text and answers.
- `preference`: pairs of answers, one better than the other (DPO and its relatives).
- `kto`: answers that are each good or bad.
- `reward_model`: a model that scores answers.
- `distill`: a student that imitates a teacher.
- `teacher_cache`: a teacher's likeliest tokens, computed ahead and kept in files.
- `policy`: policy optimisation (GRPO and its relatives).
- `policy_trainer`: sampling, scoring and updating, step by step.
- `policy_step`: the jitted update of a policy, and its batch.
- `ppo`: a policy with a critic.
- `sample`: completions written down as data.
- `merge`: several models made one.
- `evaluate`: several models measured.
- `export`: a model written to a folder.
"""
