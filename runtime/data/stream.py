"""Opens a data expression as a stream of examples with random access by position.

An expression is brought into one form first: a mixture of parts, each of them chosen rows of one
source under one set of roles (8 bytes a row). `take`, `where`, `split` and the other methods of a
mixture apply to its parts, so that the shares hold in what they leave. What order the parts are
read in is `order.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import DataExpression
from tunelang.runtime.data.examples import Example, Roles, example_of, roles_of
from tunelang.runtime.data.feistel import derive, permute
from tunelang.runtime.data.filters import condition_holds
from tunelang.runtime.data.mixture import assign
from tunelang.runtime.data.row_errors import (
    BadRows,
    NoRowsError,
    RowError,
    TooLongError,
)
from tunelang.runtime.data.row_sources import Rows, content_hash, open_lines, open_rows
from tunelang.runtime.data.sample_order import Order

Indices = NDArray[np.int64]
_READ = 256
Measurer = Callable[[Example], int]
"""Counts the tokens of an example."""


@dataclass(frozen=True)
class Source:
    """Opened rows of declared data."""

    name: str
    kind: data.DataKind
    rows: Rows


@dataclass(frozen=True)
class Part:
    """Chosen rows of one source, in order, with their share of the stream."""

    source: Source
    roles: Roles
    rows: Indices
    weight: float = 1.0
    splits: int = 0
    """Number of splits applied so far; each of them hashes with another salt."""

    def example(self, index: int) -> Example:
        """Return the example at an index of `rows`; raises what `example_of` raises."""
        return self.of_row(int(self.rows[index]))

    def of_row(self, row: int) -> Example:
        """Return the example of a row of the source, with the roles of this part."""
        return example_of(self.source.name, row, self.source.rows[row], self.roles)


@dataclass(frozen=True)
class Stream:
    """An endless stream of examples."""

    parts: tuple[Part, ...]
    order: Order
    bad: BadRows = field(compare=False)
    """Rows that were dropped when the stream was opened."""

    def __len__(self) -> int:
        """Return the number of examples of an epoch."""
        return self.order.epoch

    def examples_at(self, positions: Indices) -> list[Example]:
        """Return the examples at positions `[n]` of the stream."""
        sources, indices = self.order.locate(positions)
        pairs = zip(sources, indices, strict=True)
        return [self.parts[source].example(index) for source, index in pairs]

    def once(self) -> Iterator[Example]:
        """Yield every example of an epoch in order, for evaluations."""
        for start in range(0, len(self), _READ):
            stop = min(start + _READ, len(self))
            yield from self.examples_at(np.arange(start, stop, dtype=np.int64))


@dataclass
class Library:
    """Declared data of a program; each source is opened, and its rows are checked, once."""

    program: Program
    cache: Path
    """Folder for files derived from the sources."""
    bad: BadRows = field(default_factory=BadRows)
    sampled: Callable[[data.Sampled], Path] | None = None
    """Returns the file that a `sample` stage wrote."""
    _sources: dict[str, Part] = field(default_factory=dict)

    def stream(
        self,
        expression: DataExpression,
        *,
        seed: int,
        measure: Measurer | None = None,
        shuffled: bool = True,
    ) -> Stream:
        """Return the stream of an expression.

        `measure` is needed where a condition reads `length`. Raises `NoRowsError`, `BadRowError`
        under the policy `stop`, and what `open_rows` raises.
        """
        parts = tuple(_Builder(self, measure).parts(expression))
        sizes = tuple(len(part.rows) for part in parts)
        weights = tuple(part.weight for part in parts)
        return Stream(parts, Order(sizes, weights, seed, shuffled), self.bad)

    def source(self, name: str, kind: data.DataKind) -> Part:
        """Return all usable rows of a source."""
        if name not in self._sources:
            if isinstance(kind, data.Sampled):
                assert self.sampled is not None
                rows = open_lines(self.sampled(kind))
            else:
                rows = open_rows(kind, self.program.folder, cache=self.cache)
            indices = np.arange(len(rows), dtype=np.int64)
            part = Part(Source(name, kind, rows), roles_of(kind), indices)
            self._sources[name] = self.filter_rows(part, lambda _: True)
        return self._sources[name]

    def filter_rows(self, part: Part, keep: Callable[[Example], bool]) -> Part:
        """Return the rows of a part for which `keep` is true; rows that cannot be read are
        handled by their policy.

        Raises `NoRowsError` where none is left.
        """
        verdicts: dict[int, bool] = {}
        for row in map(int, part.rows):
            if row in verdicts:
                continue
            try:
                verdicts[row] = keep(part.of_row(row))
            except RowError as error:
                policy = part.source.kind.on_bad_row if error.droppable else "stop"
                self.drop(part, row, error, policy)
                verdicts[row] = False
        chosen = np.fromiter((verdicts[int(row)] for row in part.rows), bool, len(part.rows))
        return self.require_rows(replace(part, rows=part.rows[chosen]))

    def drop_long(self, stream: Stream, measure: Measurer, limit: int) -> Stream:
        """Return the stream without examples of more than `limit` tokens: the prompts of a rollout.

        A prompt is never cut, since its end holds the question: `cut` drops it like `drop`. Raises
        `BadRowError` under `on_long_row = stop`, and `NoRowsError`.
        """

        def fits(part: Part, row: int) -> bool:
            length = measure(part.of_row(row))
            if length > limit:
                self.drop(part, row, TooLongError(length, limit), part.source.kind.on_long_row)
            return length <= limit

        parts: list[Part] = []
        for part in stream.parts:
            rows, inverse = np.unique(part.rows, return_inverse=True)
            keep = np.fromiter((fits(part, int(row)) for row in rows), bool, len(rows))
            parts.append(self.require_rows(replace(part, rows=part.rows[keep[inverse]])))
        sizes = tuple(len(part.rows) for part in parts)
        return replace(stream, parts=tuple(parts), order=replace(stream.order, sizes=sizes))

    def drop(self, part: Part, row: int, error: RowError, policy: str) -> None:
        """Handle a row by a policy; raises `BadRowError` under `stop`."""
        self.bad.handle(part.source.name, lambda: part.source.rows.place(row), error, policy)

    def require_rows(self, part: Part) -> Part:
        """Return the part; raises `NoRowsError` where it has no rows."""
        if not len(part.rows):
            raise NoRowsError(part.source.name, self.bad)
        return part


@dataclass(frozen=True)
class _Builder:
    """Builds the parts of a data expression."""

    library: Library
    measure: Measurer | None

    def parts(self, expression: DataExpression) -> list[Part]:
        """Return the parts of an expression; their weights add to 1."""
        match expression:
            case data.DataRef():
                value = self.library.program.declarations[expression.name].value
                if isinstance(value, data.DataKind):
                    return [self.library.source(expression.name, value)]
                return self.parts(value)
            case data.Mixture():
                weighted = [(member.weight, self.parts(member.of)) for member in expression.parts]
                return [
                    replace(part, weight=weight * part.weight)
                    for weight, inner in weighted
                    for part in inner
                ]
            case data.DataMethod():
                return self._method(expression, self.parts(expression.of))
        raise TypeError(f"not a data expression: {type(expression).__name__}")

    def _method(self, method: data.DataMethod, parts: list[Part]) -> list[Part]:
        match method:
            case data.Take():
                return self._cut(parts, 0, method.count)
            case data.Skip():
                return self._cut(parts, method.count, None)
            case data.Repeat():
                return [replace(p, rows=np.tile(p.rows, method.times)) for p in parts]
            case data.Shuffle():
                return [
                    replace(p, rows=p.rows[_permutation(len(p.rows), method.seed, index)])
                    for index, p in enumerate(parts)
                ]
            case data.Map():
                mapped = [replace(part, roles=part.roles.with_templates(method)) for part in parts]
                return [self.library.filter_rows(part, lambda _: True) for part in mapped]
            case data.Where():
                condition, measure = method.condition, self.measure
                return [
                    self.library.filter_rows(part, lambda e: condition_holds(condition, e, measure))
                    for part in parts
                ]
            case data.Split():
                return [self._split(method, part) for part in parts]
        raise TypeError(f"not a data method: {type(method).__name__}")

    def _cut(self, parts: list[Part], start: int, stop: int | None) -> list[Part]:
        """Return the examples from `start` to `stop`, in the unshuffled order of the mixture."""
        total = sum(len(part.rows) for part in parts)
        stop = total if stop is None else min(stop, total)
        if start >= stop:
            raise NoRowsError(parts[0].source.name, self.library.bad)
        assignment = assign(tuple(part.weight for part in parts))
        spans = zip(assignment.before(start), assignment.before(stop), strict=True)
        cut: list[Part] = []
        for part, (first, last) in zip(parts, spans, strict=True):
            # A source with more than its natural share of the mixture comes round again.
            rounds = ceil(last / len(part.rows))
            rows = np.tile(part.rows, rounds)[first:last] if rounds > 1 else part.rows[first:last]
            cut.append(self.library.require_rows(replace(part, rows=rows)))
        return cut

    def _split(self, split: data.Split, part: Part) -> Part:
        """Return the rows of a part whose content hash lies in `split.part`."""
        names = [name for name in split.parts if name != "train"]
        edges = np.cumsum([0.0, *(split.parts[name] for name in names)])
        spans = dict(zip(names, pairwise(map(float, edges)), strict=True))
        low, high = spans.get(split.part or "", (float(edges[-1]), 1.0))
        rows, salt = part.source.rows, part.splits

        def falls(example: Example) -> bool:
            return low <= content_hash(rows.content(dict(example.fields)), salt) < high

        return replace(self.library.filter_rows(part, falls), splits=salt + 1)


def _permutation(size: int, seed: int, part: int) -> Indices:
    return permute(np.arange(size, dtype=np.int64), size, derive(seed, "shuffle", part))
