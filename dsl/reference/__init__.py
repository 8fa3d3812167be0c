"""Texts generated from the vocabulary: `tune explain`, the JSON Schema, resolved specs.

- `explain`: the pages of `tune explain`.
- `schema`: the JSON Schema of a resolved spec.
- `resolved_text`: a resolved spec as text, with the origin of each value.
"""
