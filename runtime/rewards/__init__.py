"""Reward expressions and the functions they are made of."""
