"""A decoder's parameters as trees: merging, splitting by what is trained, shapes without arrays."""

from __future__ import annotations

from typing import Any

from flax import nnx

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.decoder import Decoder

OBJECTIVE_PARAMS = "objective"
"""Under this name stand parameters that are trained beside the decoder's."""


def merge_params(*parts: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """Put parts of a decoder's parameters together."""
    return nnx.merge_state(*parts)


def split_objective_params(
    params: nnx.State[Any, Any],
) -> tuple[nnx.State[Any, Any], nnx.State[Any, Any]]:
    """Return the decoder's parameters, and those of the objective."""
    extra, own = nnx.split_state(params, lambda path, _: path[0] == OBJECTIVE_PARAMS, ...)
    return own, extra


def split_trainable(
    architecture: Architecture, params: nnx.State[Any, Any]
) -> tuple[nnx.State[Any, Any], nnx.State[Any, Any]]:
    """Return the parameters that are trained, and those that are frozen."""
    if not architecture.adapters:
        return params, nnx.State({})
    last = str(len(architecture.adapters) - 1)

    def trained(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(name) for name in path]
        # `blocks.attention.q.adapters.0.a`, `embedding_adapters.0.a`
        adapter = len(names) > 2 and names[-3].endswith("adapters") and names[-2] == last
        return adapter or names[0] in ("score", OBJECTIVE_PARAMS)

    chosen, rest = nnx.split_state(params, trained, ...)
    return chosen, rest


def abstract_decoder(architecture: Architecture, dtype: Any) -> tuple[Any, Any]:
    """Return the decoder's graph definition, and its parameters as shapes with axis names; those
    of adapters too.
    """
    return nnx.split(nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0), dtype)))


def uses_dropout(architecture: Architecture) -> bool:
    """Whether training draws what to drop."""
    return bool(architecture.dropout or any(each.dropout for each in architecture.adapters))
