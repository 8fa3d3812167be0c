"""Rehearsal: a stage's own programs, compiled for hardware that need not be here.

What is compiled is what a run would compile (`abstract_programs.py`). The compiler says what memory
a program takes, and refuses what cannot be; nothing runs.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.layout_query import DoesNotFitError
from tunelang.compiler.layout.layout_search import best_layout, unpinned
from tunelang.compiler.layout.plan_layouts import Shapes
from tunelang.compiler.layout.remedies import remedies as remedies_of
from tunelang.compiler.layout.stage_layout import StageLayout, shards_of
from tunelang.compiler.layout.sweep_fusion import at_unit_rate
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.messages.human_units import size_text
from tunelang.dsl.vocabulary.rewards import EvalKind
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.planning.prepare import Prepared
from tunelang.runtime.rehearsal.collectives import exchanged, wasteful
from tunelang.runtime.rehearsal.topologies import compilable
from tunelang.runtime.sharding import OPTIONS, Layout, is_variable, make_layout
from tunelang.runtime.stages.abstract_programs import (
    AbstractProgram,
    abstract_params,
    device_bytes,
    eval_programs,
    stage_eval_programs,
)
from tunelang.runtime.stages.base import TaskKind, kind_of
from tunelang.runtime.store.atomic_files import read_json, write_json
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.user_functions import bound

STEP = ("train", "score", "reference", "prefill", "decode")
"""The programs of a step."""
_NOT_COMPILED = ("from_", "data", "seed", "length", "reward")
"""What branches may differ in and still have the same programs."""
_FORMAT = "2"
"""Of what is kept of a compilation."""
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt")
"""Packages of which another version may compile otherwise."""
_TRIES = 3
"""Layouts that are compiled to find one that fits."""


@dataclass(frozen=True)
class Rehearsed:
    """What the compiler says of one program."""

    name: str
    """`train`, `score`, `prefill`, `decode`, `reference`; of an eval with its name in front."""
    peak: int
    """Bytes in a device while it runs, with what else the stage holds there."""
    seconds: float
    """Compiling took."""
    exchanged: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Collective -> how many there are in a call, and their bytes in each device."""
    findings: tuple[str, ...] = ()
    """What should not be."""
    refused: str = ""
    """Why the compiler would not: the program needs more memory than there is."""


def rehearse(prepared: Prepared, node: str, cache: Path) -> Iterator[Rehearsed]:
    """Compile the programs of a stage, one after another.

    What was compiled before is read from `cache`. Raises `MissingExtraError` where the compiler
    for the hardware is not installed, and `CustomError`.
    """
    stage, devices = prepared.graph.nodes[node].value, prepared.devices[node]
    there = compilable(devices)
    references = getattr(stage, "evals", ())
    evals = {each.name: prepared.program.declarations[each.name].value for each in references}
    if not isinstance(stage, Training):
        layout = make_layout(fsdp=len(there), devices=there)
        models = prepared.measured[node]
        for shapes in models:
            which = f"{shapes.architecture.width} × {shapes.architecture.layers} "
            for program in _task_programs(stage, evals, shapes, layout):
                name = program.name if len(models) == 1 else which + program.name
                yield _compiled(replace(program, name=name), devices, cache)
        return
    stage = bound(stage, prepared.program.folder)
    planned, shapes = prepared.layout(node), prepared.shapes[node]
    layout = make_layout(**planned.mesh, devices=there)
    copied = tuple(unsplit(shapes.architecture, layout))
    stage_bytes = 0
    for program in kind_of(stage).abstract_programs(stage, shapes, planned, layout):
        compiled = _compiled(program, devices, cache)
        stage_bytes = max(stage_bytes, program.stage_bytes)
        if program.name == "train":
            compiled = replace(compiled, findings=compiled.findings + copied)
        yield compiled
    for program in stage_eval_programs(stage, evals, shapes, planned, layout, stage_bytes):
        yield _compiled(program, devices, cache)


def _task_programs(
    stage: object, evals: Mapping[str, EvalKind], shapes: Shapes, layout: Layout
) -> Iterator[AbstractProgram]:
    """Yield the programs of a stage that samples from a model or measures it."""
    kind: TaskKind[Any] = kind_of(stage)
    yield from kind.abstract_programs(stage, shapes, layout)
    a, dtype = shapes.architecture, DTYPES[shapes.dtype]
    params = abstract_params(a, StepConfig(layout=layout, dtype=dtype))
    resident_bytes = kind.resident_models(stage) * device_bytes(params)
    yield from eval_programs(evals, a, dtype, params, layout, resident_bytes)


def identity(prepared: Prepared, node: str) -> tuple[object, ...]:
    """Return what the programs of a node depend on: branches of a sweep over numbers share them."""
    stage = prepared.graph.nodes[node].value
    if not isinstance(stage, Training):
        return (node,)
    unit = stage.model_copy(update={"optimizer": at_unit_rate(stage.optimizer)})
    told = ((name, str(value)) for name, value in unit if name not in _NOT_COMPILED)
    where = str(prepared.layout(node)), prepared.shapes[node], prepared.devices[node]
    return type(stage), *told, *where


def fits(prepared: Prepared, node: str, found: Rehearsed) -> bool:
    """Whether a program of a stage fits into the memory of a device."""
    return not found.refused and found.peak <= prepared.devices[node].chip.memory


def remedies(prepared: Prepared, node: str, found: Rehearsed, cache: Path) -> Iterator[str]:
    """Say what would make a stage fit of which a program does not: another layout, compiled as
    well; or what `search.remedies` gives, by the estimate.
    """
    stage = prepared.graph.nodes[node].value
    if not isinstance(stage, Training) or found.name not in STEP:
        yield f"more devices than the {prepared.devices[node]}"
        return
    shapes = prepared.shapes[node]
    stage = bound(unpinned(stage), prepared.program.folder)
    devices, planned = prepared.devices[node], prepared.layout(node)
    query = replace(
        prepared.queries[node], stage=stage, attention=planned.kernel, branches=planned.branches
    )
    budget = devices.chip.memory
    worst = max(found.peak, budget + 1)
    for _ in range(_TRIES):
        budget = int(budget * min(0.95, planned.total / worst))
        try:
            smaller = replace(devices, chip=replace(devices.chip, memory=budget))
            layout = best_layout(replace(query, devices=smaller))
        except DoesNotFitError:
            break
        mesh = make_layout(**layout.mesh, devices=compilable(devices))
        programs = kind_of(stage).abstract_programs(stage, shapes, layout, mesh)
        made = [_compiled(program, devices, cache) for program in programs]
        worst = max(each.peak for each in made)
        if all(not each.refused and each.peak <= devices.chip.memory for each in made):
            yield f"{_pinned(layout)}: {size_text(worst)}, as the compiler says"
            return
    for what, size in remedies_of(replace(query, devices=smaller)):
        yield f"{what}: {size_text(size)}, by the estimate"


def _pinned(layout: StageLayout) -> str:
    axes = ", ".join(f"{axis} = {size}" for axis, size in layout.mesh.items() if size > 1)
    local = layout.rows // shards_of(layout.mesh) // layout.micro_batches
    return f"`mesh = axes({axes})`, `micro_batch = {local} sequences`, `remat = {layout.remat}`"


# Compiling.


def _compiled(program: AbstractProgram, devices: Devices, cache: Path) -> Rehearsed:
    lowered = program.lower()
    text = lowered.as_text()
    by = [_FORMAT, str(OPTIONS)]
    for name in _COMPILERS:
        with suppress(PackageNotFoundError):
            by.append(version(name))
    key = "\n".join([str(devices), str(devices.shape), *by, text])
    path = cache / f"rehearsal-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    found = read_json(path) if path.exists() else None
    if found is None:
        found = asdict(measure(program, lowered))
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    held = Rehearsed(
        **{
            **found,
            "findings": tuple(found["findings"]),
            "exchanged": {name: tuple(each) for name, each in found["exchanged"].items()},
        }
    )
    return replace(held, name=program.name, peak=held.peak + program.resident_bytes)


def measure(program: AbstractProgram, lowered: jax.stages.Lowered) -> Rehearsed:
    """Compile a program and look at it."""
    name, donated = program.name, program.donated
    begun = time.monotonic()
    try:
        with warnings.catch_warnings():
            # What was compiled for devices that are not here is not read from JAX's own cache.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            done = lowered.compile()
    except Exception as error:
        refused = _refusal(str(error))
        if refused is None:
            raise
        needed, why = refused
        return Rehearsed(name, needed, time.monotonic() - begun, refused=why)
    seconds = time.monotonic() - begun
    memory: Any = done.memory_analysis()
    peak = int(getattr(memory, "peak_memory_in_bytes", 0) or 0)
    peak -= int(memory.host_argument_size_in_bytes)  # which compilers for TPUs count
    if peak <= 0 or program.offloaded:
        peak = int(memory.argument_size_in_bytes + memory.temp_size_in_bytes) - program.offloaded
    findings = []
    kept = donated - int(memory.alias_size_in_bytes) - int(memory.host_alias_size_in_bytes)
    if kept > max(2**20, donated // 50):
        findings.append(f"{kept:,} bytes of state are not donated: they are there twice")
    said = done.as_text() or ""
    if program.trained is not None:
        findings += wasteful(said, program.trained, program.micro_batches)
    return Rehearsed(name, peak, seconds, exchanged(said), tuple(findings))


_NEEDED = re.compile(
    r"(?:Used|total memory required[^(]*\(?|allocat\w* )\s*([\d.]+)\s*([KMGT]?)i?B?", re.IGNORECASE
)


def _refusal(text: str) -> tuple[int, str] | None:
    """Return the bytes that a program needs by the compiler's own words, and these words; None
    where it failed for another reason.
    """
    lower = text.lower()
    if "resource_exhausted" not in lower and "out of memory" not in lower:
        return None
    line = next((each for each in text.splitlines() if "memory" in each.lower()), text)
    found = _NEEDED.search(line)
    needed = 0
    if found is not None:
        needed = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    return needed, line.strip()[:200]


def unsplit(architecture: Architecture, layout: Layout) -> Sequence[str]:
    """Name the axes of parameters that the mesh should split and does not divide."""
    config = StepConfig(layout=layout)
    found: dict[str, None] = {}
    for node in jax.tree.leaves(abstract_params(architecture, config), is_leaf=is_variable):
        if not is_variable(node):
            continue
        for name, size in zip(node.get_metadata("out_sharding"), node.shape, strict=True):
            over = [x for x in layout.rules.get(name, ()) if layout.mesh.shape.get(x, 1) > 1]
            ways = math.prod(layout.mesh.shape[axis] for axis in over)
            if size % ways:
                found[f"`{name}` of {size} is copied: {ways} do not divide it"] = None
    return list(found)
