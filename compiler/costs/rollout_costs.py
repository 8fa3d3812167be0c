"""How completions are sampled: the decode mesh, the slots, and the seconds that they take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from tunelang.compiler.costs.exchanges import LATENCY
from tunelang.compiler.costs.model_sizes import (
    ModelSizes,
    is_quantised,
    key_shards,
    model_sizes,
    stored_bytes,
)
from tunelang.compiler.costs.stage_costs import RolloutRequest
from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.layout_query import LayoutQuery, NoLayoutError
from tunelang.compiler.layout.stage_layout import StageLayout, resident_bytes
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count

MOST_SLOTS = 256
"""Completions that a group of devices samples at once, at most."""
_TENSOR_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Rollout:
    """How completions are sampled."""

    decode: dict[str, int]
    slots: int
    memory: dict[str, int]
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes in each device."""
        return sum(self.memory.values())


def with_rollout(layout: StageLayout, query: LayoutQuery, request: RolloutRequest) -> StageLayout:
    """Add to a layout the fastest rollout over the devices of the update.

    Raises `NoLayoutError` where the spec pins a decode mesh that cannot be.
    """
    count = math.prod(layout.mesh.values())
    free = query.devices.chip.memory - resident_bytes(layout.memory)
    rollout = _best_rollout(
        query.architecture, query.dtype_bytes, query.devices, request, layout.length, count, free
    )
    if rollout is None:
        raise NoLayoutError("decode_mesh", f"it has to divide the {count} devices and the heads")
    return replace(
        layout,
        memory=layout.memory | rollout.memory,
        slots=rollout.slots,
        decode=rollout.decode,
        times={**layout.times, "rollout": rollout.seconds},
        seconds=layout.seconds + rollout.seconds,
    )


def sampling_tensor(a: Architecture, dtype_bytes: int, count: int, memory: int) -> int:
    """Return into how many parts matrices are split where `count` devices sample for an evaluation:
    the fewest with which the weights, and those that are copied ahead of the loop, take a quarter
    of a device's memory at most; else the most there can be.
    """
    ways = list(_tensor_sizes(a, count))
    size = stored_bytes(a, dtype_bytes) + dtype_bytes * parameter_count(a)
    return next((n for n in ways if size <= n * memory // 4), ways[-1])


def sampling_seconds(
    a: Architecture,
    sizes: ModelSizes,
    length: int,
    tensor: int,
    local: int,
    request: RolloutRequest,
    slots: int,
    devices: Devices,
) -> float:
    """Estimate the seconds of sampling with `local` slots in a group of `tensor` devices.

    Each decode step reads the weights and half a full cache, or computes a token in every slot,
    whichever takes longer; and sums activations over the group.
    """
    chip = devices.chip
    steps = -(-request.completions // slots) * request.max_tokens
    computing = sizes.forward_flops * local / (tensor * chip.peak * chip.efficiency)
    cache = sizes.cache_bytes * length / 2 * local
    reading = sizes.dtype_bytes * sizes.parameters / tensor + cache / key_shards(a, tensor)
    reading /= chip.bandwidth
    step = max(computing, reading)
    if tensor > 1:
        moved = 2 * a.layers * local * a.width * sizes.dtype_bytes * 2 * (tensor - 1) / tensor
        step += moved / devices.bandwidth(tensor, 1) + 2 * a.layers * LATENCY
    return steps * step


@lru_cache(maxsize=4096)
def _best_rollout(
    a: Architecture,
    dtype_bytes: int,
    devices: Devices,
    request: RolloutRequest,
    length: int,
    count: int,
    free: int,
) -> Rollout | None:
    """Return the fastest rollout on `count` devices with `free` bytes each, or the smallest.

    Each group of devices that samples together holds all weights, so that no step gathers them;
    many small groups are faster than one large one, as long as they hold weights and cache.
    """
    sizes = model_sizes(a, dtype_bytes, length)
    rollouts: list[Rollout] = []
    for tensor in _tensor_sizes(a, count):
        data = count // tensor
        if request.decode_mesh in (None, (data, tensor)):
            rollouts.append(_rollout(a, sizes, devices, request, length, data, tensor, free))
    fitting = [rollout for rollout in rollouts if rollout.bytes <= free]
    if fitting:
        return min(fitting, key=lambda rollout: rollout.seconds)
    return min(rollouts, key=lambda rollout: rollout.bytes, default=None)


def _rollout(
    a: Architecture,
    sizes: ModelSizes,
    devices: Devices,
    request: RolloutRequest,
    length: int,
    data: int,
    tensor: int,
    free: int,
) -> Rollout:
    """Return the rollout on `data` groups of `tensor` devices with the most slots that fit."""
    weights = sizes.stored_bytes // tensor if data * tensor > 1 else 0
    if not is_quantised(a) and (devices.chip.cache is not None or sizes.dtype_bytes < 4):
        weights += sizes.dtype_bytes * sizes.parameters // tensor  # copied ahead of the loop
    slots = min(MOST_SLOTS * data, 1 << (request.completions - 1).bit_length())
    slots = request.slots or slots
    while True:  # more at once are faster, as long as there is room for them
        local = -(-slots // data)
        memory = {"kv cache": sizes.cache_bytes * length * local // key_shards(a, tensor)}
        if weights:
            memory["decoding"] = weights
        if sum(memory.values()) <= free or request.slots or slots <= data:
            break
        slots //= 2
    seconds = sampling_seconds(a, sizes, length, tensor, local, request, slots, devices)
    return Rollout({"data": data, "tensor": tensor}, slots, memory, seconds)


def _tensor_sizes(a: Architecture, count: int) -> Iterator[int]:
    """Give the sizes of the axis `tensor` that divide the devices and the heads."""
    return (n for n in _TENSOR_SIZES if count % n == 0 and a.heads % n == 0)
