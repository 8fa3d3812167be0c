"""Small decoders with random parameters."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
from flax import nnx

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.decoder import Decoder


@cache
def small_decoder(architecture: Architecture) -> tuple[Any, Any]:
    """Make the graph and the parameters of a decoder, with noise on every parameter.

    Without noise gains are one, biases zero, and distributions over tokens almost flat.
    """
    graph, params = nnx.split(Decoder(architecture, nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noisy = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)
    return graph, noisy
