"""Chips and devices as data: what they compute, hold and move, with the sources of the figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from tunelang.dsl.vocabulary.models import TOPOLOGIES, Gpu, HardwareKind, Local, Tpu

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
    """Bytes/s to one neighbour: along an axis of the torus, or into the switch; one direction."""
    across: float = 0.0
    """Bytes/s of a device to other slices or nodes, one direction."""
    host: float = 15e9
    """Bytes/s to and from the memory of its host, in each direction (the scaling book; PCIe)."""
    axes: int = 0
    """Axes of the torus; 0 where a switch joins the devices of a node."""
    wraps: int = 0
    """Chips along an axis that is a ring; so is an axis of a multiple of them."""
    per_chip: int = 1
    """Devices of a chip."""
    hosts: int = 8
    """Devices of a host, at most."""
    peak8: float = 0.0
    """Operations/s on 8-bit numbers."""
    efficiency: float = 0.5
    """The share of the peak that a well laid out step reaches while it computes: for v5p, v6e,
    tpu7x, h100 and h200 fitted to published runs (`benchmarks/plan_accuracy.py`), else assumed."""
    source: str = "measured here"
    """Where the figures come from."""
    vmem: int = 0
    """Bytes of a TPU core's vector memory, in which compilers keep what is small and soon used (as
    Pallas has it)."""
    cache: int | None = None
    """Bytes of activations beyond which a CPU waits for its memory; None where none counts."""

    @property
    def platform(self) -> str:
        """`cpu`, `tpu` or `gpu`."""
        if self.name not in CHIPS:
            return "cpu"
        return "tpu" if self.axes else "gpu"


_CLOUD = "Google Cloud's documentation; memory as libtpu reports it; links from the scaling book"
_SHEET = "NVIDIA's data sheet; a tenth of the memory is left to the runtime and collectives"


def _tpu(
    name: str,
    peak: float,
    memory: float,
    bandwidth: float,
    link: float,
    axes: int,
    vmem: int,
    *,
    across: float,
    efficiency: float,
    peak8: float,
    host: float = Chip.host,
    per_chip: int = 1,
) -> Chip:
    wraps = 16 if axes == 2 else 4
    return Chip(
        name, peak, int(memory * GIB), bandwidth, link, axes=axes, wraps=wraps,
        hosts=8 if axes == 2 else 4, source=_CLOUD, vmem=vmem << 20, across=across,
        efficiency=efficiency, peak8=peak8, host=host, per_chip=per_chip,
    )  # fmt: skip


def _gpu(
    name: str,
    peak: float,
    memory: float,
    bandwidth: float,
    link: float,
    *,
    efficiency: float,
    peak8: float,
    host: float,
) -> Chip:
    usable = int(0.9 * memory * GIB)
    return Chip(
        name, peak, usable, bandwidth, link, across=50e9, source=_SHEET,
        efficiency=efficiency, peak8=peak8, host=host,
    )  # fmt: skip


_CHIPS = (
    _tpu("v4", 275e12, 30.75, 1228e9, 45e9, 3, 16,
         peak8=275e12, across=3.1e9, efficiency=0.6),
    _tpu("v5e", 197e12, 15.75, 819e9, 45e9, 2, 128,
         peak8=394e12, across=3.1e9, efficiency=0.6),
    _tpu("v5p", 459e12, 95.74, 2765e9, 90e9, 3, 64,
         peak8=918e12, across=6.2e9, efficiency=0.7),
    _tpu("v6e", 918e12, 31.25, 1638e9, 90e9, 2, 128,
         peak8=1836e12, across=12.5e9, efficiency=0.55, host=32e9),
    # A device is half a chip.
    _tpu(
        "tpu7x", 1153.5e12, 94.75, 3690e9, 45e9, 3, 64, peak8=2307e12, across=6.2e9,
        per_chip=2, efficiency=0.68,
    ),
    _gpu("a100", 312e12, 79.3, 2039e9, 300e9, peak8=624e12, efficiency=0.6, host=25e9),
    _gpu("h100", 989.5e12, 79.6, 3350e9, 450e9, peak8=1979e12, efficiency=0.58, host=55e9),
    _gpu("h200", 989.5e12, 140.4, 4800e9, 450e9, peak8=1979e12, efficiency=0.58, host=55e9),
    _gpu("b200", 2250e12, 178.0, 8000e9, 900e9, peak8=4500e12, efficiency=0.5, host=55e9),
)  # fmt: skip
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
    """Whether they are in this machine."""
    shape: tuple[int, ...] = ()
    """Chips along each axis of a TPU slice; empty for GPUs and CPUs."""
    groups: int = 1
    """Slices, or nodes."""
    price: float | None = None
    """Price of a device for an hour."""

    def __str__(self) -> str:
        return f"{self.count} × {self.chip.name}"

    def bandwidth(self, size: int, stride: int) -> float:
        """Return the bytes/s of a device in a ring collective over a mesh axis of `size`, whose
        neighbours are `stride` devices apart.

        A ring of a torus sends both ways (the scaling book, chapter on sharding); an axis as long
        as the whole slice has all of its links, another those of one axis. Beyond a slice or node
        it is as fast as the network between them.
        """
        group = self.count // self.groups
        if self.groups > 1 and size * stride > group:
            return self.chip.across
        if not self.chip.axes:
            return self.chip.link
        longest = max(self.shape, default=1)
        dimensions = [d for d in self.shape if d > 1] or [1]
        used = dimensions if size * stride >= group and stride == 1 else [longest]
        return sum(self.chip.link * (2 if d % self.chip.wraps == 0 else 1) for d in used)


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that JAX's `device_kind` names, such as `TPU v5 lite` or `NVIDIA H200`."""
    kind = device_kind.lower()
    if kind in _KINDS:
        return CHIPS[_KINDS[kind]]
    words = kind.replace("-", " ").split()
    return next((chip for name, chip in CHIPS.items() if name in words), None)


def named(text: str) -> HardwareKind:
    """Return the hardware that a short form names: `v5e:4x4`, a TPU slice; `h200:8`, the GPUs of a
    node; `h200:4x8`, nodes and GPUs of each; `local`.

    Raises `ValueError` with the valid forms.
    """
    name, _, shape = text.partition(":")
    sizes = [int(size) for size in shape.split("x") if size.isdigit()]
    if text == "local":
        return Local.unvalidated()
    if name in TOPOLOGIES:
        if shape in TOPOLOGIES[name]:
            return Tpu.unvalidated(topology=text)
        raise ValueError(f"`{name}` has the shapes {', '.join(TOPOLOGIES[name])}")
    if name in CHIPS:
        if shape == "x".join(map(str, sizes)) and len(sizes) in (1, 2) and min(sizes) > 0:
            return Gpu.unvalidated(kind=name, nodes=sizes[0] if sizes[1:] else 1, devices=sizes[-1])
        raise ValueError(f"how many? `{name}:8`, or nodes and devices of each: `{name}:4x8`")
    raise ValueError(f"there is {', '.join(CHIPS)} and `local`, as in `v5e:4x4` or `h200:8`")


def declared(hardware: HardwareKind) -> Devices | None:
    """Return the devices that a declaration names; None for those of this machine."""
    price = hardware.price
    match hardware:
        case Tpu():
            name, _, shape = hardware.topology.partition(":")
            sizes = tuple(int(size) for size in shape.split("x"))
            count = math.prod(sizes) * CHIPS[name].per_chip * hardware.slices
            return Devices(CHIPS[name], count, False, sizes, hardware.slices, price)
        case Gpu():
            count = hardware.nodes * hardware.devices
            return Devices(CHIPS[hardware.kind], count, False, (), hardware.nodes, price)
    return None
