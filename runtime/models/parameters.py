"""A decoder's parameters as trees: merged, split into trained and frozen, as shapes only."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.primitives import Params
from tunelang.runtime.sharding import is_variable

__all__ = [
    "OBJECTIVE_PARAMS",
    "Arrays",
    "Params",
    "abstract_decoder",
    "arrays_by_path",
    "merge_params",
    "split_objective_params",
    "split_trainable",
    "uses_dropout",
    "with_arrays",
]

OBJECTIVE_PARAMS = "objective"
"""The first key of the paths of parameters that an objective adds to the decoder's."""

Tree = TypeVar("Tree")

Arrays = dict[str, Any]
"""Arrays, or their shapes, by their paths joined by dots: `blocks.attention.q.weight`."""


def merge_params(*parts: Params) -> Params:
    """Put parts of a decoder's parameters together."""
    return nnx.merge_state(*parts)


def split_objective_params(params: Params) -> tuple[Params, Params]:
    """Return the decoder's parameters, and those of the objective."""
    objective, decoder = nnx.split_state(params, nnx.PathContains(OBJECTIVE_PARAMS), ...)
    return decoder, objective


def split_trainable(architecture: Architecture, params: Params) -> tuple[Params, Params]:
    """Return the parameters that are trained, and those that are frozen.

    With adapters, the last of each matrix is trained, and the parameters that the pretrained model
    lacks: the head of a reward or value model, and parameters of the objective.
    """
    if not architecture.adapters:
        return params, nnx.State({})
    # Adapters stand under their place among those of the architecture: `q.adapters.0.a`.
    last = str(len(architecture.adapters) - 1)
    last_adapter = nnx.All(nnx.LoRAParam, nnx.PathContains(last))
    added = nnx.Any(nnx.PathContains("score"), nnx.PathContains(OBJECTIVE_PARAMS))
    trained, frozen = nnx.split_state(params, nnx.Any(last_adapter, added), ...)
    return trained, frozen


def abstract_decoder(
    architecture: Architecture, dtype: DTypeLike
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """Return the decoder's graph definition, and its parameters as shapes with axis names; those
    of adapters too.
    """
    return nnx.split(nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0), dtype)))


def uses_dropout(architecture: Architecture) -> bool:
    """Return whether training has dropout."""
    return bool(architecture.dropout or any(adapter.dropout for adapter in architecture.adapters))


def arrays_by_path(tree: PyTree) -> Arrays:
    """Return the arrays of a tree of parameters, or of an optimizer's state made from them.

    `nnx.to_pure_dict` would do for parameters alone. An optimizer's state is of tuples too, and
    checkpoints are stored under these names: with nested ones, those that exist could not be read.
    """
    leaves: Arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        leaves[name] = leaf.get_value() if is_variable(leaf) else leaf
    # An optimizer that leaves a parameter alone has an empty node in its place.
    return {name: leaf for name, leaf in leaves.items() if hasattr(leaf, "shape")}


def with_arrays(tree: Tree, arrays: Arrays) -> Tree:
    """Return the tree with `arrays`, as `arrays_by_path` names them, in place of the tree's."""

    def put(path: tuple[object, ...], leaf: PyTree) -> PyTree:
        array = arrays.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if array is None:
            return leaf
        return leaf.replace(array) if isinstance(leaf, nnx.Variable) else array

    filled: Tree = jax.tree_util.tree_map_with_path(put, tree, is_leaf=is_variable)
    return filled
