"""A stream's examples as tokens: rendered once, kept in flat files, fitted to the context.

An item is one piece of tokens, or several that belong together: an example with its chosen answer,
and the same with the rejected one.

Planning needs every length, and training needs every example several times, so tokens are written
down (5 bytes each) and mapped into memory. A second start with the same data, tokenizer and
template finds them there.
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
from tunelang.runtime.store.atomic_files import written_whole
from tunelang.runtime.tokenize.chat_renderer import EmptyMaskError, Renderer
from tunelang.runtime.tokenize.chat_templates import ChatError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """One of the pieces of each item: flat `ids` and `mask` `[tokens]`, and the stretch of each
    item `[items, 2]`.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    spans: Indices

    @property
    def lengths(self) -> Indices:
        """The tokens of each item `[items]`."""
        return np.asarray(self.spans[:, 1] - self.spans[:, 0])


@dataclass(frozen=True)
class Items:
    """The items of a part, by their pieces, with a value for each piece where they have one."""

    pieces: tuple[Piece, ...]
    values: NDArray[np.float32] | None = None
    """`[items, pieces]`."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.pieces[0].spans)

    @cached_property
    def lengths(self) -> Indices:
        """The tokens of each item, over its pieces `[items]`."""
        return np.asarray(np.sum([piece.lengths for piece in self.pieces], axis=0))


@dataclass(frozen=True)
class Corpus:
    """A stream of token sequences, no piece of them longer than `context`, with random access."""

    parts: tuple[Items, ...]
    order: Order
    context: int
    pad: int
    bad: BadRows

    @property
    def pieces(self) -> int:
        """How many pieces an item has."""
        return len(self.parts[0].pieces)

    @property
    def longest(self) -> int:
        """The tokens of the longest item that there may be."""
        return self.context * self.pieces

    def numbers(self, positions: Indices) -> Indices:
        """Return which item of all parts, one behind the other, stands at positions `[n]`."""
        sources, items = self.order.at(positions)
        first = np.cumsum([0, *(len(part) for part in self.parts)])
        return first[sources] + items

    def lengths(self, positions: Indices) -> Indices:
        """Return the tokens of the items at positions `[n]`."""
        sources, items = self.order.at(positions)
        found = np.empty(len(sources), np.int64)
        for source, part in enumerate(self.parts):
            own = sources == source
            found[own] = part.lengths[items[own]]
        return found

    def tokens(
        self, positions: Indices
    ) -> Iterator[list[tuple[NDArray[np.int32], NDArray[np.bool_]]]]:
        """Return the ids and mask `[length]` of each piece of the items at positions `[n]`."""
        sources, items = self.order.at(positions)
        for source, item in zip(sources, items, strict=True):
            yield [_cut_out(piece, item) for piece in self.parts[source].pieces]

    @property
    def values(self) -> NDArray[np.float32] | None:
        """The values of all parts, one behind the other `[items, pieces]`."""
        found = [part.values for part in self.parts if part.values is not None]
        return np.concatenate(found) if found else None

    @property
    def mean_length(self) -> float:
        """The mean number of tokens of an item of an epoch."""
        pairs = zip(self.order.weights, self.parts, strict=True)
        return float(sum(weight * part.lengths.mean() for weight, part in pairs))


def _cut_out(piece: Piece, item: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    start, end = piece.spans[item]
    mask = piece.mask[start:end].copy()
    # Nothing precedes the first token of a piece of a long text, so it is no target there.
    mask[:1] = False
    return piece.ids[start:end], mask


Valued = Callable[[Example], Sequence[float] | None]
"""The values of an item's pieces; raises `WrongTypeError`."""


def unvalued(_: Example) -> None:
    """Items that have no values."""


def tokenise(
    stream: Stream,
    renderer: Renderer,
    *,
    context: int,
    cache: Path,
    answers: Sequence[str] = ("response",),
    valued: Valued = unvalued,
) -> Corpus:
    """Return the corpus of a stream, with a piece for each role in `answers`.

    Rows longer than the context are handled by their source's policy. `divide` makes pieces of the
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
            _tokenised(replace(part, rows=rows, roles=part.roles.answered(role)), renderer, cache)
            for role in answers
        ]
        fit = _Fit(part, rows, tables, answers, context, valued, stream.bad)
        parts.append(fit.items(renderer, inverse))
    sizes = tuple(len(part) for part in parts)
    order = replace(stream.order, sizes=sizes)
    return Corpus(tuple(parts), order, context, renderer.tokenizer.pad, stream.bad)


_Table = tuple[NDArray[np.int32], NDArray[np.bool_], Indices]
"""Ids and mask of all rows, and where each row begins."""
_Spans = list[tuple[int, int]]
"""A stretch for each piece of an item."""


@dataclass(frozen=True)
class _Fit:
    """Fits the rows of a part to the context."""

    part: Part
    rows: Indices
    tables: Sequence[_Table]
    answers: Sequence[str]
    context: int
    valued: Valued
    bad: BadRows

    def items(self, renderer: Renderer, inverse: Indices) -> Items:
        """Return the items in the order of the part's rows."""
        found = [self._spans(at, renderer) for at in range(len(self.rows))]
        values = [self._values(at) if spans else None for at, spans in enumerate(found)]
        chosen = [at for at in inverse if values[at] is not None]
        spans = np.array([item for at in chosen for item in found[at]], np.int64)
        if not len(spans):
            raise NoRowsError(self.part.source.name, self.bad)
        pieces = tuple(
            Piece(ids, mask, spans[:, at]) for at, (ids, mask, _) in enumerate(self.tables)
        )
        if self.valued is unvalued:
            return Items(pieces)
        held = [values[at] for at in chosen for _ in found[at]]
        return Items(pieces, np.array(held, np.float32))

    def _values(self, at: int) -> Sequence[float] | None:
        """Return the values of a row's pieces; None where they cannot be had."""
        if self.valued is unvalued:
            return ()
        try:
            return self.valued(self.part.of_row(int(self.rows[at])))
        except WrongTypeError as error:
            self._drop(at, error, self.part.source.kind.on_bad_row)
            return None

    def _spans(self, at: int, renderer: Renderer) -> list[_Spans]:
        """Return the items that a row makes."""
        kind = self.part.source.kind
        spans = [(int(offsets[at]), int(offsets[at + 1])) for _, _, offsets in self.tables]
        for role, (start, end) in zip(self.answers, spans, strict=True):
            if start == end:
                part = replace(self.part, roles=self.part.roles.answered(role))
                try:
                    renderer.tokens(part.of_row(int(self.rows[at])))
                except EmptyMaskError as error:
                    self._drop(at, error, kind.on_bad_row)
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
        self._drop(at, TooLongError(longest, self.context), kind.on_long_row)
        return []

    def _drop(self, at: int, error: RowError, policy: str) -> None:
        source, row = self.part.source, int(self.rows[at])
        self.bad.handle(source.name, lambda: source.rows.place(row), error, policy)


def _is_plain(part: Part) -> bool:
    return (
        "text" in part.roles.templates and not {"prompt", "messages"} & part.roles.templates.keys()
    )


def _tokenised(part: Part, renderer: Renderer, cache: Path) -> _Table:
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
    """Write the tokens of all rows; the offsets, which make the others count, come last."""
    offsets = np.zeros(len(part.rows) + 1, np.int64)
    with (
        written_whole(path.with_suffix(".ids")) as ids_path,
        written_whole(path.with_suffix(".mask")) as mask_path,
        ids_path.open("wb") as ids,
        mask_path.open("wb") as mask,
    ):
        for at in range(len(part.rows)):
            offsets[at + 1] = offsets[at]
            try:
                found = renderer.tokens(part.example(at))
            except EmptyMaskError:
                continue
            except ChatError as error:
                row = int(part.rows[at])
                place = part.source.rows.place(row)
                raise BadRowError(part.source.name, place, error) from error
            ids.write(np.array(found.ids, np.int32).tobytes())
            mask.write(np.array(found.mask, np.bool_).tobytes())
            offsets[at + 1] += len(found)
    with written_whole(path) as table:
        np.save(table, offsets)
