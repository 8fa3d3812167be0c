"""Sampling from a model: tokens, the KV-cache engine, rollouts, beams."""
