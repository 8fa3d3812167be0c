"""Fixtures of the compiler's tests."""

from .workspace import folder

__all__ = ["folder"]
