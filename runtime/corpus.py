"""A stream's examples as tokens: rendered once, kept in flat files, fitted to the context.

Planning needs every length, and training needs every example several times, so tokens are written
down (5 bytes each) and mapped into memory. A second start with the same data, tokenizer and
template finds them there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunelang.runtime.bad_rows import BadRowError, BadRows, NoRowsError, TooLongError
from tunelang.runtime.chat import EmptyMaskError, Renderer
from tunelang.runtime.chat_templates import ChatError
from tunelang.runtime.durable import written_whole
from tunelang.runtime.order import Order
from tunelang.runtime.stream import Part, Stream

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Items:
    """The tokens of a part: flat `ids` and `mask` `[tokens]`, and the stretch of each item `[items,
    2]`.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    spans: Indices

    @property
    def lengths(self) -> Indices:
        """The tokens of each item `[items]`."""
        return np.asarray(self.spans[:, 1] - self.spans[:, 0])


@dataclass(frozen=True)
class Corpus:
    """A stream of token sequences, none longer than `context`, with random access."""

    parts: tuple[Items, ...]
    order: Order
    context: int
    pad: int
    bad: BadRows

    def lengths(self, positions: Indices) -> Indices:
        """Return the tokens of the examples at positions `[n]`."""
        sources, items = self.order.at(positions)
        found = np.empty(len(sources), np.int64)
        for source, part in enumerate(self.parts):
            own = sources == source
            spans = part.spans[items[own]]
            found[own] = spans[:, 1] - spans[:, 0]
        return found

    def tokens(self, positions: Indices) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Return the ids and mask, each `[length]`, of the examples at positions `[n]`."""
        sources, items = self.order.at(positions)
        for source, item in zip(sources, items, strict=True):
            part = self.parts[source]
            start, end = part.spans[item]
            mask = part.mask[start:end].copy()
            # Nothing precedes the first token of a piece of a long text, so it is no target there.
            mask[:1] = False
            yield part.ids[start:end], mask

    @property
    def mean_length(self) -> float:
        """The mean number of tokens of an example of an epoch."""
        pairs = zip(self.order.weights, self.parts, strict=True)
        return float(sum(weight * part.lengths.mean() for weight, part in pairs))


def tokenise(stream: Stream, renderer: Renderer, *, context: int, cache: Path) -> Corpus:
    """Return the corpus of a stream.

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
        ids, mask, offsets = _tokenised(replace(part, rows=rows), renderer, cache)
        fit = _Fit(part, rows, ids, mask, offsets, context, stream.bad)
        parts.append(Items(ids, mask, fit.spans(renderer, inverse)))
    sizes = tuple(len(part.spans) for part in parts)
    order = replace(stream.order, sizes=sizes)
    return Corpus(tuple(parts), order, context, renderer.tokenizer.pad, stream.bad)


@dataclass(frozen=True)
class _Fit:
    """Fits the rows of a part to the context."""

    part: Part
    rows: Indices
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    offsets: Indices
    context: int
    bad: BadRows

    def spans(self, renderer: Renderer, inverse: Indices) -> Indices:
        """Return the stretches of tokens `[items, 2]` in the order of the part's rows."""
        found = [self._spans(at, renderer) for at in range(len(self.rows))]
        ordered = [span for at in inverse for span in found[at]]
        if not ordered:
            raise NoRowsError(self.part.source.name, self.bad)
        return np.array(ordered, np.int64)

    def _spans(self, at: int, renderer: Renderer) -> list[tuple[int, int]]:
        start, end = int(self.offsets[at]), int(self.offsets[at + 1])
        kind = self.part.source.kind
        if start == end:
            try:
                renderer.tokens(self.part.of_row(int(self.rows[at])))
            except EmptyMaskError as error:
                self._drop(at, error, kind.on_bad_row)
            return []
        if end - start <= self.context:
            return [(start, end)]
        if kind.on_long_row == "divide" and _is_plain(self.part):
            step = self.context - 1
            return [(a, min(a + self.context, end)) for a in range(start, end - 1, step)]
        if kind.on_long_row == "cut":
            cut = start + self.context
            if self.mask[start:cut].any():
                return [(start, cut)]
        self._drop(at, TooLongError(end - start, self.context), kind.on_long_row)
        return []

    def _drop(self, at: int, error: Exception, policy: str) -> None:
        source, row = self.part.source, int(self.rows[at])
        self.bad.handle(source.name, lambda: source.rows.place(row), error, policy)


def _is_plain(part: Part) -> bool:
    return (
        "text" in part.roles.templates and not {"prompt", "messages"} & part.roles.templates.keys()
    )


def _tokenised(
    part: Part, renderer: Renderer, cache: Path
) -> tuple[NDArray[np.int32], NDArray[np.bool_], Indices]:
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
                # A template that fails on a row fails on many: not a matter of dropping rows.
                row = int(part.rows[at])
                place = part.source.rows.place(row)
                raise BadRowError(part.source.name, place, error) from error
            ids.write(np.array(found.ids, np.int32).tobytes())
            mask.write(np.array(found.mask, np.bool_).tobytes())
            offsets[at + 1] += len(found)
    with written_whole(path) as table:
        np.save(table, offsets)
