"""Counts and bytes of a model, and the part of its weights that one device holds in a layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.architecture import STORED_BYTES, Architecture
from tunelang.compiler.models.parameter_counts import (
    adapter_parameters,
    expert_count,
    forward_flops,
    kv_bytes_per_token,
    off_width,
    parameter_count,
    train_flops,
    trained_count,
)


@dataclass(frozen=True)
class ModelSizes:
    """Counts of a model that do not depend on the layout."""

    parameters: int
    trained: int
    experts: int
    """Numbers in the matrices of experts."""
    largest_array: int
    """Numbers in the largest array that the optimizer updates at once."""
    stored_bytes: int
    """Bytes of all parameters."""
    table_number_bytes: float
    """Bytes of a number of the embedding, the head and the experts."""
    forward_flops: float
    """FLOPs of a token's forward pass."""
    train_flops: float
    """FLOPs of a token's forward and backward pass."""
    cache_bytes: int
    """Bytes of a token in the KV cache."""
    dtype_bytes: int
    """Bytes of a number of the activations."""


@lru_cache(maxsize=256)
def model_sizes(a: Architecture, dtype_bytes: int, length: int) -> ModelSizes:
    """Count a model that handles sequences of `length` tokens."""
    return ModelSizes(
        parameters=parameter_count(a),
        trained=trained_count(a),
        experts=expert_count(a),
        largest_array=_largest_array(a),
        stored_bytes=stored_bytes(a, dtype_bytes),
        table_number_bytes=_table_number_bytes(a, dtype_bytes),
        forward_flops=forward_flops(a, length),
        train_flops=train_flops(a, length),
        cache_bytes=kv_bytes_per_token(a, dtype_bytes),
        dtype_bytes=dtype_bytes,
    )


@dataclass(frozen=True)
class WeightShare:
    """The weights of all branches of a stage, and the part of them that one device holds.

    Experts that lie in other devices of the axis `expert` are left out everywhere.
    """

    shards: int
    """Devices that each parameter is split over."""
    model_parameters: int
    """Numbers of one model."""
    other_experts: int
    """Numbers of the experts in other devices."""
    parameters: int
    """Numbers of all branches, of which frozen ones count once."""
    trained: int
    """Trained numbers of all branches."""
    trained_here: int
    """Trained numbers in one device."""
    stored_bytes: int
    """Bytes of the parameters of all branches."""
    bytes_here: int
    """Bytes of parameters in one device."""


def weight_share(a: Architecture, sizes: ModelSizes, layout: StageLayout) -> WeightShare:
    """Count the weights of a layout's branches."""
    mesh = layout.mesh
    tensor, branches = mesh["tensor"], layout.branches
    shards = mesh["fsdp"] * mesh["context"] * tensor
    other_experts = sizes.experts - sizes.experts // mesh["expert"]
    # Each branch has trained weights of its own; frozen weights are there once.
    model_parameters = sizes.parameters - other_experts
    branch_trained = sizes.trained - (0 if a.adapters else other_experts)
    trained = branches * branch_trained
    # Of a pair of an adapter's matrices `fsdp` splits only the one along the width.
    unsplit = branches * off_width(a, a.adapters[-1]) if a.adapters else 0
    stored = sizes.stored_bytes - int(sizes.table_number_bytes * other_experts)
    stored += (branches - 1) * 4 * branch_trained
    return WeightShare(
        shards=shards,
        model_parameters=model_parameters,
        other_experts=other_experts,
        parameters=model_parameters + (branches - 1) * branch_trained,
        trained=trained,
        trained_here=(trained - unsplit) // shards + unsplit // tensor,
        stored_bytes=stored,
        bytes_here=(stored - 4 * unsplit) // shards + 4 * unsplit // tensor,
    )


def stored_bytes(a: Architecture, dtype_bytes: int) -> int:
    """Count the bytes of all parameters."""
    tables = table_parameters(a) + expert_count(a)
    blocks = parameter_count(a) - tables
    adapters = sum(adapter_parameters(a, adapter) for adapter in a.adapters)
    table_bytes = _table_number_bytes(a, dtype_bytes) * tables
    return int(STORED_BYTES[a.storage] * blocks + table_bytes + 4 * adapters)


def table_parameters(a: Architecture) -> int:
    """Count the numbers of the embedding, and of an output head that is not tied to it."""
    return a.vocabulary * a.width * (1 if a.tied else 2)


def key_shards(a: Architecture, tensor: int) -> int:
    """Return into how many parts keys and values are split; heads that do not divide are copied."""
    return tensor if a.kv_heads % tensor == 0 else 1


def is_quantised(a: Architecture) -> bool:
    """Return whether the matrices of blocks are stored in less than two bytes a number."""
    return a.storage in ("nf4", "int8")


def _largest_array(a: Architecture) -> int:
    """Count the numbers of the largest array, taking each layer by itself."""
    if a.experts is not None:
        return max(a.vocabulary * a.width, expert_count(a) // a.layers // 3)
    return max(a.vocabulary, a.mlp, a.heads * a.head_dim) * a.width


def _table_number_bytes(a: Architecture, dtype_bytes: int) -> float:
    """Return the bytes of a number of the arrays that are never quantised: tables and experts."""
    return dtype_bytes if is_quantised(a) else STORED_BYTES[a.storage]
