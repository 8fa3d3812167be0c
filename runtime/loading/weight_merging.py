"""Models merged into one: their weights combined tensor by tensor.

A tensor is a parameter of one layer: of those that are stacked, each entry of the leading axis; the
experts of a layer are one tensor. All is computed in float32, one parameter after the other, where
the first model has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Sharding
from jaxtyping import PyTree

from tunelang.dsl.vocabulary.training import Dare, Linear, Merging, Slerp, Ties
from tunelang.runtime.models.parameters import arrays_by_path, with_arrays

_PARALLEL = 0.9995
"""Cosine from which the arc between two tensors is taken for a straight line, as in mergekit."""
_STACKED = "blocks."

Arrays = Mapping[str, Array]


def merge_weights(
    method: Merging, models: Sequence[PyTree], base: PyTree | None, seed: int
) -> PyTree:
    """Return the parameters that `method` makes of those of several models.

    `models` and `base` are trees of floating-point arrays with the same paths and shapes; `base` is
    read by `Ties` and `Dare`, and `seed` by `Dare`. The result has the structure, the dtypes and
    the shardings of the first model, and does not depend on the mesh but by rounding.

    Raises `ValueError` where the number of models is not that of the method or its weights, a base
    is missing, or the trees do not match.
    """
    _require(method, len(models), base)
    trees = [arrays_by_path(model) for model in models]
    origin = arrays_by_path(base) if isinstance(method, Ties | Dare) else None
    for tree in trees if origin is None else [*trees, origin]:
        _match(trees[0], tree)
    merged = {}
    for index, (name, first) in enumerate(trees[0].items()):
        merged[name] = _parameter_program(first.sharding)(
            method,
            name.startswith(_STACKED),
            [tree[name] for tree in trees],
            None if origin is None else origin[name],
            np.uint32(seed % 2**32),
            index,
        )
    return with_arrays(models[0], merged)


@cache
def _parameter_program(sharding: Sharding) -> jax.stages.Wrapped:
    return jax.jit(_merge_parameter, static_argnums=(0, 1), out_shardings=sharding)


def _require(method: Merging, count: int, base: PyTree | None) -> None:
    weights = getattr(method, "weights", None)
    if weights is not None and len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models")
    match method:
        case Linear() if weights is not None and abs(sum(weights)) < 1e-6:
            raise ValueError("weights that add to 0 cannot be made to add to 1")
        case Slerp() if count != 2:
            raise ValueError(f"slerp is between two models, not {count}")
        case Ties() | Dare() if base is None:
            raise ValueError(f"{method.word} takes differences from a base, and there is none")


def _match(first: Arrays, other: Arrays) -> None:
    for name in sorted(first.keys() | other.keys()):
        if name not in first or name not in other:
            raise ValueError(f"`{name}` is not in every model")
        shape, other_shape = first[name].shape, other[name].shape
        if shape != other_shape:
            raise ValueError(f"`{name}` is {shape} in one model and {other_shape} in another")
        dtype = other[name].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"`{name}` is {dtype}: codes cannot be averaged")


def _merge_parameter(
    method: Merging,
    stacked: bool,
    models: list[Array],
    base: Array | None,
    seed: Array,
    index: Array,
) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), index)
    merge = partial(_tensor, method)
    if stacked:
        merge, key = jax.vmap(merge), jax.random.split(key, models[0].shape[0])
    return merge(models, base, key).astype(models[0].dtype)


def _tensor(method: Merging, models: list[Array], base: Array | None, key: Array) -> Array:
    values = jnp.stack(models).astype(jnp.float32)
    ones = (1.0,) * len(models)
    match method:
        case Linear(weights=weights):
            return _weighted(values, weights or ones).sum(0) / sum(weights or ones)
        case Slerp(share=share):
            return _on_arc(values, share)
    assert base is not None
    base = base.astype(jnp.float32)
    differences = values - base
    match method:
        case Ties(density=density, weights=weights, scale=scale):
            largest = jax.vmap(partial(_largest, density=density))(differences)
            return base + scale * _elected(_weighted(largest, weights or ones))
        case Dare(density=density, weights=weights):
            drawn = jax.random.bernoulli(key, density, values.shape)
            rescaled = jnp.where(drawn, differences / density, 0)
            return base + _weighted(rescaled, weights or [1 / len(ones)] * len(ones)).sum(0)
    raise TypeError(f"not a way to merge: {type(method).__name__}")


def _weighted(values: Array, weights: Sequence[float] | Array) -> Array:
    """Multiply each of `values` `[models, ...]` by its weight."""
    return values * jnp.asarray(weights, jnp.float32).reshape(-1, *(1,) * (values.ndim - 1))


def _on_arc(ends: Array, share: float) -> Array:
    """Return the point at `share` of the great arc between two vectors `[2, ...]`, or of the
    straight line where they are nearly parallel or opposite, or one is 0.

    Lengths are interpolated as well, as in mergekit.
    """
    start, end = ends
    lengths = jnp.linalg.norm(start) * jnp.linalg.norm(end)
    cosine = (start * end).sum() / jnp.where(lengths == 0, 1, lengths)
    straight = (lengths == 0) | (jnp.abs(cosine) > _PARALLEL)
    angle = jnp.arccos(jnp.where(straight, 0, cosine))
    shares = jnp.asarray([1 - share, share])
    arcs = jnp.sin(shares * angle) / jnp.sin(angle)
    return _weighted(ends, jnp.where(straight, shares, arcs)).sum(0)


def _largest(tensor: Array, density: float) -> Array:
    """Return a tensor with 0 for all but its `int(density * size)` entries of largest magnitude.

    Entries as large as the smallest of them stay too, as in the authors' code. The bound is found
    bit by bit, where sorting would bring a split tensor together: magnitudes order as the integers
    with the same bits do.
    """
    count = int(density * tensor.size)
    bits = lax.bitcast_convert_type(jnp.abs(tensor), jnp.int32)

    def narrow(bit: Array, bound: Array) -> Array:
        higher = bound | (jnp.int32(1 << 30) >> bit)
        return jnp.where((bits >= higher).sum() >= count, higher, bound)

    return jnp.where(bits >= lax.fori_loop(0, 31, narrow, jnp.int32(0)), tensor, 0)


def _elected(values: Array) -> Array:
    """Return the mean over models of the `values` `[models, ...]` whose sign is that of their sum;
    positive where that is 0.
    """
    sign = jnp.where(values.sum(0) >= 0, 1, -1)
    agrees = jnp.sign(values) == sign
    return jnp.where(agrees, values, 0).sum(0) / jnp.maximum(agrees.sum(0), 1)
