"""Syntax trees to values: imports, names, overrides, expressions, types.

- `load`: a file and its imports.
- `scope`: declared names, and the order in which to evaluate them.
- `overrides`: `--set`.
- `expressions`: the evaluator of expressions.
- `each_calls`: the calls of `each` that fan a stage out into branches.
- `operators`: operators on numbers, text, rewards and data.
- `binding`: arguments and attributes matched with those that a function or kind takes.
- `fit`: a value checked against the type of an attribute.
"""
