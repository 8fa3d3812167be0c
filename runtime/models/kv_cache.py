"""The cache of keys and values that completions are sampled with."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tunelang.compiler.models.architecture import Architecture

KEYS = ("batch", "kv_heads", "head_dim", None)
"""Logical axes of a layer's cached keys."""
VALUES = ("batch", "kv_heads", None, "head_dim")
"""Logical axes of a layer's cached values."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in slots that may be at different positions."""

    keys: tuple[jax.Array, ...]
    """The rotated keys of each layer, `[slots, kv_heads, head_dim, capacity]`: the order of axes in
    which both products of attention read a matrix as it lies."""
    values: tuple[jax.Array, ...]
    """The values of each layer, `[slots, kv_heads, capacity, head_dim]`."""
    lengths: jax.Array
    """`[slots]` int32: how many tokens of each slot are filled in; the rest is meaningless."""


def empty_cache(architecture: Architecture, slots: int, capacity: int, dtype: DTypeLike) -> Cache:
    """Return a cache with `slots` empty slots of `capacity` tokens."""
    a = architecture

    def layers(*sizes: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((slots, a.kv_heads, *sizes), dtype) for _ in range(a.layers))

    return Cache(
        layers(a.head_dim, capacity), layers(capacity, a.head_dim), jnp.zeros(slots, jnp.int32)
    )


def insert(cache: Cache, prompts: Cache, rows: jax.Array, slots: jax.Array) -> Cache:
    """Copy prompts into slots: prompt `rows[i]` into slot `slots[i]`, both `[count]` int32.

    A prompt may go to many slots (the completions of a group); a slot beyond the last is left
    out, so that `rows` can have a fixed size. `ValueError` where prompts are longer than slots.
    """
    length, capacity = prompts.values[0].shape[2], cache.values[0].shape[2]
    if length > capacity:
        raise ValueError(f"prompts of {length} tokens for slots of {capacity}")

    def put(cached: jax.Array, prompt: jax.Array, *positions: slice) -> jax.Array:
        values = prompt[rows].astype(cached.dtype)
        return cached.at[slots, *positions].set(values, mode="drop")

    every, filled = slice(None), slice(length)
    return Cache(
        tuple(
            put(*pair, every, every, filled) for pair in zip(cache.keys, prompts.keys, strict=True)
        ),
        tuple(put(*pair, every, filled) for pair in zip(cache.values, prompts.values, strict=True)),
        cache.lengths.at[slots].set(prompts.lengths[rows], mode="drop"),
    )
