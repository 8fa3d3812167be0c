"""Source text to a syntax tree, and a syntax tree to canonical text.

- `lexer`: text to tokens and comments.
- `item_parser`: the tokens of one declaration, import or run block to a node (`grammar.lark`).
- `file_parser`: a file to its nodes; an error in one item leaves the others intact.
- `formatter`: the tree in canonical layout, for `tune fmt`.
- `one_line`: expressions on one line.
"""
