"""Source text and places in it: what every token, tree node and diagnostic points at."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, eq=False)
class Source:
    """One piece of text that a spec is read from: a file, standard input, or a `--set`."""

    name: str
    """The name shown to the user: the path as they wrote it, or `--set a=b`."""
    text: str
    folder: Path = Path()
    """The folder that relative paths in the text start from."""
    kind: Literal["file", "override"] = "file"

    @cached_property
    def line_starts(self) -> list[int]:
        """Return the offset of the first character of each line."""
        starts = [0]
        find = self.text.find
        offset = find("\n")
        while offset >= 0:
            starts.append(offset + 1)
            offset = find("\n", offset + 1)
        return starts

    def position(self, offset: int) -> tuple[int, int]:
        """Return line and column of an offset, both from 0, in characters."""
        line = bisect_right(self.line_starts, offset) - 1
        return line, offset - self.line_starts[line]

    def line(self, number: int) -> str:
        """Return the text of line `number` (from 0), without its line end."""
        starts = self.line_starts
        end = starts[number + 1] if number + 1 < len(starts) else len(self.text)
        return self.text[starts[number] : end].rstrip("\r\n")


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open range `[start, end)` of characters of one source."""

    source: Source
    start: int
    end: int

    @property
    def text(self) -> str:
        """Return the characters that the span covers."""
        return self.source.text[self.start : self.end]

    @property
    def place(self) -> str:
        """Return `file:line`, from 1 as in an editor."""
        if self.source.kind == "override":
            return self.source.name
        return f"{self.source.name}:{self.source.position(self.start)[0] + 1}"

    def to(self, other: Span) -> Span:
        """Return the span from the start of this one to the end of `other`."""
        return Span(self.source, self.start, max(self.end, other.end))
