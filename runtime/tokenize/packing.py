"""Plans which examples share a sequence as a table, and makes the arrays of batches.

Examples are taken in windows of the stream and packed by first-fit decreasing (Johnson 1973: at
most 11/9 of the best number of bins). The bins of a window are then put in a pseudo-random order,
since first-fit decreasing leaves the long examples in front. The table is a pure function of the
lengths and the seed, so any step's batch is found without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from tunelang.dsl.vocabulary.base import Measure
from tunelang.runtime.data.feistel import derive, permute
from tunelang.runtime.data.sample_order import batch_positions, steps_of
from tunelang.runtime.tokenize.token_cache import Corpus

Indices = NDArray[np.int64]

# A window has at least this many examples, and fills at least this many sequences: what its last,
# half-empty sequence wastes is then below half a percent.
_WINDOW_EXAMPLES = 4096
_WINDOW_SEQUENCES = 128


@dataclass(frozen=True)
class Table:
    """Planned sequences of a stage: sequence `b` holds `items[starts[b]:starts[b + 1]]`."""

    items: Indices
    """Positions in the stream, `[examples]`."""
    starts: Indices
    """Index in `items` of the first item of each sequence, `[sequences + 1]`."""
    tokens: Indices
    """Number of tokens of each sequence that are not padding, `[sequences]`."""
    length: int
    """Tokens of a sequence, padding included."""
    batch: int
    """Sequences of a step."""

    @property
    def steps(self) -> int:
        """Number of steps that the sequences make."""
        return len(self.tokens) // self.batch

    @property
    def most(self) -> int:
        """Largest number of items in a sequence."""
        return int(np.diff(self.starts).max())

    @property
    def useful(self) -> float:
        """Share of tokens that are not padding."""
        return float(self.tokens.sum() / (len(self.tokens) * self.length))


@dataclass(frozen=True)
class Batch:
    """Sequences of packed examples; every array is `[sequences, length]`."""

    tokens: NDArray[np.int32]
    """Token ids; the pad id behind the last example."""
    mask: NDArray[np.bool_]
    """True where predicting the token counts in the loss."""
    segments: NDArray[np.int32]
    """Segment of each token: 1, 2, ...; 0 for padding. Tokens attend to their own segment only."""
    positions: NDArray[np.int32]
    """Position of each token in its example, from 0."""


def plan(
    corpus: Corpus,
    length: Measure,
    *,
    batch: int,
    packed: bool,
    longest: int | None = None,
    window: int | None = None,
) -> Table:
    """Return the table for a stage of a given length, with `batch` sequences a step.

    `longest` is the size of a sequence, without it that of the longest item; `window` how many
    examples are packed together. A length in tokens counts what is not padding. The last step is
    filled up with the examples that follow.
    """
    size = corpus.longest if longest is None else longest
    if window is None:
        filling = ceil(_WINDOW_SEQUENCES * size / corpus.mean_length)
        window = max(_WINDOW_EXAMPLES, filling, batch)
    maker = _Maker(corpus, size, window, packed)
    match length.unit:
        case "epochs":
            maker.take(max(1, ceil(length.value * corpus.order.epoch - 1e-9)))
            steps = ceil(maker.sequences / batch)
        case "tokens":
            while maker.tokens < length.value:
                maker.take(window)
            used = np.cumsum(np.concatenate(maker.sizes))
            steps = ceil((int(np.searchsorted(used, length.value)) + 1) / batch)
        case _:
            steps = steps_of(length, epoch=corpus.order.epoch, batch=batch)
    while maker.sequences < steps * batch:
        maker.take(window)
    return maker.table(steps * batch, batch)


class _Maker:
    """Packs one window after another."""

    def __init__(self, corpus: Corpus, size: int, window: int, packed: bool) -> None:
        self._corpus = corpus
        self._size = size
        self._window = window
        self._packed = packed
        self._next = 0
        self._items: list[Indices] = []
        self._counts: list[Indices] = []
        self.sizes: list[Indices] = []
        self.sequences = 0
        self.tokens = 0

    def take(self, examples: int) -> None:
        """Pack the next examples of the stream."""
        stop = self._next + examples
        while self._next < stop:
            end = min(self._next + self._window, stop)
            self._pack(np.arange(self._next, end, dtype=np.int64))
            self._next = end

    def _pack(self, positions: Indices) -> None:
        lengths = self._corpus.lengths(positions)
        count = len(positions)
        bins = np.arange(count)
        if self._packed:
            bins, count = first_fit_decreasing(lengths, self._size)
            seed = derive(self._corpus.order.seed, "bins", int(positions[0]))
            bins = permute(bins, count, seed)
        self._items.append(positions[np.argsort(bins, kind="stable")])
        self._counts.append(np.bincount(bins, minlength=count).astype(np.int64))
        self.sizes.append(np.bincount(bins, lengths, count).astype(np.int64))
        self.sequences += count
        self.tokens += int(lengths.sum())

    def table(self, sequences: int, batch: int) -> Table:
        """Return the first sequences as a table."""
        counts = np.concatenate(self._counts)[:sequences]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        items = np.concatenate(self._items)[: starts[-1]]
        tokens = np.concatenate(self.sizes)[:sequences]
        return Table(items, starts, tokens, self._size, batch)


def sequences_of(batch: Measure, length: int) -> int:
    """Return the sequences of a batch stated in sequences or tokens, for sequences of `length`
    tokens.

    Tokens are rounded down to whole sequences. Raises `ValueError` where not one fits.
    """
    count = int(batch.value) // length if batch.unit == "tokens" else int(batch.value)
    if count < 1:
        raise ValueError(f"a batch of {batch.value} {batch.unit} for sequences of {length} tokens")
    return count


def first_fit_decreasing(lengths: Sequence[int] | Indices, capacity: int) -> tuple[Indices, int]:
    """Return the bin of each item `[n]`, and the number of bins; the longest items are placed
    first.

    Raises `ValueError` for an item longer than the capacity.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and sizes.max() > capacity:
        raise ValueError(f"an item of {sizes.max()} for bins of {capacity}")
    order = np.argsort(-sizes, kind="stable").tolist()
    leaves = 1 << max(1, len(order) - 1).bit_length()
    # A tree of the largest room below each node: the first bin with room is found from the root.
    room = [capacity] * (2 * leaves)
    bins = np.zeros(len(order), np.int64)
    listed = sizes.tolist()
    for item in order:
        need = listed[item]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < need:
                node += 1
        bins[item] = node - leaves
        room[node] -= need
        node //= 2
        while node:
            left, right = room[2 * node], room[2 * node + 1]
            best = left if left > right else right
            if room[node] == best:
                break
            room[node] = best
            node //= 2
    return bins, int(bins.max()) + 1 if bins.size else 0


def items_of(table: Table, corpus: Corpus, step: int) -> NDArray[np.int64]:
    """Return the numbers of the items in each sequence of a batch, `[sequences, table.most]`; -1
    where there is none. The segments of these items are those of the sequence, in this order.
    """
    sequences = batch_positions(step, table.batch)
    numbers = np.full((len(sequences), table.most), -1, np.int64)
    for row, sequence in enumerate(sequences):
        items = table.items[table.starts[sequence] : table.starts[sequence + 1]]
        numbers[row, : len(items)] = corpus.numbers(items)
    return numbers


def batch_of(table: Table, corpus: Corpus, step: int) -> Batch:
    """Return the batch of a step (from 0); raises `IndexError` behind the last step."""
    if not 0 <= step < table.steps:
        raise IndexError(f"step {step} of {table.steps}")
    sequences = batch_positions(step, table.batch)
    shape = (len(sequences), table.length)
    tokens = np.full(shape, corpus.pad, np.int32)
    mask = np.zeros(shape, np.bool_)
    segments = np.zeros(shape, np.int32)
    places = np.zeros(shape, np.int32)
    for row, sequence in enumerate(sequences):
        items = table.items[table.starts[sequence] : table.starts[sequence + 1]]
        start = 0
        segment_tokens = (segment for item in corpus.tokens(items) for segment in item)
        for number, (ids, counted) in enumerate(segment_tokens, 1):
            end = start + len(ids)
            tokens[row, start:end] = ids
            mask[row, start:end] = counted
            segments[row, start:end] = number
            places[row, start:end] = np.arange(len(ids))
            start = end
    return Batch(tokens, mask, segments, places)
