"""Fixtures of the compiler's tests."""

from tests.compiler.workspace import folder

__all__ = ["folder"]
