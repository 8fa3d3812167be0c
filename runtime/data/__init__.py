"""Rows to examples to streams with random access. Knows no tokens."""
