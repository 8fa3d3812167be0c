"""Devices as data: what a chip computes, holds and moves; sources stand beside the figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from tunelang.dsl.vocabulary.models import TOPOLOGIES, Gpu, HardwareKind, Tpu

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    name: str
    peak: float
    """FLOP/s of dense matrix products in bfloat16 (on a CPU in float32, measured)."""
    memory: int
    """Bytes that a program can use."""
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the other devices of the mesh, in one direction."""
    cache: int | None = None
    """Bytes of activations beyond which a CPU waits for its memory; None where none counts."""

    @property
    def platform(self) -> str:
        """`cpu`, `tpu` or `gpu`."""
        if self.name not in CHIPS:
            return "cpu"
        return "tpu" if self.name in TOPOLOGIES else "gpu"


_CHIPS = (
    # Google Cloud's documentation of each; usable memory as libtpu reports it; one direction of an
    # axis of the torus (jax-ml.github.io/scaling-book/tpus).
    Chip("v4", 275e12, int(30.75 * GIB), 1228e9, 45e9),
    Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 45e9),
    Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 90e9),
    Chip("v6e", 918e12, int(31.25 * GIB), 1638e9, 90e9),
    Chip("tpu7x", 1153.5e12, int(94.75 * GIB), 3690e9, 90e9),  # a device is half a chip
    # NVIDIA's data sheets; a tenth of the memory is left to the runtime and collectives.
    Chip("a100", 312e12, int(0.9 * 79.3 * GIB), 2039e9, 300e9),
    Chip("h100", 989.5e12, int(0.9 * 79.6 * GIB), 3350e9, 450e9),
    Chip("h200", 989.5e12, int(0.9 * 140.4 * GIB), 4800e9, 450e9),
    Chip("b200", 2250e12, int(0.9 * 178.0 * GIB), 8000e9, 900e9),
)
CHIPS = MappingProxyType({chip.name: chip for chip in _CHIPS})

_KINDS = {
    "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p",
    "tpu v6 lite": "v6e", "tpu v6e": "v6e", "tpu7x": "tpu7x", "tpu v7x": "tpu7x",
}  # fmt: skip


@dataclass(frozen=True)
class Devices:
    """Devices of one kind; they need not be here."""

    chip: Chip
    count: int
    here: bool
    """Whether they are the devices of this machine."""

    def __str__(self) -> str:
        return f"{self.count} × {self.chip.name}"


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that JAX's `device_kind` names, such as `TPU v5 lite` or `NVIDIA H200`."""
    kind = device_kind.lower()
    if kind in _KINDS:
        return CHIPS[_KINDS[kind]]
    words = kind.replace("-", " ").split()
    return next((chip for name, chip in CHIPS.items() if name in words), None)


def declared(hardware: HardwareKind) -> Devices | None:
    """Return the devices that a declaration names; None for those of this machine."""
    match hardware:
        case Tpu():
            name, _, shape = hardware.topology.partition(":")
            chips = math.prod(int(size) for size in shape.split("x"))
            each = 2 if name == "tpu7x" else 1
            return Devices(CHIPS[name], chips * each * hardware.slices, False)
        case Gpu():
            return Devices(CHIPS[hardware.kind], hardware.nodes * hardware.devices, False)
    return None
