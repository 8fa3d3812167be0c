"""Rows that break: what went wrong, how often, and the first few to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5


class NotARowError(Exception):
    """What stands in a file is no row: `reason` in words, and the `excerpt`."""

    def __init__(self, reason: str, excerpt: str) -> None:
        super().__init__(reason, excerpt)
        self.reason = reason
        self.excerpt = excerpt


class TooLongError(Exception):
    """A row has more tokens than its context: `length` and `limit`, in tokens."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(length, limit)
        self.length = length
        self.limit = limit


class BadRowError(Exception):
    """A row that cannot be used, under the policy `stop`.

    `source` is the declared data, `place` the file and line (or row), `cause` the exception that
    says why: `NotARowError`, `TooLongError`, `MissingFieldError`, `WrongTypeError`, or one of the
    chat renderer's.
    """

    def __init__(self, source: str, place: str, cause: Exception) -> None:
        super().__init__(source, place, cause)
        self.source = source
        self.place = place
        self.cause = cause


class NoRowsError(Exception):
    """Data without a usable row: the name of its `source`, and the rows that were `dropped`."""

    def __init__(self, source: str, dropped: BadRows) -> None:
        super().__init__(source, dropped)
        self.source = source
        self.dropped = dropped


@dataclass
class BadRows:
    """The dropped rows of a data expression, counted by cause; the first few are kept."""

    counts: Counter[str] = field(default_factory=Counter)
    """Name of the exception -> rows."""
    shown: list[BadRowError] = field(default_factory=list)

    def handle(self, source: str, place: Callable[[], str], cause: Exception, policy: str) -> None:
        """Count a row, or raise `BadRowError` where the `policy` is `stop`.

        `place` may take a while (it counts lines): it is asked only where the row will be shown.
        """
        if policy == "stop":
            raise BadRowError(source, place(), cause) from cause
        self.counts[type(cause).__name__] += 1
        if len(self.shown) < SHOWN:
            self.shown.append(BadRowError(source, place(), cause))

    @property
    def total(self) -> int:
        """How many rows were dropped."""
        return sum(self.counts.values())


def excerpt(value: Any, length: int = 80) -> str:
    """Return the beginning of a value as a report shows it."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
