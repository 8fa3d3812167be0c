"""The representation of source text: places, tokens, units and the syntax tree.

- `source`: a source text, and spans of its characters.
- `units`: numbers with units, such as `4Ki`, `16 GiB` and `2 epochs`.
- `tokens`: tokens and comments.
- `nodes`: the syntax tree.
"""
