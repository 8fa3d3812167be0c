"""The meshes that a stage may use on its devices."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.layout_query import LayoutQuery, NoLayoutError
from tunelang.dsl.vocabulary.stages import Training

AXES = ("data", "fsdp", "expert", "context", "tensor")

Mesh = dict[str, int]
"""Axis -> its size."""


def mesh_of(stage: Training) -> Mesh:
    """Return the mesh that the spec pins."""
    assert stage.mesh is not None
    return {name: getattr(stage.mesh, name) for name in AXES}


def legal_meshes(query: LayoutQuery, most_parts: int) -> Iterator[Mesh]:
    """Give the meshes that are legal for some batch, those of the most devices first.

    Meshes that split sequences, into `most_parts` at most, follow the others of as many devices.
    Raises `NoLayoutError` where the spec pins a mesh that cannot be.
    """
    a, count = query.architecture, query.devices.count
    experts = 1 if a.experts is None else a.experts.count
    splits_sequences = cost_of(query.stage).splits_sequences and experts == 1
    if query.stage.mesh is not None:
        yield _pinned_mesh(query, experts, splits_sequences)
        return
    # Fewer devices than there are, where the batch does not divide over all.
    for used in (n for n in range(count, 0, -1) if count % n == 0):
        yield from _batch_meshes(used, experts)
        if splits_sequences:
            yield from _context_meshes(used, most_parts)


def refuse_idle_devices(query: LayoutQuery) -> None:
    """Raise `NoLayoutError` where a pinned mesh leaves devices of a slice or node idle."""
    devices = query.devices
    if query.stage.mesh is None or devices.here:
        return
    size = math.prod(mesh_of(query.stage).values())
    if size < devices.count:
        raise NoLayoutError("mesh", f"this mesh is for {size} devices, and there are {devices}")


def _pinned_mesh(query: LayoutQuery, experts: int, splits_sequences: bool) -> Mesh:
    mesh, count = mesh_of(query.stage), query.devices.count
    if mesh["context"] > 1 and not splits_sequences:
        splits = cost_of(query.stage).splits_sequences
        whose = "models with experts" if splits else "completions"
        raise NoLayoutError("mesh", f"the axis `context` is not for {whose}")
    if mesh["expert"] > 1 and experts % mesh["expert"]:
        raise NoLayoutError(
            "mesh", f"{mesh['expert']} do not divide the {experts} experts of the model"
        )
    if math.prod(mesh.values()) > count:
        need = " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
        raise NoLayoutError("mesh", f"{need} need more than the {count} devices that there are")
    return mesh


def _batch_meshes(used: int, experts: int) -> Iterator[Mesh]:
    """Give the meshes of `used` devices that split the batch and the model."""
    for tensor in (n for n in (1, 2, 4, 8, 16) if used % n == 0):
        replicas = used // tensor
        for expert in _divisors(replicas, min(replicas, experts)):
            shards = replicas // expert
            for fsdp in _divisors(shards, shards):
                yield _mesh(shards // fsdp, fsdp, expert, 1, tensor)


def _context_meshes(used: int, most_parts: int) -> Iterator[Mesh]:
    """Give the meshes of `used` devices that split sequences."""
    for context in (n for n in (2, 4, 8, 16, 32, 64) if used % n == 0 and n <= most_parts):
        for tensor in (n for n in (1, 2, 4, 8) if used // context % n == 0):
            shards = used // context // tensor
            for fsdp in _divisors(shards, shards):
                yield _mesh(shards // fsdp, fsdp, 1, context, tensor)


def _divisors(number: int, most: int) -> Iterator[int]:
    return (n for n in range(1, most + 1) if number % n == 0)


def _mesh(*sizes: int) -> Mesh:
    return dict(zip(AXES, sizes, strict=True))
