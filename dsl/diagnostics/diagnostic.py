"""Errors and warnings as data. `render` turns them into text; `messages` has their sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from tunelang.dsl.syntax.source import Span

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Label:
    """A place with a few words on what it has to do with the matter."""

    span: Span
    text: str = ""


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the characters of `span` by `text`."""

    span: Span
    text: str


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One cause, reported once."""

    code: str
    """A key of `codes.CODES`."""
    title: str
    where: Label
    seconds: tuple[Label, ...] = ()
    """Other places that take part: where a name was first declared, what the value disagrees
    with.
    """
    notes: tuple[str, ...] = ()
    help: str | None = None
    fix: tuple[Edit, ...] = ()
    severity: Severity = "error"


MAX_DIAGNOSTICS = 60


class Diagnostics:
    """Collects diagnostics, each cause at each place once, in the order of the text.

    Beyond `MAX_DIAGNOSTICS` they are only counted.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, Span, str], Diagnostic] = {}
        self.dropped = 0

    def add(self, diagnostic: Diagnostic) -> None:
        """Record a diagnostic, unless the same code already stands at the same place."""
        place = diagnostic.where.span
        key = (diagnostic.code, place, diagnostic.title if place.start == place.end else "")
        if key not in self._seen and len(self._seen) >= MAX_DIAGNOSTICS:
            self.dropped += 1
        else:
            self._seen.setdefault(key, diagnostic)

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Record several."""
        for diagnostic in diagnostics:
            self.add(diagnostic)

    def __iter__(self) -> Iterator[Diagnostic]:
        files: dict[str, int] = {}
        for diagnostic in self._seen.values():
            files.setdefault(diagnostic.where.span.source.name, len(files))
        return iter(
            sorted(
                self._seen.values(),
                key=lambda d: (files[d.where.span.source.name], d.where.span.start),
            )
        )

    def __len__(self) -> int:
        return len(self._seen)

    @property
    def errors(self) -> int:
        """Return the number of errors, including those beyond `MAX_DIAGNOSTICS`."""
        return self.dropped + sum(d.severity == "error" for d in self._seen.values())
