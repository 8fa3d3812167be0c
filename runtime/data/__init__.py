"""Turns rows of files into examples, and these into streams with random access; knows no tokens.

- `row_sources`: the rows of files and generators, each with its place.
- `procedural`: problems from the generators of reasoning-gym.
- `examples`: from a row to an example: prompt, response, messages and other roles.
- `text_templates`: the text of a template or a text function for a row.
- `filters`: conditions of `where`.
- `row_errors`: errors of rows, and the rows that were dropped.
- `stream`: from a data expression to a stream of examples.
- `mixture`: which source each example of a mixture comes from.
- `sample_order`: the order of examples as a function of seed and position.
- `feistel`: pseudo-random permutations and derived seeds.
"""
