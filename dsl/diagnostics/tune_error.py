"""The base of every error that a command reports instead of a traceback."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

WRONG_SPEC = 1
WRONG_COMMAND = 2
FAILED = 3
DOES_NOT_FIT = 4


@dataclass(frozen=True, slots=True)
class FailureText:
    """The text of a diagnostic without its place."""

    title: str
    help: str | None = None
    notes: Sequence[str] = ()
    label: str = ""


@dataclass(frozen=True, slots=True)
class SpecPlace:
    """A place in a spec, by name. What is not found there is reported at the stage that failed."""

    declaration: str = ""
    """The name of a declaration."""
    attribute: str = ""
    """An attribute of the stage that failed, or of the `run` block."""
    file: Path | None = None
    """A file or folder: the place is the `path` that names it."""
    quoted: str = ""
    """A part of a value, such as the name of a Python function."""


class TuneError(Exception):
    """An error that a command reports at a place in the spec, with a code of `codes.md`.

    A subclass is a dataclass whose fields are the facts, and says which function of
    `messages/run_failures.py` puts them into words.
    """

    code: ClassVar[str]
    exit_code: ClassVar[int] = FAILED

    @abstractmethod
    def text(self, stage: str) -> FailureText:
        """Put the error into words; `stage` is the stage that failed, or empty."""
        raise NotImplementedError

    def place(self) -> SpecPlace:
        """Return the place in the spec; by default the stage that failed."""
        return SpecPlace()

    def __str__(self) -> str:
        return self.text("").title


class CommandError(Exception):
    """The command line names something that does not exist; the message is one sentence."""
