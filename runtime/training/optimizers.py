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

from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Lion, Muon, Optimizer, Sgd
from tunelang.runtime.sharding import Axes, is_variable, logical_axes
from tunelang.runtime.user_functions import Custom

STACKED = frozenset({"layers", "expert"})
"""Axes along which whole weights are stacked."""
_ONE_SIDE = {"heads": "head", "kv_heads": "head", "head_dim": "head"}
"""Axes that together are one side of a matrix."""
_TABLES = frozenset({"vocab", "position"})
"""Matrices with these axes are looked up in, or give logits: Muon leaves them to AdamW."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that brings singular values near 1 (Jordan et al. 2024)."""

_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
"""AdamW's own defaults, for the part of Muon that is AdamW."""

Schedule = Callable[[Any], jax.Array]


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

    def rate(step: Any) -> jax.Array:
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
            case Custom() as own:
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
    return optax.chain(clip, _streamed(rule) if offloaded else rule)


def _streamed(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Make the updates of a rule whose moments lie in the memory of the host: those of one
    parameter after another, of stacked ones layer by layer, come to the device and go back.

    The state is that of the rule, which has to treat each parameter by itself.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        gradients, structure = jax.tree.flatten(updates, is_leaf=is_variable)
        values = jax.tree.leaves(params, is_leaf=is_variable)
        changes: list[Any] = []
        states: list[Any] = []

        def is_moments(node: Any) -> bool:
            found: Any = jax.tree.structure(node, is_leaf=is_variable)
            return bool(found == structure)

        def of_one(node: Any) -> Any:
            if not is_moments(node):
                return node
            return [jax.tree.leaves(node, is_leaf=is_variable)[len(changes)]]

        def of_all(node: Any, *each: Any) -> Any:
            if not is_moments(node):
                return each[-1]
            return jax.tree.unflatten(structure, [one for (one,) in each])

        for gradient, value in zip(gradients, values, strict=True):
            own = jax.tree.map(of_one, state, is_leaf=is_moments)
            if changes:  # not before the last one is done
                own, _ = jax.lax.optimization_barrier((own, changes[-1]))
            stacked = logical_axes(gradient)[:1] == ("layers",)
            change, new = (_by_layer if stacked else _at_once)(rule, gradient, own, value)
            changes.append(change)
            states.append(new)
        kept = jax.tree.map(of_all, state, *states, is_leaf=is_moments)
        return jax.tree.unflatten(structure, changes), kept

    return optax.GradientTransformation(rule.init, update)


def _at_once(
    rule: optax.GradientTransformation, gradient: Any, own: Any, value: Any
) -> tuple[Any, Any]:
    """Return the update of a parameter, and its state: lists hold what lies at the host."""
    (change,), new = rule.update([gradient], moved_to(own, "Device"), [value])
    return change, jax.tree.map(_to_host, new, is_leaf=_is_list)


def _by_layer(
    rule: optax.GradientTransformation, gradient: Any, own: Any, value: Any
) -> tuple[Any, Any]:
    """As `_at_once`, for what is stacked along its first axis."""

    def body(at: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        change, held = carry

        def layer(node: nnx.Variable[Any]) -> Any:
            array = node.get_value()
            if not isinstance(array, optax.MaskedNode):
                array = jax.lax.dynamic_index_in_dim(array, at, keepdims=False)
            return node.replace(array, out_sharding=logical_axes(node)[1:])

        def put(node: nnx.Variable[Any], part: nnx.Variable[Any]) -> Any:
            if isinstance(node.get_value(), optax.MaskedNode):
                return node
            array = jax.lax.dynamic_update_index_in_dim(node.get_value(), part.get_value(), at, 0)
            return node.replace(array)

        def taken(node: Any, now: Any) -> Any:  # counts are those of the whole update
            return [layer(now[0])] if _is_list(node) else node

        def given(now: Any, part: Any) -> Any:
            return [put(now[0], _to_host(part)[0])] if _is_list(now) else part

        parts = jax.tree.map(taken, own, held, is_leaf=_is_list)
        one, new = rule.update([layer(change)], moved_to(parts, "Device"), [layer(value)])
        return put(change, one[0]), jax.tree.map(given, held, new, is_leaf=_is_list)

    layers = gradient.get_value().shape[0]
    found: tuple[Any, Any] = jax.lax.fori_loop(0, layers, body, (gradient, own))
    return found


def _is_list(node: Any) -> bool:
    return isinstance(node, list)


def _to_host(node: Any) -> Any:
    return moved_to(node, "Host") if _is_list(node) else node


def moved_to(tree: Any, where: str) -> Any:
    """Move the arrays of a tree within a program: to the memory of the `Host`, or of a `Device`."""
    space: Any = getattr(jax.memory.Space, where)
    return jax.tree.map(lambda array: jax.device_put(array, space), tree)


def _map_variables(function: Callable[..., Any], *trees: Any) -> Any:
    """Apply `function(axes, *arrays)` to each parameter and what belongs to it."""

    def one(variable: nnx.Variable[Any], *others: nnx.Variable[Any]) -> nnx.Variable[Any]:
        arrays = [each.get_value() for each in (variable, *others)]
        if isinstance(arrays[0], optax.MaskedNode):
            return variable
        return variable.replace(function(logical_axes(variable), *arrays))

    return jax.tree.map(one, *trees, is_leaf=is_variable)


def _decay(rate: float) -> optax.GradientTransformation:
    """Add `rate` times the parameter to the update of each matrix."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(axes: Axes, change: jax.Array, value: jax.Array) -> jax.Array:
            return change + rate * value if is_matrix(axes) else change

        return _map_variables(one, updates, params), state

    if rate == 0.0:
        return optax.identity()
    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _muon(optimizer: Muon, steps: int) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        def one(axes: Axes, _: Any) -> str:
            hidden = is_matrix(axes) and not _TABLES.intersection(axes)
            return "muon" if hidden else "adam"

        return _map_variables(one, params)

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
    return optax.partition({"muon": orthogonal, "adam": adam}, labels)


def _scale_by_muon(momentum: float, iterations: int) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum (Jordan et al. 2024, "Muon").

    With `m = momentum * m + (1 - momentum) * g`, the update is the orthogonalised
    `momentum * m + (1 - momentum) * g`, times `sqrt(max(1, outputs / inputs))`.
    """

    def init(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return momentum * old + (1 - momentum) * new

        state = jax.tree.map(average, state, updates)
        ahead = jax.tree.map(average, state, updates)

        def one(axes: Axes, array: jax.Array) -> jax.Array:
            inputs, outputs = sides(axes)
            stacked = array.shape[: array.ndim - inputs - outputs]
            rows = math.prod(array.shape[len(stacked) : array.ndim - outputs])
            matrix = array.reshape(*stacked, rows, -1)
            columns = matrix.shape[-1]
            scale = max(1.0, columns / rows) ** 0.5
            change: jax.Array = scale * orthogonalise(matrix, iterations)
            return change.reshape(array.shape)

        return _map_variables(one, ahead), state

    return optax.GradientTransformation(init, update)


def orthogonalise(matrix: jax.Array, iterations: int) -> jax.Array:
    """`U @ V.T` of the singular value decomposition of `[..., rows, columns]`, roughly.

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
