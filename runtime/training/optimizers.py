"""The language's optimizers as optax transformations: schedule, clipping, decay, update rule.

What is a matrix is decided by the logical axes of a parameter and not by its dimensions: stacked
layers make vectors two-dimensional, and attention heads make matrices three-dimensional.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, PyTree

from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Lion, Muon, Optimizer, Sgd
from tunelang.runtime.sharding import Axes, is_variable, logical_axes
from tunelang.runtime.training.offload import offload
from tunelang.runtime.user_functions import UserFunction

STACKED = frozenset({"layers", "expert"})
"""Axes along which weights are stacked."""
_ONE_SIDE = {"heads": "head", "kv_heads": "head", "head_dim": "head"}
"""Axes that together are one side of a matrix."""
_TABLES = frozenset({"vocab", "position"})
"""Matrices with these axes are looked up in, or give logits: Muon leaves them to AdamW."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that brings singular values near 1 (Jordan et al. 2024)."""

_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
"""AdamW's own defaults, for the part of Muon that is AdamW."""

Integer = int | jax.Array
Schedule = Callable[[Integer], jax.Array]


def sides(axes: Axes) -> list[int]:
    """Count the dimensions of each side of a parameter, stacking left out: `[1, 2]` for
    `(layers, embed, heads, head_dim)`. A vector has one side, a matrix two.
    """
    names = [_ONE_SIDE.get(name or "", name) for name in axes if name not in STACKED]
    return [len(list(run)) for _, run in groupby(names)]


def is_matrix(axes: Axes) -> bool:
    """Whether a parameter with these logical axes maps vectors to vectors, or looks them up."""
    return len(sides(axes)) > 1


def learning_rate(optimizer: Optimizer, steps: int, peak: float | None = None) -> Schedule:
    """Return the learning rate of each step, counted from 0, of a run of `steps`.

    The warm-up rises linearly to the peak, which its last step has; no step is wasted on a rate
    of 0. The rate then falls so that it would be `final * peak` after the last step. A warm-up in
    percent is a share of `steps`, rounded to whole steps. `peak` replaces the optimizer's own.
    """
    top = optimizer.lr if peak is None else peak
    share = optimizer.warmup.unit == "%"
    warmup = round(optimizer.warmup.value * steps) if share else int(optimizer.warmup.value)
    falling = max(steps - warmup, 1)

    def rate(step: Integer) -> jax.Array:
        now = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((now + 1) / max(warmup, 1), 1.0)
        progress = jnp.clip((now - warmup) / falling, 0.0, 1.0)
        match optimizer.decay:
            case "constant":
                left = jnp.ones_like(progress)
            case "linear":
                left = 1 - progress
            case "cosine":
                left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            case UserFunction() as own:
                left = own((), progress=progress, step=now, steps=jnp.float32(steps))
            case unknown:
                raise ValueError(f"unknown decay {unknown!r}")
        fall = left + (1 - left) * optimizer.final
        return jnp.asarray(top * rise * fall)

    return rate


def build_optimizer(
    optimizer: Optimizer, steps: int, *, offloaded: bool = False
) -> optax.GradientTransformation:
    """Return the transformation for parameters with axis names, over a run of `steps`.

    The gradient is first scaled down to the global norm `clip_norm`. Updates are to be added to
    the parameters. What is `offloaded` has its moments in the memory of the host.
    """
    rate = learning_rate(optimizer, steps)
    clip = (
        optax.identity()
        if optimizer.clip_norm is None
        else optax.clip_by_global_norm(optimizer.clip_norm)
    )
    match optimizer:
        case AdamW():
            rule = optax.chain(
                optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps),
                _decay(optimizer.weight_decay),
                optax.scale_by_learning_rate(rate),
            )
        case Lion():
            rule = optax.chain(
                optax.scale_by_lion(b1=optimizer.b1, b2=optimizer.b2),
                _decay(optimizer.weight_decay),
                optax.scale_by_learning_rate(rate),
            )
        case Sgd():
            momentum = optax.trace(decay=optimizer.momentum, nesterov=optimizer.nesterov)
            rule = optax.chain(
                # Part of the gradient, so that momentum averages it too.
                _decay(optimizer.weight_decay),
                momentum if optimizer.momentum else optax.identity(),
                optax.scale_by_learning_rate(rate),
            )
        case Muon():
            rule = _muon(optimizer, steps)
        case _:
            raise ValueError(f"unknown optimizer {optimizer!r}")
    return optax.chain(clip, offload(rule) if offloaded else rule)


def _map_variables(function: Callable[..., Any], *trees: PyTree) -> PyTree:
    """Apply `function(axes, *arrays)` to each parameter and its counterparts in the other trees."""

    def apply(
        variable: nnx.Variable[jax.Array], *others: nnx.Variable[jax.Array]
    ) -> nnx.Variable[jax.Array]:
        arrays = [member.get_value() for member in (variable, *others)]
        if isinstance(arrays[0], optax.MaskedNode):
            return variable
        return variable.replace(function(logical_axes(variable), *arrays))

    return jax.tree.map(apply, *trees, is_leaf=is_variable)


def _decay(rate: float) -> optax.GradientTransformation:
    """Add `rate` times the parameter to the update of each matrix."""
    if rate == 0.0:
        return optax.identity()

    def decay(axes: Axes, change: jax.Array, value: jax.Array) -> jax.Array:
        return change + rate * value if is_matrix(axes) else change

    return optax.stateless(lambda updates, params: _map_variables(decay, updates, params))


def _muon(optimizer: Muon, steps: int) -> optax.GradientTransformation:
    def choose_rule(axes: Axes, _: jax.Array) -> str:
        hidden = is_matrix(axes) and not _TABLES.intersection(axes)
        return "muon" if hidden else "adam"

    orthogonal = optax.chain(
        _scale_by_muon(optimizer.momentum, optimizer.iterations),
        _decay(optimizer.weight_decay),
        optax.scale_by_learning_rate(learning_rate(optimizer, steps)),
    )
    adam = optax.chain(
        optax.scale_by_adam(**_ADAM),
        _decay(optimizer.weight_decay),
        optax.scale_by_learning_rate(learning_rate(optimizer, steps, optimizer.adam_lr)),
    )
    return optax.partition(
        {"muon": orthogonal, "adam": adam}, lambda params: _map_variables(choose_rule, params)
    )


def _scale_by_muon(momentum: float, iterations: int) -> optax.GradientTransformation:
    """Orthogonalise Nesterov momentum (Jordan et al. 2024, "Muon").

    With `m = momentum * m + (1 - momentum) * g`, the update is the orthogonalised
    `momentum * m + (1 - momentum) * g`, times `sqrt(max(1, outputs / inputs))`.

    `optax.contrib.scale_by_muon` (optax 0.2.8) is not the same: it corrects `m` and `g` for their
    bias by different counts, so that early updates have other directions than in Jordan's code (a
    tenth apart in the second, a hundredth in the twentieth); and it reshapes stacked axes into one,
    which would gather experts that devices split.
    """

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return momentum * old + (1 - momentum) * new

    def orthogonal(axes: Axes, array: jax.Array) -> jax.Array:
        inputs, outputs = sides(axes)
        stacked = array.shape[: array.ndim - inputs - outputs]
        rows = math.prod(array.shape[len(stacked) : array.ndim - outputs])
        matrix = array.reshape(*stacked, rows, -1)
        scale: float = max(1.0, matrix.shape[-1] / rows) ** 0.5
        return (scale * orthogonalise(matrix, iterations)).reshape(array.shape)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        del params
        state = jax.tree.map(average, state, updates)
        ahead = jax.tree.map(average, state, updates)
        return _map_variables(orthogonal, ahead), state

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def orthogonalise(
    matrix: Float[Array, "*stacked rows columns"], iterations: int
) -> Float[Array, "*stacked rows columns"]:
    """Return roughly `U @ V.T` of the singular value decomposition of matrices.

    The Newton-Schulz iteration of Jordan et al. 2024: five iterations bring singular values to
    between 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    rows, columns = matrix.shape[-2:]
    # The Gram matrix is the smaller one of the two.
    x = matrix if rows <= columns else jnp.swapaxes(matrix, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: jax.Array = x if rows <= columns else jnp.swapaxes(x, -1, -2)
    return result
