"""The jitted training step, and the loop around it."""
