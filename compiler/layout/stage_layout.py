"""A layout: mesh, micro-batches, remat and slots of a stage, and its memory by phases of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Remat = Literal["none", "dots", "full"]
"""Rematerialisation: the backward pass computes again nothing, all but matrix products, or all."""
Kernel = Literal["xla", "cudnn", "splash"]
"""Kernels of attention."""

CHUNK = 128
"""Tokens of a sequence whose logits are in memory at once."""
OFFLOADS = ((), ("reference",), ("optimizer",), ("optimizer", "reference"))
"""Arrays that may lie in the memory of the host; the set that costs the least time first."""
_SAMPLING, _SCORING, _LOSS, _BACKWARD, _UPDATE = range(5)
"""The phases of a step: completions are sampled; judges and an offloaded reference score them; the
loss, the backward pass, and new parameters are computed."""
_ALWAYS = (_SAMPLING, _SCORING, _LOSS, _BACKWARD, _UPDATE)
_PHASES = {
    **dict.fromkeys(
        ("parameters", "optimizer", "reference", "critic", "teacher", "judges"), _ALWAYS
    ),
    "kv cache": (_SAMPLING,),
    "decoding": (_SAMPLING,),
    "judging": (_SCORING,),
    "reference in transit": (_SCORING,),
    "loss": (_SCORING, _LOSS),
    "activations": (_LOSS, _BACKWARD),
    "copies of weights": (_LOSS, _BACKWARD),
    "backward": (_BACKWARD,),
    "gradients": (_BACKWARD, _UPDATE),
    "summed gradients": (_LOSS, _BACKWARD, _UPDATE),
    "moments in transit": (_UPDATE,),
}
"""Part of the memory -> the phases of a step in which it is in the devices."""


def resident_bytes(memory: Mapping[str, int]) -> int:
    """Return the bytes in a device that stay for the whole stage."""
    return sum(size for name, size in memory.items() if _PHASES[name] is _ALWAYS)


def peak(memory: Mapping[str, int]) -> int:
    """Return the most bytes in a device at any phase of a step, from the bytes of its parts."""
    totals = [0] * len(_ALWAYS)
    for name, size in memory.items():
        for phase in _PHASES[name]:
            totals[phase] += size
    return max(totals)


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """How a stage is divided over devices and micro-batches, with what a step takes."""

    mesh: dict[str, int]
    rows: int
    """Sequences of one update, over all devices."""
    length: int
    """Tokens of a sequence, at most."""
    micro_batches: int
    remat: Remat
    kernel: Kernel = "xla"
    offload: tuple[str, ...] = ()
    """Arrays in the memory of the host: `optimizer` for its moments, `reference`."""
    slots: int | None
    """Completions that are sampled at once, over all devices; None without a rollout."""
    branches: int = 1
    """Branches of a sweep that one program trains side by side; each has `rows`."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes in each device, by part."""
    flops: float = 0.0
    """FLOPs of a step over all devices and branches, without what is computed again."""
    decode: dict[str, int] | None = None
    """Mesh of the rollout, over the same devices; None without a rollout."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of a step that would be spent on each thing by itself: computing, reading the memory,
    each exchange, and the rollout."""
    seconds: float = 0.0
    """Estimate for a step: exchanges that can be hidden behind computing are, the rest adds up."""

    @cached_property
    def total(self) -> int:
        """Bytes in each device, at most."""
        return peak(self.memory)

    @property
    def bound(self) -> str:
        """Return the cause that takes the longest in a step."""
        return max(self.times, key=self.times.__getitem__)


def shards_of(mesh: Mapping[str, int]) -> int:
    """Return how many parts the batch is split into; each may be split along the sequences too."""
    return math.prod(mesh[axis] for axis in ("data", "fsdp", "expert"))


def as_json(layout: StageLayout) -> dict[str, object]:
    """Return a layout as a plan holds it, without its memory and cost."""
    return {
        "mesh": layout.mesh,
        "rows": layout.rows,
        "length": layout.length,
        "micro_batches": layout.micro_batches,
        "remat": layout.remat,
        "kernel": layout.kernel,
        "offload": list(layout.offload),
        "slots": layout.slots,
        "decode": layout.decode,
        "branches": layout.branches,
    }
