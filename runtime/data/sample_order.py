"""The order of examples as a pure function of (seed, position): a resumed run replays nothing.

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
    """Order of the examples of sources with the given sizes; `weights` are shares that add to 1."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int
    shuffled: bool = True
    """False keeps the order of the file in every round, for evaluation."""

    @cached_property
    def _assignment(self) -> Assignment:
        return assign(self.weights)

    @property
    def epoch(self) -> int:
        """Number of examples of an epoch: the sizes of all sources together.

        In a mixture a source with more than its natural share is then repeated, one with less not
        used up.
        """
        return sum(self.sizes)

    def locate(self, positions: Indices) -> tuple[Indices, Indices]:
        """Return the source of each position `[n]`, and the number of the example in it `[n]`."""
        sources, drawn = self._assignment.locate(np.asarray(positions, np.int64))
        indices = np.empty_like(drawn)
        for source, size in enumerate(self.sizes):
            of_source = np.flatnonzero(sources == source)
            if of_source.size:
                indices[of_source] = self._source_order(source, size, drawn[of_source])
        return sources, indices

    def _source_order(self, source: int, size: int, drawn: Indices) -> Indices:
        rounds, within = np.divmod(drawn, size)
        if not self.shuffled:
            return within
        out = np.empty_like(within)
        for number in np.unique(rounds):
            in_round = rounds == number
            out[in_round] = permute(
                within[in_round], size, derive(self.seed, "round", source, int(number))
            )
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
