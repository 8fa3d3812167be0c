"""Compiles the programs of a stage for hardware that this machine need not have.

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
from tunelang.compiler.layout.stage_layout import StageLayout, shards_of
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.search.layout_search import best_layout, unpinned
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.compiler.search.remedies import remedies as remedies_of
from tunelang.compiler.search.sweep_fusion import at_unit_rate
from tunelang.dsl.messages.human_units import size_text
from tunelang.dsl.vocabulary.rewards import EvalKind
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.planning.prepare import Prepared
from tunelang.runtime.rehearsal.collectives import count_collectives, needless_gathers
from tunelang.runtime.rehearsal.topologies import compilable
from tunelang.runtime.sharding import OPTIONS, Layout, is_variable, make_layout
from tunelang.runtime.stages.abstract_programs import (
    AbstractProgram,
    abstract_params,
    device_bytes,
    eval_programs,
    stage_eval_programs,
)
from tunelang.runtime.stages.stage_kinds import TaskKind, kind_of
from tunelang.runtime.store.atomic_files import read_json, write_json
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.user_functions import load_user_functions

STEP = ("train", "score", "reference", "prefill", "decode")
"""Names of the programs of a step."""
_NOT_COMPILED = ("from_", "data", "seed", "length", "reward")
"""Attributes in which branches may differ and still have the same programs."""
_FORMAT = "2"
"""Version of cached rehearsal results."""
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt")
"""Packages whose version decides what is compiled."""
_TRIES = 3
"""Number of layouts that are compiled to find one that fits."""


@dataclass(frozen=True)
class Rehearsed:
    """The compiler's report on one program."""

    name: str
    """`train`, `score`, `prefill`, `decode`, `reference`; with an eval's name before its own."""
    peak: int
    """Peak bytes of a device while it runs, everything that the stage keeps in it included."""
    seconds: float
    """Seconds of compilation."""
    exchanged: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Collective -> executions per call, and their bytes in each device."""
    findings: tuple[str, ...] = ()
    """Inefficiencies of the program, in words."""
    refused: str = ""
    """The compiler's error if the program needs more memory than the device has, else empty."""


def rehearse(prepared: Prepared, node: str, cache: Path) -> Iterator[Rehearsed]:
    """Compile the programs of a stage, one after another.

    What was compiled before is read from `cache`. Raises `MissingExtraError` where the compiler
    for the hardware is not installed, and `UserFunctionError`.
    """
    stage, devices = prepared.graph.nodes[node].value, prepared.devices[node]
    mesh_devices = compilable(devices)
    references = getattr(stage, "evals", ())
    evals = {
        reference.name: prepared.program.declarations[reference.name].value
        for reference in references
    }
    if not isinstance(stage, Training):
        layout = make_layout(fsdp=len(mesh_devices), devices=mesh_devices)
        models = prepared.measured[node]
        for shapes in models:
            which = f"{shapes.architecture.width} × {shapes.architecture.layers} "
            for program in _task_programs(stage, evals, shapes, layout):
                name = program.name if len(models) == 1 else which + program.name
                yield _compile(replace(program, name=name), devices, cache)
        return
    stage = load_user_functions(stage, prepared.program.folder)
    planned, shapes = prepared.layout(node), prepared.shapes[node]
    layout = make_layout(**planned.mesh, devices=mesh_devices)
    copied = tuple(unsplit(shapes.architecture, layout))
    stage_bytes = 0
    for program in kind_of(stage).abstract_programs(stage, shapes, planned, layout):
        compiled = _compile(program, devices, cache)
        stage_bytes = max(stage_bytes, program.stage_bytes)
        if program.name == "train":
            compiled = replace(compiled, findings=compiled.findings + copied)
        yield compiled
    for program in stage_eval_programs(stage, evals, shapes, planned, layout, stage_bytes):
        yield _compile(program, devices, cache)


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
    """Return a key of the programs of a node; branches of a sweep over numbers have the same."""
    stage = prepared.graph.nodes[node].value
    if not isinstance(stage, Training):
        return (node,)
    unit = stage.model_copy(update={"optimizer": at_unit_rate(stage.optimizer)})
    attributes = ((name, str(value)) for name, value in unit if name not in _NOT_COMPILED)
    placement = str(prepared.layout(node)), prepared.shapes[node], prepared.devices[node]
    return type(stage), *attributes, *placement


def fits(prepared: Prepared, node: str, report: Rehearsed) -> bool:
    """Return whether a program of a stage fits into the memory of a device."""
    return not report.refused and report.peak <= prepared.devices[node].chip.memory


def remedies(prepared: Prepared, node: str, report: Rehearsed, cache: Path) -> Iterator[str]:
    """Yield changes that make a stage fit, one of whose programs does not fit.

    The first choice is another layout, which is compiled too; else changes to the stage, by the
    cost model.
    """
    stage = prepared.graph.nodes[node].value
    if not isinstance(stage, Training) or report.name not in STEP:
        yield f"more devices than the {prepared.devices[node]}"
        return
    shapes = prepared.shapes[node]
    stage = load_user_functions(unpinned(stage), prepared.program.folder)
    devices, planned = prepared.devices[node], prepared.layout(node)
    query = replace(
        prepared.queries[node], stage=stage, attention=planned.kernel, branches=planned.branches
    )
    budget = devices.chip.memory
    worst = max(report.peak, budget + 1)
    for _ in range(_TRIES):
        budget = int(budget * min(0.95, planned.total / worst))
        try:
            smaller = replace(devices, chip=replace(devices.chip, memory=budget))
            layout = best_layout(replace(query, devices=smaller))
        except DoesNotFitError:
            break
        mesh = make_layout(**layout.mesh, devices=compilable(devices))
        programs = kind_of(stage).abstract_programs(stage, shapes, layout, mesh)
        reports = [_compile(program, devices, cache) for program in programs]
        worst = max(r.peak for r in reports)
        if all(not r.refused and r.peak <= devices.chip.memory for r in reports):
            yield f"{_pinned(layout)}: {size_text(worst)}, as the compiler says"
            return
    for what, size in remedies_of(replace(query, devices=smaller)):
        yield f"{what}: {size_text(size)}, by the estimate"


def _pinned(layout: StageLayout) -> str:
    axes = ", ".join(f"{axis} = {size}" for axis, size in layout.mesh.items() if size > 1)
    local = layout.rows // shards_of(layout.mesh) // layout.micro_batches
    return f"`mesh = axes({axes})`, `micro_batch = {local} sequences`, `remat = {layout.remat}`"


# Compiling.


def _compile(program: AbstractProgram, devices: Devices, cache: Path) -> Rehearsed:
    lowered = program.lower()
    text = lowered.as_text()
    versions = [_FORMAT, str(OPTIONS)]
    for name in _COMPILERS:
        with suppress(PackageNotFoundError):
            versions.append(version(name))
    key = "\n".join([str(devices), str(devices.shape), *versions, text])
    path = cache / f"rehearsal-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    cached = read_json(path) if path.exists() else None
    if cached is None:
        cached = asdict(measure(program, lowered))
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, cached)
    report = Rehearsed(
        **{
            **cached,
            "findings": tuple(cached["findings"]),
            "exchanged": {kind: tuple(totals) for kind, totals in cached["exchanged"].items()},
        }
    )
    return replace(report, name=program.name, peak=report.peak + program.resident_bytes)


def measure(program: AbstractProgram, lowered: jax.stages.Lowered) -> Rehearsed:
    """Compile a program, and report its memory, collectives and inefficiencies."""
    name, donated = program.name, program.donated
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            # JAX's own cache cannot hold programs for devices that are not here.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = lowered.compile()
    except Exception as error:
        refused = _refusal(str(error))
        if refused is None:
            raise
        needed, why = refused
        return Rehearsed(name, needed, time.monotonic() - start, refused=why)
    seconds = time.monotonic() - start
    memory: Any = compiled.memory_analysis()
    peak = int(getattr(memory, "peak_memory_in_bytes", 0) or 0)
    peak -= int(memory.host_argument_size_in_bytes)  # which compilers for TPUs count
    if peak <= 0 or program.offloaded:
        peak = int(memory.argument_size_in_bytes + memory.temp_size_in_bytes) - program.offloaded
    findings = []
    aliased = int(memory.alias_size_in_bytes) + int(memory.host_alias_size_in_bytes)
    if donated - aliased > max(2**20, donated // 50):
        findings.append(
            f"{donated - aliased:,} bytes of state are not donated: they are there twice"
        )
    text = compiled.as_text() or ""
    if program.trained is not None:
        findings += needless_gathers(text, program.trained, program.micro_batches)
    return Rehearsed(name, peak, seconds, count_collectives(text), tuple(findings))


_NEEDED = re.compile(
    r"(?:Used|total memory required[^(]*\(?|allocat\w* )\s*([\d.]+)\s*([KMGT]?)i?B?", re.IGNORECASE
)


def _refusal(text: str) -> tuple[int, str] | None:
    """Return the bytes that a program needs by the compiler's error, and the error's line.

    None if the compiler failed for another reason than memory.
    """
    lower = text.lower()
    if "resource_exhausted" not in lower and "out of memory" not in lower:
        return None
    line = next(
        (text_line for text_line in text.splitlines() if "memory" in text_line.lower()), text
    )
    size = _NEEDED.search(line)
    needed = 0
    if size is not None:
        needed = int(float(size[1]) * 1024 ** " KMGT".index(size[2].upper() or " "))
    return needed, line.strip()[:200]


def unsplit(architecture: Architecture, layout: Layout) -> Sequence[str]:
    """Name the axes of parameters that the mesh should split and does not divide."""
    config = StepConfig(layout=layout)
    findings: dict[str, None] = {}
    for node in jax.tree.leaves(abstract_params(architecture, config), is_leaf=is_variable):
        if not is_variable(node):
            continue
        for name, size in zip(node.get_metadata("out_sharding"), node.shape, strict=True):
            over = [x for x in layout.rules.get(name, ()) if layout.mesh.shape.get(x, 1) > 1]
            ways = math.prod(layout.mesh.shape[axis] for axis in over)
            if size % ways:
                findings[f"`{name}` of {size} is copied: {ways} do not divide it"] = None
    return list(findings)
