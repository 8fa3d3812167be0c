"""Every sentence that a diagnostic says: a function for each cause, which takes the facts.

- `malformed`: characters, quotes, brackets and units that cannot be read.
- `unexpected_tokens`: a token that does not fit where it stands.
- `naming`: names that are unknown, taken, unused or of the wrong noun.
- `imports_and_overrides`: imports of other specs, and overrides by `--set`.
- `attribute_use`: attributes and arguments that are unknown, missing, repeated or unnamed.
- `wrong_values`: values of the wrong type, unit, range or form; sweeps.
- `declaration_conflicts`: stages, models, data and rewards that do not go together.
- `attribute_conflicts`: attributes of one declaration that exclude each other.
- `outside`: files, fields, functions and generators that a spec names and that do not fit.
- `run_failures`: errors that arise while a spec is planned or run.
- `human_units`: sizes and durations for people.
- `wording`: suggestions, lists and the names of values, for all of these.
"""
