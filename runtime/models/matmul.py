"""Matrix products whose gradients transpose the smaller operand.

The gradient of a product's right side contracts the rows of the left side with those of the
result's gradient, and one of the two has to be read across. JAX always takes the result's
gradient for it; XLA on CPUs then writes a transposed copy of an array that is often the larger
one by far (attention weights, the hidden units of a feed-forward).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def product(
    x: jax.Array, y: jax.Array, contracted: int = 1, batched: int = 0, dtype: Any = None
) -> jax.Array:
    """`[*batch, *rows, *inner]` times `[*batch, *inner, *columns]`: `[*batch, *rows, *columns]`.

    `contracted` and `batched` are the numbers of inner and of batch axes; `dtype` is the result's,
    otherwise that of `x` and `y`, which are of one. Differentiable once.
    """
    columns = y.shape[batched + contracted :]
    if batched or len(columns) < 2:
        return _product(x, y, contracted, batched, dtype)
    # As one axis, in which TPUs do not pad the heads that a layer keeps.
    found = _product(x, y.reshape(*y.shape[:contracted], -1), contracted, batched, dtype)
    return found.reshape(*found.shape[:-1], *columns)


def _dot(x: jax.Array, y: jax.Array, contracted: int, batched: int, dtype: Any) -> jax.Array:
    inner = tuple(range(x.ndim - contracted, x.ndim))
    across = tuple(range(batched, batched + contracted))
    batch = tuple(range(batched))
    return jax.lax.dot_general(
        x, y, ((inner, across), (batch, batch)), preferred_element_type=dtype
    )


_product = partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))(_dot)


def _forward(
    x: jax.Array, y: jax.Array, contracted: int, batched: int, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `_product` itself: a policy of rematerialisation looks for `dot_general`.
    return _dot(x, y, contracted, batched, dtype), (x, y)


def _backward(
    contracted: int,
    batched: int,
    dtype: Any,
    operands: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    del dtype
    x, y = operands
    gradient = gradient.astype(x.dtype)
    batch = tuple(range(batched))
    rows = tuple(range(batched, x.ndim - contracted))
    columns = tuple(range(batched + contracted, y.ndim))
    behind = tuple(range(x.ndim - contracted, gradient.ndim))
    over_rows = ((rows, rows), (batch, batch))
    if x.size <= gradient.size:
        of_y = jax.lax.dot_general(x, gradient, over_rows)
    else:
        end = range(y.ndim - contracted, y.ndim)
        of_y = jax.lax.dot_general(gradient, x, over_rows)
        of_y = jnp.moveaxis(of_y, end, range(batched, batched + contracted))
        if batched > 1:  # the weights of attention are let go before their gradient is there
            gradient, of_y = jax.lax.optimization_barrier((gradient, of_y))
    return jax.lax.dot_general(gradient, y, ((behind, columns), (batch, batch))), of_y


_product.defvjp(_forward, _backward)
