"""Parts of all layers: parameters with named axes, random weights, activations, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

DTYPES: dict[str, DTypeLike] = {"f32": jnp.float32, "bf16": jnp.bfloat16}
"""The language's word for a precision -> dtype."""

Parameter = nnx.Param[jax.Array]
"""An array with a logical name for each of its axes."""

Params = nnx.State[Any, Any]
"""Parameters by their paths: arrays, or their shapes (`jax.ShapeDtypeStruct`)."""


def with_value(variable: Parameter, value: jax.Array) -> Parameter:
    """Return a parameter with another value and the same names."""
    return cast(Parameter, variable.replace(value))


def parameter(value: jax.Array, *axes: str | None, kind: type[Parameter] = nnx.Param) -> Parameter:
    """Make a parameter with a logical name for each of its axes."""
    # The names are resolved by `sharding.Layout`, not by flax, which would want a mesh here.
    return kind(value, out_sharding=axes, eager_sharding=False)


def add_leading_axes(array: jax.Array, dimensions: int) -> jax.Array:
    """Return an array with axes of size 1 in front, so that it broadcasts from the last axis on."""
    return array.reshape((1,) * (dimensions - array.ndim) + array.shape)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> jax.Array:
    """Draw normal float32 numbers with this standard deviation."""
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}
"""The GELU is its tanh approximation, as Gemma and GPT-2 have it."""


def recompute_in_backward(
    function: Callable[..., jax.Array], *arguments: jax.Array | None
) -> jax.Array:
    """Call an elementwise function, and keep only its arguments for the backward pass.

    Its intermediate values are quick to compute again, and in float32 they would take more memory
    than all else of a layer.
    """
    # With `converted_product`, 22.4 -> 19.5 GiB of llama-3.2-1b on an H200 (2026-11, "No copies of
    # weights and float32 activations" in benchmarks/RESULTS.md). Delete when XLA rematerialises
    # elementwise chains by itself. Without `prevent_cse`, as in `remat.rematerialize`.
    result: jax.Array = jax.checkpoint(function, prevent_cse=False)(*arguments)
    return result


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, place: int) -> jax.Array:
    """Zero a share `rate` of `[batch, ...]` and scale up the rest (Srivastava et al. 2014).

    Each row has a random key of its own (`keys` `[batch]`), so that the result does not depend on
    which rows share a micro-batch; `place` sets apart the uses of a key. Without keys, `x`.
    """
    if keys is None or rate == 0.0:
        return x
    is_kept = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)
