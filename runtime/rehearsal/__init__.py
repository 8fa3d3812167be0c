"""Compiles a stage's programs for hardware that need not be here."""
