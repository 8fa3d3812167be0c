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

from tunelang.runtime.products import product

TILE = 64
"""Weights that share a scale, along the last axis of the inputs (arXiv:2305.14314, section 4)."""


def quantized(weight: jax.Array, inputs: int, storage: str) -> tuple[jax.Array, jax.Array]:
    """Return the codes and the float32 scales of a matrix `[*inputs, *outputs]`.

    nf4 has a scale for each `TILE` inputs of an output and its codes, `[..., outputs / 2]` uint8,
    hold two weights; int8 has a scale for each output.
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
    pairs = found.qvalue.astype(jnp.uint8).reshape(*weight.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), found.scale


def dequantized(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Return the matrix that `quantized` made codes of."""
    if codes.dtype == jnp.int8:
        return (codes * scales).astype(dtype)
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1)
    levels = _levels()[pairs.reshape(*codes.shape[:-1], -1)]
    axis = next(
        (at for at, size in enumerate(scales.shape) if size != levels.shape[at]), levels.ndim - 1
    )
    # In tiles: an axis that is split over devices stays split.
    tiles = levels.reshape(*scales.shape[: axis + 1], -1, *levels.shape[axis + 1 :])
    found: jax.Array = (tiles * jnp.expand_dims(scales, axis + 1)).astype(dtype)
    return found.reshape(levels.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_product(
    x: jax.Array, codes: jax.Array, scales: jax.Array, contracted: int = 1
) -> jax.Array:
    """`products.product` with a quantised matrix, which has no gradient.

    What the backward pass keeps are the codes: the matrix itself is made anew.
    """
    return product(x, dequantized(codes, scales, x.dtype), contracted)


def _forward(
    x: jax.Array, codes: jax.Array, scales: jax.Array, contracted: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return frozen_product(x, codes, scales, contracted), (codes, scales)


def _backward(
    contracted: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, Any, jax.Array]:
    codes, scales = kept
    weight = dequantized(codes, scales, gradient.dtype)
    outputs = weight.ndim - contracted
    behind = tuple(range(gradient.ndim - outputs, gradient.ndim))
    columns = tuple(range(contracted, weight.ndim))
    of_x = jax.lax.dot_general(gradient, weight, ((behind, columns), ((), ())))
    return of_x, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scales)


frozen_product.defvjp(_forward, _backward)


def _levels() -> jax.Array:
    """Return what the sixteen codes of nf4 stand for, float32."""
    codes = qwix.QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1), None, "nf4")
    levels: jax.Array = qwix.dequantize(codes)
    return levels
