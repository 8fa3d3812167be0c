"""Matrix products whose gradients transpose the smaller operand.

The gradient of a product's right side contracts the rows of the left side with those of the
result's gradient, and one of the two has to be read across. JAX always takes the result's
gradient for it; XLA on CPUs then writes a transposed copy of an array that is often the larger
one by far (attention weights, the hidden units of a feed-forward).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def product(
    x: jax.Array,
    y: jax.Array,
    contracted: int = 1,
    batched: int = 0,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiply `[*batch, *rows, *inner]` and `[*batch, *inner, *columns]`.

    Returns `[*batch, *rows, *columns]`.

    `contracted` and `batched` are the numbers of inner and of batch axes; `dtype` is the result's,
    otherwise that of `x` and `y`, which are of one. Differentiable once.
    """
    columns = y.shape[batched + contracted :]
    if batched or len(columns) < 2:
        return _product(x, y, contracted, batched, dtype)
    # As one axis, in which TPUs do not pad the heads that a layer keeps.
    flat = _product(x, y.reshape(*y.shape[:contracted], -1), contracted, batched, dtype)
    return flat.reshape(*flat.shape[:-1], *columns)


def _dot(
    x: jax.Array, y: jax.Array, contracted: int, batched: int, dtype: DTypeLike | None
) -> jax.Array:
    inner = tuple(range(x.ndim - contracted, x.ndim))
    y_inner = tuple(range(batched, batched + contracted))
    batch = tuple(range(batched))
    return jax.lax.dot_general(
        x, y, ((inner, y_inner), (batch, batch)), preferred_element_type=dtype
    )


# Gained 14% of a training step on 2 cores (2026-11, "What single changes gained" in
# benchmarks/RESULTS.md). Delete when XLA's CPU compiler transposes the smaller operand by itself.
_product = partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))(_dot)


def _forward(
    x: jax.Array, y: jax.Array, contracted: int, batched: int, dtype: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `_product` itself: a policy of rematerialisation looks for `dot_general`.
    return _dot(x, y, contracted, batched, dtype), (x, y)


def _backward(
    contracted: int,
    batched: int,
    dtype: DTypeLike | None,
    operands: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    del dtype
    x, y = operands
    gradient = gradient.astype(x.dtype)
    batch = tuple(range(batched))
    rows = tuple(range(batched, x.ndim - contracted))
    columns = tuple(range(batched + contracted, y.ndim))
    result_columns = tuple(range(x.ndim - contracted, gradient.ndim))
    over_rows = ((rows, rows), (batch, batch))
    if x.size <= gradient.size:
        y_gradient = jax.lax.dot_general(x, gradient, over_rows)
    else:
        end = range(y.ndim - contracted, y.ndim)
        y_gradient = jax.lax.dot_general(gradient, x, over_rows)
        y_gradient = jnp.moveaxis(y_gradient, end, range(batched, batched + contracted))
        # The weights of attention are freed before their gradient exists. With the order of the
        # head's gradient, 10.6 -> 8.8 GiB of gemma-2b on 16 v5e (2026-11, "Order of gradients" in
        # benchmarks/RESULTS.md). Delete when a rehearsal without it (`tune plan --compile` for TPUs
        # with `attention = xla`) has the same peak.
        if batched > 1:
            gradient, y_gradient = jax.lax.optimization_barrier((gradient, y_gradient))
    return jax.lax.dot_general(gradient, y, ((result_columns, columns), (batch, batch))), y_gradient


_product.defvjp(_forward, _backward)
