"""A syntax tree to values: names, imports, overrides, expressions, types."""
