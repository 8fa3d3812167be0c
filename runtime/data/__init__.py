"""Turns rows of files into examples, and these into streams with random access; knows no tokens.

- `row_sources`: the rows of files and generators, each with its place.
- `procedural`: problems from the generators of reasoning-gym.
- `examples`: turns a row into an example: prompt, response, messages and other roles.
- `text_templates`: renders templates and text functions for a row.
- `filters`: conditions of `where`.
- `row_errors`: errors of rows, and the rows that were dropped.
- `stream`: opens a data expression as a stream of examples.
- `mixture`: assigns the examples of a mixture to its sources.
- `sample_order`: the order of examples as a function of seed and position.
- `feistel`: pseudo-random permutations and derived seeds.
"""
