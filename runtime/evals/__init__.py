"""Evaluations of a model and their statistics."""
