"""Pseudo-random permutations with random access: the order of an epoch without a shuffled list.

A Feistel network (Luby and Rackoff 1988) permutes the numbers of a power of two; numbers that leave
the wanted range are sent through it again until they are back in it (cycle walking: Black and
Rogaway 2002, method 3), which permutes the range. Every number can be computed by itself. A network
over a few bits favours some permutations measurably, so small ranges are sorted by random keys
instead.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_SORTED = 256

Indices = NDArray[np.int64]


def derive(seed: int, *labels: int | str) -> int:
    """Derive a seed of 64 bits from a seed and labels; other labels give an unrelated seed."""
    text = "\0".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(indices: Indices, size: int, seed: int) -> Indices:
    """Apply a pseudo-random permutation of `range(size)` to indices `[n]`.

    Raises `IndexError` for an index outside of the range.
    """
    numbers = np.asarray(indices, np.int64)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < size):
        raise IndexError(f"indices from {numbers.min()} to {numbers.max()} in a range of {size}")
    if size <= _SORTED:
        keys = _mix(np.arange(size, dtype=np.uint64) + np.uint64(derive(seed, "keys") >> 1))
        return np.argsort(keys, kind="stable").astype(np.int64)[numbers]
    half = ((size - 1).bit_length() + 1) // 2
    rounds = [np.uint64(derive(seed, "round", number)) for number in range(_ROUNDS)]
    out = _network(numbers.astype(np.uint64), half, rounds)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        out[outside] = _network(out[outside], half, rounds)
        outside = outside[out[outside] >= size]
    return out.astype(np.int64)


def _network(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    """Apply a Feistel network over numbers of `2 * half` bits."""
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood 2014): each bit affects all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
