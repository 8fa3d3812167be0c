"""The language: `.tune` text to a checked `Program`, or diagnostics. Never imports JAX."""
