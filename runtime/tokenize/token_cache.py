"""A stream's examples as tokens: rendered once, kept in flat files, fitted to the context.

An item is one segment of tokens, or several that belong together: an example with its chosen
answer, and the same example with the rejected one.

Planning needs every length, and training needs every example several times, so tokens are written
to files (5 bytes each) and mapped into memory. A second start with the same data, tokenizer and
template reads these files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunelang.runtime.data.examples import Example
from tunelang.runtime.data.row_errors import (
    BadRowError,
    BadRows,
    NoRowsError,
    RowError,
    TooLongError,
    WrongTypeError,
)
from tunelang.runtime.data.sample_order import Order
from tunelang.runtime.data.stream import Part, Stream
from tunelang.runtime.store.atomic_files import replacing
from tunelang.runtime.tokenize.chat_renderer import EmptyMaskError, Renderer
from tunelang.runtime.tokenize.chat_templates import ChatError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class SegmentTokens:
    """One segment of every item: flat `ids` and `mask` `[tokens]`, and the span of each item in
    them, `[items, 2]`.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    spans: Indices

    @property
    def lengths(self) -> Indices:
        """Number of tokens of each item, `[items]`."""
        return np.asarray(self.spans[:, 1] - self.spans[:, 0])


@dataclass(frozen=True)
class Items:
    """Items of one part of a stream, by segment; `values` has one value a segment, or is None."""

    segments: tuple[SegmentTokens, ...]
    values: NDArray[np.float32] | None = None
    """`[items, segments]`."""

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.segments[0].spans)

    @cached_property
    def lengths(self) -> Indices:
        """Number of tokens of each item, all segments together, `[items]`."""
        return np.asarray(np.sum([segment.lengths for segment in self.segments], axis=0))


@dataclass(frozen=True)
class Corpus:
    """Tokenised stream with random access; no segment is longer than `context` tokens."""

    parts: tuple[Items, ...]
    order: Order
    context: int
    pad: int
    bad: BadRows

    @property
    def segments_per_item(self) -> int:
        """Number of segments of an item: 1, or 2 for pairs."""
        return len(self.parts[0].segments)

    @property
    def longest(self) -> int:
        """Upper bound of an item's length, in tokens."""
        return self.context * self.segments_per_item

    def numbers(self, positions: Indices) -> Indices:
        """Return the items at positions `[n]`, numbered through all parts in order."""
        sources, items = self.order.locate(positions)
        first = np.cumsum([0, *(len(part) for part in self.parts)])
        return first[sources] + items

    def lengths(self, positions: Indices) -> Indices:
        """Return the numbers of tokens of the items at positions `[n]`."""
        sources, items = self.order.locate(positions)
        lengths = np.empty(len(sources), np.int64)
        for source, part in enumerate(self.parts):
            of_source = sources == source
            lengths[of_source] = part.lengths[items[of_source]]
        return lengths

    def tokens(
        self, positions: Indices
    ) -> Iterator[list[tuple[NDArray[np.int32], NDArray[np.bool_]]]]:
        """Yield the ids and mask `[length]` of each segment of the items at positions `[n]`."""
        sources, items = self.order.locate(positions)
        for source, item in zip(sources, items, strict=True):
            yield [_cut_out(segment, item) for segment in self.parts[source].segments]

    @property
    def values(self) -> NDArray[np.float32] | None:
        """Values of the items of all parts, `[items, segments]`; None if they have none."""
        values = [part.values for part in self.parts if part.values is not None]
        return np.concatenate(values) if values else None

    @property
    def mean_length(self) -> float:
        """Mean number of tokens of an item of an epoch."""
        pairs = zip(self.order.weights, self.parts, strict=True)
        return float(sum(weight * part.lengths.mean() for weight, part in pairs))


def _cut_out(segment: SegmentTokens, item: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    start, end = segment.spans[item]
    mask = segment.mask[start:end].copy()
    # Nothing precedes the first token of a chunk of a long text, so it is no target there.
    mask[:1] = False
    return segment.ids[start:end], mask


ItemValues = Callable[[Example], Sequence[float] | None]
"""Returns the values of an item's segments; raises `WrongTypeError`."""


def no_values(_: Example) -> None:
    """Return None: the items have no values."""


def tokenise(
    stream: Stream,
    renderer: Renderer,
    *,
    context: int,
    cache: Path,
    answers: Sequence[str] = ("response",),
    values_of: ItemValues = no_values,
) -> Corpus:
    """Return the corpus of a stream, with a segment for each role in `answers`.

    Rows longer than the context are handled by their source's policy. `divide` makes chunks of the
    context's length, which overlap by one token, so that every token is predicted once. Raises
    `BadRowError` for a row that breaks the chat template, or under the policy `stop`;
    `NoRowsError`.
    """
    if context < 2:
        raise ValueError("a context of less than two tokens has nothing to predict")
    parts = []
    for part in stream.parts:
        rows, inverse = np.unique(part.rows, return_inverse=True)
        tables = [
            _load_tokens(
                replace(part, rows=rows, roles=part.roles.with_response(role)), renderer, cache
            )
            for role in answers
        ]
        fit = _Fit(part, rows, tables, answers, context, values_of, stream.bad)
        parts.append(fit.items(renderer, inverse))
    sizes = tuple(len(part) for part in parts)
    order = replace(stream.order, sizes=sizes)
    return Corpus(tuple(parts), order, context, renderer.tokenizer.pad, stream.bad)


_Table = tuple[NDArray[np.int32], NDArray[np.bool_], Indices]
"""Ids and mask of all rows, and where each row begins."""
_Spans = list[tuple[int, int]]
"""Span of each segment of an item in the table's arrays."""


@dataclass(frozen=True)
class _Fit:
    """Fits the rows of a part to the context."""

    part: Part
    rows: Indices
    tables: Sequence[_Table]
    answers: Sequence[str]
    context: int
    values_of: ItemValues
    bad: BadRows

    def items(self, renderer: Renderer, inverse: Indices) -> Items:
        """Return the items in the order of the part's rows."""
        items = [self._spans(row, renderer) for row in range(len(self.rows))]
        values = [self._values(row) if spans else None for row, spans in enumerate(items)]
        usable = [row for row in inverse if values[row] is not None]
        spans = np.array([item for row in usable for item in items[row]], np.int64)
        if not len(spans):
            raise NoRowsError(self.part.source.name, self.bad)
        segments = tuple(
            SegmentTokens(ids, mask, spans[:, index])
            for index, (ids, mask, _) in enumerate(self.tables)
        )
        if self.values_of is no_values:
            return Items(segments)
        item_values = [values[row] for row in usable for _ in items[row]]
        return Items(segments, np.array(item_values, np.float32))

    def _values(self, index: int) -> Sequence[float] | None:
        """Return the values of a row's segments; None if the row cannot be read."""
        if self.values_of is no_values:
            return ()
        try:
            return self.values_of(self.part.of_row(int(self.rows[index])))
        except WrongTypeError as error:
            self._drop(index, error, self.part.source.kind.on_bad_row)
            return None

    def _spans(self, index: int, renderer: Renderer) -> list[_Spans]:
        """Return the items that a row makes."""
        kind = self.part.source.kind
        spans = [(int(offsets[index]), int(offsets[index + 1])) for _, _, offsets in self.tables]
        for role, (start, end) in zip(self.answers, spans, strict=True):
            if start == end:
                part = replace(self.part, roles=self.part.roles.with_response(role))
                try:
                    renderer.tokens(part.of_row(int(self.rows[index])))
                except EmptyMaskError as error:
                    self._drop(index, error, kind.on_bad_row)
                return []
        if all(end - start <= self.context for start, end in spans):
            return [spans]
        if kind.on_long_row == "divide" and _is_plain(self.part):
            step = self.context - 1
            ((start, end),) = spans
            return [[(a, min(a + self.context, end))] for a in range(start, end - 1, step)]
        if kind.on_long_row == "cut":
            cut = [(start, min(end, start + self.context)) for start, end in spans]
            masks = [mask for _, mask, _ in self.tables]
            if all(mask[a:b].any() for mask, (a, b) in zip(masks, cut, strict=True)):
                return [cut]
        longest = max(end - start for start, end in spans)
        self._drop(index, TooLongError(longest, self.context), kind.on_long_row)
        return []

    def _drop(self, index: int, error: RowError, policy: str) -> None:
        source, row = self.part.source, int(self.rows[index])
        self.bad.handle(source.name, lambda: source.rows.place(row), error, policy)


def _is_plain(part: Part) -> bool:
    return (
        "text" in part.roles.templates and not {"prompt", "messages"} & part.roles.templates.keys()
    )


def _load_tokens(part: Part, renderer: Renderer, cache: Path) -> _Table:
    """Return the tokens of the rows of a part, from the cache or new; a row with an empty mask has
    none.
    """
    path = cache / f"tokens-{_key(part, renderer)}.npy"
    if not path.exists():
        _write(part, renderer, path)
    offsets = np.load(path)
    if not offsets[-1]:
        return np.zeros(0, np.int32), np.zeros(0, np.bool_), offsets
    ids = np.memmap(path.with_suffix(".ids"), np.int32, "r")
    mask = np.memmap(path.with_suffix(".mask"), np.bool_, "r")
    return ids, mask, offsets


def _key(part: Part, renderer: Renderer) -> str:
    roles = sorted((role, repr(template)) for role, template in part.roles.templates.items())
    digest = hashlib.blake2b(digest_size=16)
    for item in (part.source.rows.digest, repr(part.source.kind), repr(roles), renderer.digest):
        digest.update(item.encode() + b"\0")
    digest.update(part.rows.tobytes())
    return digest.hexdigest()


def _write(part: Part, renderer: Renderer, path: Path) -> None:
    """Write the tokens of all rows; the offsets come last, so that their file marks the rest as
    complete.
    """
    offsets = np.zeros(len(part.rows) + 1, np.int64)
    with (
        replacing(path.with_suffix(".ids")) as ids_path,
        replacing(path.with_suffix(".mask")) as mask_path,
        ids_path.open("wb") as ids,
        mask_path.open("wb") as mask,
    ):
        for index in range(len(part.rows)):
            offsets[index + 1] = offsets[index]
            try:
                tokens = renderer.tokens(part.example(index))
            except EmptyMaskError:
                continue
            except ChatError as error:
                row = int(part.rows[index])
                place = part.source.rows.place(row)
                raise BadRowError(part.source.name, place, error) from error
            ids.write(np.array(tokens.ids, np.int32).tobytes())
            mask.write(np.array(tokens.mask, np.bool_).tobytes())
            offsets[index + 1] += len(tokens)
    with replacing(path) as table:
        np.save(table, offsets)
