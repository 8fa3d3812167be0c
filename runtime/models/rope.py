"""Rotary position embeddings (RoFormer, arXiv:2104.09864), with the scalings of long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tunelang.compiler.models.architecture import Architecture, LinearScaling, Llama3Scaling, Span

Rotation = tuple[jax.Array, jax.Array]
"""Cosines and sines `[batch or 1, length, 1, head_dim / 2]`, float32."""
Rotations = Mapping[Span, Rotation]
"""The rotation of each kind of layer; none where positions are learned."""
Local = bool | jax.Array
"""Whether a layer attends within a window; computed where one program is for several layers."""


def frequencies(architecture: Architecture, span: Span) -> NDArray[np.float32]:
    """Return the radians per position of each pair of dimensions in one kind of layer.

    `[head_dim / 2]`, float32.
    """
    local_base = architecture.rope_local_base
    has_local_base = span == "local" and local_base is not None
    base = local_base if has_local_base and local_base is not None else architecture.rope_base
    exponents = np.arange(0, architecture.head_dim, 2, dtype=np.float64) / architecture.head_dim
    unscaled = base**-exponents
    scaling = None if has_local_base else architecture.rope_scaling
    match scaling:
        case None:
            scaled = unscaled
        case LinearScaling():
            scaled = unscaled / scaling.factor
        case Llama3Scaling():
            scaled = _llama3(unscaled, scaling)
    return scaled.astype(np.float32)


def _llama3(unscaled: NDArray[np.float64], scaling: Llama3Scaling) -> NDArray[np.float64]:
    periods = scaling.original_context * unscaled / (2 * math.pi)
    low, high = scaling.low_frequency, scaling.high_frequency
    share = np.clip((periods - low) / (high - low), 0.0, 1.0)
    return share * unscaled + (1 - share) * unscaled / scaling.factor


def rotation(positions: jax.Array, radians: NDArray[np.float32]) -> Rotation:
    """Return the rotation of tokens at `positions` `[batch or 1, length]`, for `frequencies`."""
    angles = positions[..., None, None].astype(jnp.float32) * radians[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotations(architecture: Architecture, positions: jax.Array) -> Rotations:
    """Return the rotations of tokens at `positions` `[batch or 1, length]`."""
    if architecture.position != "rope":
        return {}
    return {
        span: rotation(positions, frequencies(architecture, span))
        for span in set(architecture.pattern)
    }


def layer_rotation(rotations: Rotations, local: Local) -> Rotation | None:
    """Return how a layer rotates its heads; None without rotary embeddings."""
    if isinstance(local, bool):
        return rotations.get("local" if local else "global")
    if not rotations:
        return None
    chosen: Rotation = jax.tree.map(
        partial(jnp.where, local), rotations["local"], rotations["global"]
    )
    return chosen


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotate `[batch, length, heads, head_dim]`; dimension `i` is paired with `i + head_dim / 2`.

    Computed in float32, returned in the dtype of `x`.
    """
    cosine, sine = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
