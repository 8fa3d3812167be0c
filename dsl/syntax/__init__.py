"""Text to a syntax tree, and back to canonical text."""
