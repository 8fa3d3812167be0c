"""The places of arrays: a table from logical axes to mesh axes, and nothing else.

Every parameter and every large activation names its axes (`embed`, `heads`, `batch`, ...). The
table says over which mesh axes each is split. Mesh axes are Auto: the compiler derives the rest
from the constraints at block boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")

RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch": ("data", "fsdp", "expert"),
        "shared": ("data", "expert"),
        "length": ("context",),
        "part": ("data", "fsdp", "expert", "context"),
        "expert": ("expert",),
        "embed": ("fsdp", "context"),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
    }
)
"""Logical axis -> mesh axes; an axis that is not in the table is not split.

Parameters are split over `embed` (fully sharded data parallelism), over heads, hidden units and
vocabulary (tensor parallelism), and those of experts over them; each device has copies of the
others. The residual stream names its last axis nothing, since `embed` belongs to parameters: a
device has all of it for a token. Along `context` sequences are split too (context parallelism):
each token stays on one device, and attention gathers the keys and values. A `part` is one device's
share of both.
"""

DECODE_RULES: Mapping[str, tuple[str, ...]] = MappingProxyType({**RULES, "embed": (), "length": ()})
"""The rules for sampling: each tensor group has all weights, since a round of the loop is too short
to gather them.
"""

OPTIONS: Mapping[str, Mapping[str, bool | int | str]] = MappingProxyType(
    {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}}
)
"""Options of the compilers, by platform.

XLA for TPUs makes a product with a matrix that is split along its contracted axis in rounds, each
of which reads and writes the entire result. Gathering the matrix first takes 5.0e9 cycles of a step
of llama-3.1-8b on 8 v5p instead of 8.7e9 (2026-11, `python benchmarks/inside.py`, "Gathering before
products on TPUs" in benchmarks/RESULTS.md), and MaxText's recipes have it so. Delete when
`inside.py --options '{}'` shows no more cycles.
"""

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules by which logical axes are split over it."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: RULES)

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(sorted(self.rules.items()))))

    def spec(self, axes: Axes, shape: Sequence[int]) -> PartitionSpec:
        """Return the partition of an array with these logical axes.

        A dimension that the mesh axes do not divide is not split: one key head shared by
        eight-way tensor parallelism is copied, as every implementation of it does.
        """
        if len(axes) != len(shape):
            raise ValueError(f"axes {axes} for an array of shape {tuple(shape)}")
        parts: list[tuple[str, ...] | None] = []
        for name, size in zip(axes, shape, strict=True):
            over = self.rules.get(name, ()) if name is not None else ()
            used = tuple(axis for axis in over if self.mesh.shape.get(axis, 1) > 1)
            divides = size % math.prod(self.mesh.shape[axis] for axis in used) == 0
            parts.append(used if used and divides else None)
        return PartitionSpec(*parts)

    def sharding(self, axes: Axes, shape: Sequence[int]) -> NamedSharding:
        """Return the sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, array: jax.Array, axes: Axes) -> jax.Array:
        """Tell the compiler where an array inside a program lies."""
        place = self.sharding(axes, array.shape)
        placed: jax.Array = jax.lax.with_sharding_constraint(array, place)
        return placed

    @property
    def batch_shards(self) -> int:
        """The number of parts that the batch is split into."""
        return math.prod(self.mesh.shape.get(axis, 1) for axis in self.rules.get("batch", ()))

    def length_shards(self, length: int) -> int:
        """Return how many parts sequences of so many tokens are split into.

        1 where the devices do not divide the tokens.
        """
        shards = math.prod(self.mesh.shape.get(axis, 1) for axis in self.rules.get("length", ()))
        return shards if length % shards == 0 else 1


def make_layout(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """Make a layout with the standard rules over a mesh with axes of these sizes.

    Takes the first of `devices`, by default of all. Raises `ValueError` where they are too few.
    """
    count = data * fsdp * expert * context * tensor
    chosen = list(jax.devices() if devices is None else devices)[:count]
    if len(chosen) < count:
        raise ValueError(f"a mesh of {count} devices, and there are {len(chosen)}")
    grid = np.array(chosen).reshape(data, fsdp, expert, context, tensor)
    return Layout(Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)))


def platform(layout: Layout | None) -> str:
    """Return what kind of devices a layout is over: `cpu`, `gpu`, `tpu`."""
    devices = jax.devices() if layout is None else layout.mesh.devices.flat
    name: str = next(iter(devices)).platform
    return name


def jit(function: Callable[..., Any], layout: Layout | None, **options: Any) -> jax.stages.Wrapped:
    """Jit a function with the `OPTIONS` of the compiler for a layout's devices.

    The result cannot be part of another program.
    """
    return jax.jit(function, compiler_options=dict(OPTIONS.get(platform(layout), {})), **options)


def constrain(layout: Layout | None, array: jax.Array, axes: Axes) -> jax.Array:
    """Tell the compiler where an array inside a program lies, if there is a layout."""
    return array if layout is None else layout.constrain(array, axes)


def is_variable(node: object) -> bool:
    """Whether a node of a tree is a parameter with its axis names, rather than a plain array."""
    return isinstance(node, nnx.Variable)


def logical_axes(variable: nnx.Variable[jax.Array]) -> Axes:
    """Return the logical axes of a parameter, one name for each dimension."""
    axes: Axes = variable.get_metadata("out_sharding")
    return axes


def reshard_for_decoding(params: PyTree, layout: Layout | None) -> PyTree:
    """Copy parameters to a decode layout; under a training layout they stay where they are."""
    if layout is None or layout.rules is not DECODE_RULES:
        return params
    return jax.device_put(params, shardings(params, layout))


def on_devices(params: PyTree) -> PyTree:
    """Move parameters that may lie in the memory of the host to the memory of their devices."""

    def move(array: jax.Array) -> jax.Array:
        moved: jax.Array = jax.device_put(array, array.sharding.with_memory_kind("device"))
        return moved

    return jax.tree.map(move, params)


def remesh_for_decoding(layout: Layout, data: int, tensor: int) -> Layout:
    """Return the layout for sampling over the devices of another one."""
    devices = list(layout.mesh.devices.flat)
    return Layout(make_layout(data, tensor=tensor, devices=devices).mesh, DECODE_RULES)


HOST = "pinned_host"
"""The kind of memory of offloaded arrays."""


def shardings(tree: PyTree, layout: Layout, memory: str | None = None) -> PyTree:
    """Return the shardings of a tree of parameters, or of an optimizer's state made from them.

    Returns a tree of the same structure. Moments keep the axis names of their parameters, so they
    lie where these do, in a kind of `memory`; plain arrays (step counts) have a copy
    on every device.
    """

    def place(node: PyTree) -> PyTree:
        if is_variable(node):
            array = node.get_value()
            # Where a rule leaves a parameter to another one, its state has an empty node.
            if not hasattr(array, "shape"):
                return node
            sharding = layout.sharding(logical_axes(node), array.shape)
            if memory is not None:
                sharding = sharding.with_memory_kind(memory)
            return node.replace(sharding)
        return NamedSharding(layout.mesh, PartitionSpec())

    return jax.tree.map(place, tree, is_leaf=is_variable)
