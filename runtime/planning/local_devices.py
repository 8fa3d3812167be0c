"""Describes the devices of this machine, and looks up those that a stage is planned for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jax
import jax.numpy as jnp

from tunelang.compiler.layout.hardware import Chip, Devices, chip_of, declared
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.models import HardwareKind, Local
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.store.atomic_files import StoreError, read_json, write_json

_MATRIX_ROWS = 1024
"""Rows of the square matrices whose product measures a CPU."""
_CPU_BANDWIDTH = 20e9
"""Bytes/s of a CPU's memory: only ranks layouts."""


class StageDevices:
    """Looks up the devices of stages: those of `override`, the stage, the run, or this machine.

    Devices of this machine are measured once, and the result is kept in the folder `cache`.
    """

    def __init__(self, program: Program, override: HardwareKind | None, cache: Path) -> None:
        self._program = program
        self._override = override
        self._cache = cache
        self._local: dict[int | None, Devices] = {}

    def of(self, stage: Training | None) -> Devices:
        """Return the devices of a training stage, or those of all other stages."""
        hardware, limit = self._hardware(stage), None
        if hardware is not None:
            devices = declared(hardware)
            if devices is not None:
                return devices
            limit = hardware.devices if isinstance(hardware, Local) else None
        if limit not in self._local:
            self._local[limit] = local_devices(self._cache, limit)
        return self._local[limit]

    def _hardware(self, stage: Training | None) -> HardwareKind | None:
        if self._override is not None:
            return self._override
        reference = (stage and stage.on) or self._program.run.on
        if reference is None:
            return None
        hardware: HardwareKind = self._program.declarations[reference.name].value
        return hardware


def local_devices(cache: Path, limit: int | None = None) -> Devices:
    """Return the devices of this machine, the first few of them if there is a limit.

    The speed of a CPU is measured once, and kept in the folder `cache`.
    """
    devices = jax.devices()[:limit]
    kind = devices[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Devices that are simulated on one CPU share its memory and its cores.
        chip = Chip(
            name=kind,
            peak=_measured_peak(cache) / len(jax.devices()),
            memory=int(0.8 * memory) // len(devices),
            bandwidth=_CPU_BANDWIDTH,
            link=_CPU_BANDWIDTH,
        )
    return Devices(chip, len(devices), True)


def _measured_peak(cache: Path) -> float:
    """Return the FLOP/s of a large matrix product in float32 on this machine."""
    path, stored = cache / "peak.json", None
    with suppress(StoreError):
        stored = read_json(path)
    if isinstance(stored, dict) and stored.get("cpus") == os.cpu_count():
        return float(stored["peak"])
    product = jax.jit(lambda a: a @ a)
    matrix = jnp.ones((_MATRIX_ROWS, _MATRIX_ROWS), jnp.float32)
    product(matrix).block_until_ready()
    seconds = min(_seconds(lambda: product(matrix).block_until_ready()) for _ in range(5))
    peak = 2 * _MATRIX_ROWS**3 / seconds
    with suppress(OSError, StoreError):  # a store that cannot be written is reported by the run
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"cpus": os.cpu_count(), "peak": peak})
    return peak


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
