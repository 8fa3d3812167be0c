"""The commands of `tune`, and the texts that they print.

- `check_specs`: `tune check`.
- `format_specs`: `tune fmt`.
- `explain_word`: `tune explain`.
- `draw_graph`: `tune graph`.
- `make_plan`: `tune plan`.
- `plan_text`: a plan as text.
- `run`: `tune run`.
- `progress`: the live display of a run.
- `show`: `tune show`.
- `completions`: `tune generate`.
- `generate`: opens the model of a stage for `tune generate`, `tune chat` and `tune export`.
- `preview`: `tune check --render`.
- `diagnose`: turns an error into a diagnostic.
- `terminal`: input, output and exit codes that the commands share.
- `options`: options that the commands share.
"""
