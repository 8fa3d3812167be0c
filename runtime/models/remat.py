"""Rematerialisation: the choice between saving a value for the backward pass and recomputing it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from tunelang.compiler.layout.stage_layout import Remat

Result = TypeVar("Result")


def save_weight_products(ranks: frozenset[int]) -> Callable[..., bool]:
    """Return a policy that saves products with weights, but not those with adapters of `ranks`.

    An adapter's product is as large as its matrix's and cheap to compute again.
    """

    # 946 -> 658 MiB of temporaries of LoRA (2 cores, 2026-11, "Adapters" in benchmarks/RESULTS.md).
    # Delete when layers name what they save (`checkpoint_name`) at the same peak.
    def saves(primitive: Any, *operands: Any, **parameters: Any) -> bool:
        if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
            primitive, *operands, **parameters
        ):
            return False
        (contracted, _), _ = parameters["dimension_numbers"]
        return math.prod(operands[0].shape[axis] for axis in contracted) not in ranks

    return saves


def rematerialize(
    function: Callable[..., Result], remat: Remat, ranks: frozenset[int]
) -> Callable[..., Result]:
    """Wrap a layer so that it keeps for its backward pass only what `remat` says."""
    if remat == "none":
        return function
    # Within a scan the compiler cannot merge the repeated computation with the first one, so that
    # the barriers against it, which also hinder fusion, are not needed.
    policy = save_weight_products(ranks) if remat == "dots" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
