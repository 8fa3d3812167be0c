"""The language: text of a spec to a checked `Program`, or to diagnostics. Never imports JAX.

Sub-packages, each of which imports only those above it:

- `syntax`: source text, tokens and the syntax tree.
- `diagnostics`: errors and warnings as data.
- `vocabulary`: nouns, kinds, attributes and functions.
- `messages`: the sentences of diagnostics.
- `parsing`: text to a syntax tree, and back.
- `resolve`: a syntax tree to values.
- `rules`: values checked against each other and against files.
- `reference`: documentation generated from the vocabulary.

Modules:

- `check`: the entry, from the text of a spec to a `Program`.
- `program`: the `Program` that the compiler takes.
- `references`: which declarations refer to which.
"""
