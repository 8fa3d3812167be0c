"""Errors of rows, and the count of the rows that were dropped for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures

SHOWN = 5


class RowError(TuneError):
    """A row cannot be used; the message says why."""

    code = "unusable-row"
    droppable: ClassVar[bool] = True
    """True if `on_bad_row` may drop the row; False where most other rows would fail too."""


@dataclass(eq=False)
class NotARowError(RowError):
    """A file has something else in place of a row: `reason` in words, and an `excerpt`."""

    reason: str
    excerpt: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_row(self.reason, self.excerpt)


@dataclass(eq=False)
class MissingFieldError(RowError):
    """A row lacks the field `name`; `known` are the names that it has."""

    name: str
    known: tuple[str, ...]

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.missing_field(self.name, self.known)


@dataclass(eq=False)
class WrongTypeError(RowError):
    """The `value` of the field `name` has the wrong type: `expected`, in words, was needed."""

    name: str
    expected: str
    value: object

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.wrong_type(self.name, self.expected, self.value)


@dataclass(eq=False)
class TooLongError(RowError):
    """A row is longer than the context: `length` and `limit`, in tokens."""

    length: int
    limit: int

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.too_long(self.length, self.limit)


@dataclass(eq=False)
class BadRowError(TuneError):
    """A row cannot be used, and the policy is `stop`.

    `source` is the declared data, `row` the file and line (or row), `cause` says why.
    """

    code = "unusable-row"
    source: str
    row: str
    cause: RowError

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.bad_row(self.row, str(self.cause))

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(declaration=self.source)


@dataclass(eq=False)
class NoRowsError(TuneError):
    """Data has no usable row: the name of its `source`, and the rows that were `dropped`."""

    code = "no-rows"
    source: str
    dropped: BadRows

    @override
    def text(self, stage: str) -> FailureText:
        rows = [(shown.row, str(shown.cause)) for shown in self.dropped.shown]
        return run_failures.no_rows(self.source, rows)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(declaration=self.source)


@dataclass
class BadRows:
    """The dropped rows of a data expression, counted by cause; the first few are kept."""

    counts: Counter[str] = field(default_factory=Counter)
    """Name of the exception -> rows."""
    shown: list[BadRowError] = field(default_factory=list)

    def handle(self, source: str, place: Callable[[], str], cause: RowError, policy: str) -> None:
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
        """Number of rows that were dropped."""
        return sum(self.counts.values())
