"""A layout: mesh, micro-batches, remat, slots of a stage; and why there may be none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunelang.compiler.hardware import Devices

CHUNK = 128
"""Tokens of a sequence whose logits are in memory at once."""
OFFLOADS: tuple[tuple[str, ...], ...] = (
    (),
    ("reference",),
    ("optimizer",),
    ("optimizer", "reference"),
)
"""What may lie in the memory of the host, what costs the least time first."""
_HELD = ("parameters", "optimizer", "reference", "critic", "teacher", "judges")
"""Parts of the memory that stay for the whole stage."""
_ROLLOUT = ("kv cache", "decoding")
"""Parts that are there while completions are sampled; all others are of the update."""
_LOSS = ("loss",)
_BACKWARD = ("backward", "gradients")
"""Parts of an update of which the first are gone before the others come."""
_STREAMED = ("moments in transit",)
"""What is there while parameters are updated, beside gradients."""
_SCORING = ("reference in transit", "judging")
"""What is there while an offloaded reference and judges score completions."""


def held(memory: Mapping[str, int]) -> int:
    """Return the bytes in a device that stay for the whole stage."""
    return sum(memory.get(name, 0) for name in _HELD)


def peak(memory: Mapping[str, int]) -> int:
    """Return the most bytes in a device, from its parts: a rollout, scores by judges and by an
    offloaded reference, and an update come in turn, and in an update the loss, the backward pass
    and, where its moments are offloaded, what the optimizer does.
    """

    def of(names: tuple[str, ...]) -> int:
        return sum(memory.get(name, 0) for name in names)

    kept, rollout, turns = held(memory), of(_ROLLOUT), (of(_LOSS), of(_BACKWARD))
    streamed, scoring = of(_STREAMED), of(_SCORING)
    through = sum(memory.values()) - kept - rollout - sum(turns) - streamed - scoring
    if streamed:
        streamed += memory["gradients"] + memory.get("summed gradients", 0)
    if scoring:
        scoring += of(_LOSS)
    return kept + max(rollout, scoring, streamed, through + max(turns))


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """Where and in which parts a stage runs."""

    mesh: dict[str, int]
    rows: int
    """Sequences of one update, over all devices."""
    length: int
    """Tokens of a sequence, at most."""
    micro_batches: int
    remat: str
    kernel: str = "xla"
    """Of attention."""
    offload: tuple[str, ...] = ()
    """What lies in the memory of the host: the moments of the optimizer, the reference."""
    slots: int | None
    """Completions that are sampled at once, over all devices; None without a rollout."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes in each device, by part."""
    flops: float = 0.0
    """Of a step, over all devices: what has to be computed."""
    decode: dict[str, int] | None = None
    """Mesh of the rollout, over the same devices; None without a rollout."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of a step that would be spent on each thing by itself: computing, reading the memory,
    each exchange, and the rollout."""
    seconds: float = 0.0
    """Estimate for a step: exchanges that can be hidden behind computing are, the rest adds up."""

    @property
    def total(self) -> int:
        """Bytes in each device, at most."""
        return peak(self.memory)

    @property
    def bound(self) -> str:
        """What takes longest in a step."""
        return max(self.times, key=self.times.__getitem__)


class DoesNotFitError(Exception):
    """No layout fits; `nearest` is the one that needs the least memory, `devices` what it is for,
    `pinned` what the spec itself decides.
    """

    def __init__(self, nearest: StageLayout, devices: Devices, pinned: tuple[str, ...]) -> None:
        super().__init__(f"needs {nearest.total} bytes of {devices.chip.memory}")
        self.nearest = nearest
        self.devices = devices
        self.pinned = pinned


class NoLayoutError(Exception):
    """A pinned mesh or micro-batch contradicts the devices or the batch; `why` in words."""

    def __init__(self, attribute: str, why: str) -> None:
        super().__init__(attribute, why)
        self.attribute = attribute
        self.why = why


def shards_of(mesh: Mapping[str, int]) -> int:
    """Return how many parts the batch is split into; each may be split along the sequences too."""
    return math.prod(mesh[axis] for axis in ("data", "fsdp", "expert"))


def plain(layout: StageLayout) -> dict[str, Any]:
    """Return the layout's own part as JSON; memory and cost stand apart in a plan."""
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
    }
