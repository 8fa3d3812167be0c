"""Gradient accumulation over micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tunelang.runtime.training.step_config import StepConfig

Accumulated = tuple[jax.Array, PyTree, PyTree]
"""A loss, its further output, and its gradient."""


def accumulate(
    loss: Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    batch: PyTree,
    config: StepConfig,
    add: Callable[[PyTree, PyTree], PyTree] = lambda *_: None,
    counts: Callable[[PyTree], jax.Array] | None = None,
) -> Accumulated:
    """Add up a loss and its gradient over micro-batches, and its further output by `add`.

    Every array of the batch is `[rows, ...]`. Micro-batches of which `counts` is false have neither
    loss nor gradient; behind the last of the others they are skipped.
    """

    def differentiate(part: PyTree) -> Accumulated:
        value, pull, extra = jax.vjp(lambda params: loss(params, part), params, has_aux=True)
        # No part of the backward pass starts before the loss is known, such as copies of frozen
        # weights: 55.1 -> 39.2 GiB of LoRA of llama-3.1-70b on 8 of 7x (2026-11, "Backward pass
        # after the loss" in benchmarks/RESULTS.md). Delete when a rehearsal without it peaks there.
        value, pull = jax.lax.optimization_barrier((value, pull))
        (gradient,) = pull(jnp.ones_like(value))
        return value, extra, gradient

    if config.micro_batches == 1:
        return differentiate(batch)

    def add_part(total: Accumulated, part: PyTree) -> Accumulated:
        value, extra, gradient = differentiate(part)
        values, extras, gradients = total
        return values + value, add(extras, extra), jax.tree.map(jnp.add, gradients, gradient)

    parts = jax.tree.map(lambda array: micro_batches(array, config), batch)
    first = jax.tree.map(lambda array: array[0], parts)
    extras = jax.eval_shape(lambda: loss(params, first)[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), extras)
    start = (jnp.zeros((), jnp.float32), zeros, jax.tree.map(jnp.zeros_like, params))
    if counts is None:
        return jax.lax.scan(lambda total, part: (add_part(total, part), None), start, parts)[0]

    def add_nth(index: jax.Array, total: Accumulated) -> Accumulated:
        return add_part(total, jax.tree.map(lambda array: array[index], parts))

    count = jnp.arange(1, config.micro_batches + 1)
    last = jnp.max(jnp.where(jax.vmap(counts)(parts), count, 0))
    total: Accumulated = jax.lax.fori_loop(0, last, add_nth, start)
    return total


def micro_batches(array: jax.Array, config: StepConfig) -> jax.Array:
    """Cut `[rows, ...]` into `[micro_batches, rows / micro_batches, ...]`."""
    # Every n-th row, so that a device's rows stay on it: rows lie in blocks over the mesh.
    parts = array.reshape(-1, config.micro_batches, *array.shape[1:]).swapaxes(0, 1)
    return config.layout.constrain(parts, (None, "batch", *(None for _ in array.shape[1:])))
