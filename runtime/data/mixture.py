"""Assigns the examples of a mixture to its sources, with exact shares at every point.

Random choice would be off by about the square root of the number drawn. Tijdeman's chairman
assignment (Discrete Mathematics 32, 1980) keeps the count of every source, after any number of
examples, closer than 1 to its share; so over any stretch of examples it is off by less than 2. With
shares over a common denominator the assignment is periodic, and one period is the table that makes
it random access.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from numpy.typing import NDArray

# Percentages with three decimals are exact; finer shares are rounded to this.
_FINEST = 100_000

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Assignment:
    """One period of a mixture.

    `sources` `[period]` is the source of each example; `counts` `[period + 1, sources]` the number
    of examples of each source before it.
    """

    sources: Indices
    counts: Indices

    def locate(self, positions: Indices) -> tuple[Indices, Indices]:
        """Return the sources of positions `[n]`, and how many examples of that source precede
        each of them, `[n]`.
        """
        period = len(self.sources)
        rounds, within = np.divmod(positions, period)
        source = self.sources[within]
        return source, rounds * self.counts[-1][source] + self.counts[within, source]

    def before(self, position: int) -> Indices:
        """Return the number of examples of each source before a position, `[sources]`."""
        rounds, within = divmod(position, len(self.sources))
        return np.asarray(rounds * self.counts[-1] + self.counts[within])


@lru_cache(maxsize=64)
def assign(weights: tuple[float, ...]) -> Assignment:
    """Return the assignment for shares that add to 1."""
    shares = _integer_shares(weights)
    period, sources = sum(shares), len(shares)
    if sources == 1:
        return Assignment(np.zeros(1, np.int64), np.array([[0], [1]], np.int64))
    # In whole numbers: everything is multiplied by 2 (sources - 1) * period. A source may be taken
    # when it is `slack` behind, and the one that would be first to fall 1 - slack behind is.
    scale = 2 * sources - 2
    one = scale * period
    behind = [0] * sources
    chosen = np.empty(period, np.int64)
    for position in range(period):
        best, room = -1, 0
        for source, share in enumerate(shares):
            behind[source] += scale * share
            if behind[source] >= period:
                left = one - period - behind[source]
                # left / share < room / shares[best], in whole numbers
                if best < 0 or left * shares[best] < room * share:
                    best, room = source, left
        behind[best] -= one
        chosen[position] = best
    counts = np.zeros((period + 1, sources), np.int64)
    counts[np.arange(1, period + 1), chosen] = 1
    return Assignment(chosen, np.cumsum(counts, axis=0))


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """Return the shares as whole numbers with a common denominator, the smallest that is exact."""
    exact = [Fraction(repr(weight)) for weight in weights]
    # The second form is for thirds, and for products of weights with a rounding error.
    near = [share.limit_denominator(1000) for share in exact]
    close = all(abs(a - b) < 1e-12 for a, b in zip(exact, near, strict=True))
    for fractions in (exact, near) if close else (exact,):
        denominator = lcm(*(share.denominator for share in fractions))
        if sum(fractions) == 1 and denominator <= _FINEST:
            return [int(share * denominator) for share in fractions]
    total = sum(exact)
    # Largest remainder; a source with any weight keeps a part.
    scaled = [share / total * _FINEST for share in exact]
    shares = [max(1, int(share)) for share in scaled]
    order = sorted(range(len(shares)), key=lambda index: shares[index] - scaled[index])
    while sum(shares) != _FINEST:
        step = 1 if sum(shares) < _FINEST else -1
        for index in order if step > 0 else reversed(order):
            if sum(shares) != _FINEST and shares[index] + step > 0:
                shares[index] += step
    return shares
