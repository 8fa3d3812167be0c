"""Frozen matrices in four or eight bits, of which nothing is trained (QLoRA, arXiv:2305.14314).

The numerics are Qwix's. It would quantise by intercepting the calls of a model, which a scan over
stacked layers hides from it; here the codes are parameters like all others, two to a byte.
"""

from __future__ import annotations

import math
from functools import partial

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
        matrix = qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)
        return matrix.qvalue, matrix.scale
    tiled = inputs - 1
    matrix = qwix.quantize(
        weight.astype(jnp.float32),
        "nf4",
        channelwise_axes=axes - {tiled},
        tiled_axes={tiled: math.gcd(TILE, weight.shape[tiled])},
    )
    low, high = jnp.split(
        _in_tiles(matrix.qvalue.astype(jnp.uint8), matrix.scale, tiled), 2, inputs
    )
    codes = low | (high << 4)
    return codes.reshape(*weight.shape[:tiled], -1, *weight.shape[inputs:]), matrix.scale


def dequantized(codes: jax.Array, scales: jax.Array, inputs: int, dtype: DTypeLike) -> jax.Array:
    """Return the matrix that `quantized` made codes of."""
    if codes.dtype == jnp.int8:
        return (codes.astype(scales.dtype) * scales).astype(dtype)
    # Whole tiles, along an axis that is not the last: nothing changes its place in memory, and an
    # axis that is split over devices stays split.
    pairs = _in_tiles(codes, scales, inputs - 1)
    levels = _levels(jnp.concatenate([pairs & 15, pairs >> 4], inputs))
    weight: jax.Array = (levels * jnp.expand_dims(scales, inputs)).astype(dtype)
    return weight.reshape(*codes.shape[: inputs - 1], -1, *codes.shape[inputs:])


def _in_tiles(codes: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """Cut an axis into two: the tiles, and the entries of a tile, which share a scale."""
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
    contracted: int, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, np.ndarray, jax.Array]:
    codes, scales = residuals
    weight = dequantized(codes, scales, contracted, gradient.dtype)
    outputs = weight.ndim - contracted
    columns = tuple(range(gradient.ndim - outputs, gradient.ndim))
    weight_columns = tuple(range(contracted, weight.ndim))
    axes = ((columns, weight_columns), ((), ()))
    return (
        jax.lax.dot_general(gradient, weight, axes),
        np.zeros(codes.shape, jax.dtypes.float0),
        jnp.zeros_like(scales),
    )


frozen_product.defvjp(_forward, _backward)


def _levels(codes: jax.Array) -> jax.Array:
    """Return the float32 values that codes of nf4 stand for.

    They are chosen bit by bit: compilers turn a look-up in a table into a slow gather, or copies.
    """
    all_codes = qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1), None, "nf4")
    levels: list[jax.Array] = list(qwix.dequantize(all_codes))
    for bit in range(4):
        high = (codes >> bit) & 1 == 1
        levels = [jnp.where(high, *pair) for pair in zip(levels[1::2], levels[::2], strict=True)]
    return levels[0]
