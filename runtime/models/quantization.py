"""Frozen matrices in four or eight bits, of which nothing is trained (QLoRA, arXiv:2305.14314).

The numerics are Qwix's. It would quantise by intercepting the calls of a model, which a scan over
stacked layers hides from it; here the codes are parameters like all others, two to a byte.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.typing import DTypeLike

from tunelang.runtime.models.matmul import product

TILE = 64
"""Weights that share a scale, along the last axis of the inputs (arXiv:2305.14314, section 4)."""


def quantized(weight: jax.Array, inputs: int, storage: str) -> tuple[jax.Array, jax.Array]:
    """Return the codes and the float32 scales of a matrix `[*inputs, *outputs]`.

    nf4 has a scale for each `TILE` inputs of an output, and its codes are uint8: one holds a weight
    of the first half of such a tile and, in the high bits, one of the second. int8 has a scale for
    each output.
    """
    axes = set(range(weight.ndim))
    if storage == "int8":
        outputs = axes - set(range(inputs))
        found = qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)
        return found.qvalue, found.scale
    tiled = inputs - 1
    found = qwix.quantize(
        weight.astype(jnp.float32),
        "nf4",
        channelwise_axes=axes - {tiled},
        tiled_axes={tiled: math.gcd(TILE, weight.shape[tiled])},
    )
    low, high = jnp.split(_in_tiles(found.qvalue.astype(jnp.uint8), found.scale, tiled), 2, inputs)
    codes = low | (high << 4)
    return codes.reshape(*weight.shape[:tiled], -1, *weight.shape[inputs:]), found.scale


def dequantized(codes: jax.Array, scales: jax.Array, inputs: int, dtype: DTypeLike) -> jax.Array:
    """Return the matrix that `quantized` made codes of."""
    if codes.dtype == jnp.int8:
        return (codes.astype(scales.dtype) * scales).astype(dtype)
    # Whole tiles, along an axis that is not the last: nothing changes its place in memory, and an
    # axis that is split over devices stays split.
    pairs = _in_tiles(codes, scales, inputs - 1)
    levels = _levels(jnp.concatenate([pairs & 15, pairs >> 4], inputs))
    found: jax.Array = (levels * jnp.expand_dims(scales, inputs)).astype(dtype)
    return found.reshape(*codes.shape[: inputs - 1], -1, *codes.shape[inputs:])


def _in_tiles(codes: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """Cut an axis into those that scales are of, and what each of them is of."""
    shape = codes.shape
    return codes.reshape(*shape[:axis], scales.shape[axis], -1, *shape[axis + 1 :])


# With `remat.save_weight_products`, temporaries of nf4 fell from 597 to 333 MiB (2 cores, 2026-11,
# "Adapters" in benchmarks/RESULTS.md). Delete when `jax.checkpoint` can keep the codes of a matrix
# for the backward pass, and not the matrix.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_product(
    x: jax.Array, codes: jax.Array, scales: jax.Array, contracted: int = 1
) -> jax.Array:
    """Multiply with a quantised matrix, which has no gradient.

    The backward pass keeps the codes and dequantises them again.
    """
    return product(x, dequantized(codes, scales, contracted, x.dtype), contracted)


def _forward(
    x: jax.Array, codes: jax.Array, scales: jax.Array, contracted: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return frozen_product(x, codes, scales, contracted), (codes, scales)


def _backward(
    contracted: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    codes, scales = kept
    weight = dequantized(codes, scales, contracted, gradient.dtype)
    outputs = weight.ndim - contracted
    behind = tuple(range(gradient.ndim - outputs, gradient.ndim))
    columns = tuple(range(contracted, weight.ndim))
    of_x = jax.lax.dot_general(gradient, weight, ((behind, columns), ((), ())))
    return of_x, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scales)


frozen_product.defvjp(_forward, _backward)


def _levels(codes: jax.Array) -> jax.Array:
    """Return what codes of nf4 stand for, float32: chosen bit by bit, since compilers make of a
    table that is looked up in a slow gather, or copies.
    """
    every = qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1), None, "nf4")
    found = list(qwix.dequantize(every))
    for bit in range(4):
        high = (codes >> bit) & 1 == 1
        found = [jnp.where(high, *pair) for pair in zip(found[1::2], found[::2], strict=True)]
    levels: jax.Array = found[0]
    return levels
