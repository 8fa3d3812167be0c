"""The order of examples as a pure function of (seed, position): nothing is drawn, so nothing is
replayed.

Position `p` of the endless stream of a run falls to a source by the mixture's assignment. That
source's examples are gone through in rounds, each in a pseudo-random order of its own, so that no
example comes a second time before all of its source have come once. A resumed run asks for the next
position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from numpy.typing import NDArray

from tunelang.dsl.vocabulary.base import Measure
from tunelang.runtime.data.feistel import derive, permute
from tunelang.runtime.data.mixture import Assignment, assign

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order over sources of given sizes; `weights` are their shares and add to 1."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffled: bool = True
    """Without it, every round has the order of the file: for evaluation."""

    @cached_property
    def _assignment(self) -> Assignment:
        return assign(self.weights)

    @property
    def epoch(self) -> int:
        """The examples of an epoch: as many as the sources hold together.

        In a mixture a source with more than its natural share is then repeated, one with less not
        used up.
        """
        return sum(self.sizes)

    def at(self, positions: Indices) -> tuple[Indices, Indices]:
        """Return the source of each position `[n]`, and the number of the example in it `[n]`."""
        sources, drawn = self._assignment.at(np.asarray(positions, np.int64))
        found = np.empty_like(drawn)
        for source, size in enumerate(self.sizes):
            own = np.flatnonzero(sources == source)
            if own.size:
                found[own] = self._source_order(source, size, drawn[own])
        return sources, found

    def _source_order(self, source: int, size: int, drawn: Indices) -> Indices:
        rounds, within = np.divmod(drawn, size)
        if not self.shuffled:
            return within
        out = np.empty_like(within)
        for number in np.unique(rounds):
            own = rounds == number
            out[own] = permute(within[own], size, derive(self.seed, "round", source, int(number)))
        return out


def batch_positions(step: int, batch: int) -> Indices:
    """Return the positions of the batch of a step (from 0): `[batch]`."""
    return np.arange(batch, dtype=np.int64) + step * batch


def steps_of(length: Measure, *, epoch: int, batch: int) -> int:
    """Return the steps of a length in steps or epochs: `epoch` and `batch` in the same unit
    (examples, bins).

    A last batch that an epoch does not fill goes on into the next epoch. A length in tokens depends
    on the examples' own: see `packing.plan`.
    """
    match length.unit:
        case "steps":
            return int(length.value)
        case "epochs":
            # 2 * 0.1 epochs must not become one step more by a rounding error.
            return max(1, ceil(length.value * epoch / batch - 1e-9))
    raise ValueError(f"a length in {length.unit}")
