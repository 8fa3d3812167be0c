"""From a checked spec to a plan, for the devices of this machine or for hardware elsewhere."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tunelang.compiler import graph as graphs
from tunelang.compiler.file_digests import Contents
from tunelang.compiler.graph import StageGraph
from tunelang.compiler.layout.hardware import Chip, Devices, chip_of, declared
from tunelang.compiler.layout.layout_query import (
    DoesNotFitError,
    Judge,
    LayoutQuery,
    NoLayoutError,
)
from tunelang.compiler.layout.layout_search import (
    REPORTED_LAYOUTS,
    best_layout,
    layout_key,
    pins,
    rank_layouts,
    unpinned,
)
from tunelang.compiler.layout.meshes import AXES
from tunelang.compiler.layout.remedies import remedies
from tunelang.compiler.layout.stage_layout import StageLayout, plain
from tunelang.compiler.layout.sweep_fusion import Branch, Known, Sweep, sweeps
from tunelang.compiler.models.adapters import adapted, storage_of
from tunelang.compiler.models.architecture import Architecture, from_transformer
from tunelang.compiler.models.presets import PRESETS
from tunelang.compiler.plan import Plan, StagePlan, State
from tunelang.compiler.stage_states import plan as plan_stages
from tunelang.dsl.program import Program
from tunelang.dsl.rules.data_fields import common_roles
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.models import HardwareKind
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.rewards import Learned, LocalJudge, Rubric
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Distill
from tunelang.dsl.vocabulary.utility_stages import Evaluate, Export, Merge, Sample
from tunelang.runtime.errors import StageFailed
from tunelang.runtime.models import pretrained
from tunelang.runtime.planning import estimate_steps
from tunelang.runtime.store.atomic_files import StoreError, read_json, write_json
from tunelang.runtime.store.export_manifest import export_folder, is_written
from tunelang.runtime.store.run_store import Store
from tunelang.runtime.tokenize.open_tokenizer import open_renderer

DTYPE_BYTES = {"f32": 4, "bf16": 2}
_MEASURED = 1024
"""Rows of the square matrices whose product measures a CPU."""
_CPU_CACHE = 96 * 2**20
"""Bytes of activations, over all simulated devices, from which on smaller micro-batches of 1,000 or
2,000 tokens were faster on 2 cores, by a quarter to a third."""
_CPU_BANDWIDTH = 20e9
"""Bytes/s of a CPU's memory: only ranks layouts."""


@dataclass(frozen=True)
class Shapes:
    """The models that a stage works with, as far as their sizes go."""

    architecture: Architecture
    """With the adapter that the stage trains."""
    dtype: str
    """Of activations, as the spec writes it."""
    teacher: Architecture | None = None
    judges: tuple[Judge, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A plan with what it was made from."""

    program: Program
    plan: Plan
    graph: graphs.StageGraph
    layouts: dict[str, StageLayout]
    """Node -> its layout where it is trained by itself; training stages only."""
    fused: dict[str, Sweep]
    """Node -> the branches, itself among them, that one program trains."""
    devices: dict[str, Devices]
    """Node -> what it runs on."""
    shapes: dict[str, Shapes]
    """Node -> the models of its programs; training stages only."""
    queries: dict[str, LayoutQuery]
    """Node -> what its layout was searched for; training stages only."""
    measured: dict[str, tuple[Shapes, ...]]
    """Node -> the models that it samples from or measures; other stages only."""

    def layout(self, node: str) -> StageLayout:
        """Return the layout that a training stage is planned in."""
        return self.fused[node].layouts[0] if node in self.fused else self.layouts[node]


def prepare(
    program: Program,
    store: Store,
    *,
    only: Collection[str] = (),
    until: Collection[str] = (),
    force: Collection[str] = (),
    on: HardwareKind | None = None,
) -> Prepared:
    """Plan a program: states from the store, and for what is to run a layout.

    `on` is the hardware of all stages. Raises `UnknownStage`, `GraphError`,
    `ContentError`, `StoreError`, `StageFailed` and what opening tokenizers raises.
    """
    contents = Contents.load(store.contents)
    made = plan_stages(program, store, contents, only=only, until=until, force=force)
    contents.save()
    graph = graphs.build(program)
    laid_out: dict[str, _LaidOut] = {}
    chosen: dict[str, Devices] = {}
    shapes: dict[str, Shapes] = {}
    known: dict[str, tuple[Architecture, int]] = {}
    searched: dict[object, _Found] = {}
    here: dict[int | None, Devices] = {}
    measured: dict[str, tuple[Shapes, ...]] = {}
    extents: dict[str, estimate_steps.Extent] = {}
    stages = []
    for stage in made.stages:
        value = graph.nodes[stage.node].value
        if isinstance(value, Export) and stage.state.kind == "up to date":
            if not is_written(export_folder(program, graph, stage.node), stage.digest):
                stage = replace(stage, state=State("to run", "gone"))
        if not isinstance(value, Training) or not stage.state.runs:
            stages.append(stage)
            if isinstance(value, Sample | Merge | Evaluate) and stage.state.runs:
                chosen[stage.node] = _devices(program, None, on, store, here)
                references = value.models if isinstance(value, Evaluate) else (value.from_,)
                named = (_plain(program, graph, stage.node, each) for each in references)
                measured[stage.node] = tuple(dict.fromkeys(named))
            continue
        devices = _devices(program, value, on, store, here)
        name = graphs.models_of(graph, stage.node)[0]
        if name not in known:
            known[name] = _architecture(program, name)
        architecture, dtype_bytes = known[name]
        loras = () if value.adapter is None else graphs.loras_of(graph, stage.node)
        storage = storage_of(program.declarations[name].value)
        with _attributing_errors(stage.stage):
            architecture = adapted(architecture, loras, storage)
        dtype = program.declarations[name].value.dtype
        teacher = None
        if isinstance(value, Distill):
            whose = _model_of(graph, stage.node, value.teacher)
            teacher = known.setdefault(whose, _architecture(program, whose))[0]
        judges = _judges(program, graph, stage.node) if isinstance(value, Policy) else ()
        query = LayoutQuery(
            stage=value,
            architecture=architecture,
            dtype_bytes=dtype_bytes,
            devices=devices,
            attention=program.declarations[name].value.attention,
            teacher=teacher,
            judges=judges,
            roles=common_roles(value.data, program),
        )
        key = layout_key(query)
        with _attributing_errors(stage.stage):
            if on is not None:  # of the spec's own hardware it was checked with the spec
                _fills(value, devices)
            if key not in searched:
                searched[key] = _search(query)
        found = searched[key]
        steps = estimate_steps.steps(program, value, name, found.layouts[0], extents)
        laid_out[stage.node] = _LaidOut(stage, query, found, steps)
        chosen[stage.node] = devices
        shapes[stage.node] = Shapes(architecture, dtype, teacher, judges)
        stages.append(stage)
    weighed = _sweeps(laid_out.values())
    whole = (
        _told(laid_out[stage.node], weighed.get(stage.node)) if stage.node in laid_out else stage
        for stage in stages
    )
    plan = replace(made, stages=tuple(whole))
    layouts = {node: each.found.layouts[0] for node, each in laid_out.items()}
    fused = {node: sweep for node, sweep in weighed.items() if sweep.fused}
    queries = {node: each.query for node, each in laid_out.items()}
    return Prepared(program, plan, graph, layouts, fused, chosen, shapes, queries, measured)


@contextmanager
def _attributing_errors(stage: str) -> Iterator[None]:
    """Raise any error as `StageFailed`, naming the stage; look for what would make a stage fit."""
    try:
        yield
    except DoesNotFitError as error:
        error.remedies = tuple(remedies(error.query))
        raise StageFailed(stage) from error
    except Exception as error:
        raise StageFailed(stage) from error


@dataclass(frozen=True)
class _Found:
    """What the search for a layout found."""

    layouts: list[StageLayout]
    """Those that fit, best first."""
    pinned: tuple[str, ...]
    """What the spec decides itself."""
    unpinned: StageLayout | None
    """The best layout if it did not."""


@dataclass(frozen=True)
class _LaidOut:
    """A stage, or a branch of one, with what was found for it."""

    stage: StagePlan
    query: LayoutQuery
    found: _Found
    steps: tuple[int, bool] | None
    """See `lengths.steps`."""


def _fills(value: Training, devices: Devices) -> None:
    """Raise `NoLayoutError` where a pinned mesh would leave devices of a slice or node idle."""
    if value.mesh is not None and not devices.here:
        size = math.prod(getattr(value.mesh, axis) for axis in AXES)
        if size < devices.count:
            raise NoLayoutError("mesh", f"this mesh is for {size} devices, and there are {devices}")


def _search(query: LayoutQuery) -> _Found:
    layouts, pinned = rank_layouts(query), pins(query.stage)
    free: StageLayout | None = None
    if pinned:
        with suppress(NoLayoutError, DoesNotFitError):
            free = best_layout(replace(query, stage=unpinned(query.stage)))
    return _Found(layouts, pinned, free)


def _sweeps(laid_out: Iterable[_LaidOut]) -> dict[str, Sweep]:
    """Return for each node the branches that could be trained together with it.

    Raises `StageFailed`.
    """
    branches: dict[str, list[Branch]] = {}
    for each in laid_out:
        branch = Branch(each.stage, each.query, each.found.layouts[0])
        branches.setdefault(each.stage.stage, []).append(branch)
    known: Known = {}
    found: dict[str, Sweep] = {}
    for stage, those in branches.items():
        with _attributing_errors(stage):
            for sweep in sweeps(those, known):
                found |= dict.fromkeys(sweep.nodes, sweep)
    return found


def _told(laid_out: _LaidOut, sweep: Sweep | None) -> StagePlan:
    """Return the stage with its layout and its cost; of branches in one program, its share."""
    found, devices = laid_out.found, laid_out.query.devices
    layouts = found.layouts if sweep is None or not sweep.fused else sweep.layouts
    layout = layouts[0]
    steps, exact = (None, False) if laid_out.steps is None else laid_out.steps
    seconds = None if steps is None else steps * layout.seconds / layout.branches
    hours = None if seconds is None else seconds / 3600 * devices.count
    cost = {
        "flops": layout.flops / layout.branches,
        "seconds": layout.seconds,
        "times": layout.times,
        "steps": steps,
        "exact": exact,
        "stage_seconds": seconds,
        "device_hours": hours,
        "price": None if hours is None or devices.price is None else hours * devices.price,
    }
    shown = {
        **plain(layout),
        "devices": str(devices),
        "here": devices.here,
        "others": [_brief(each) for each in layouts[1:REPORTED_LAYOUTS]],
        "pinned": list(found.pinned),
        "unpinned": None if found.unpinned is None else _brief(found.unpinned),
        "sweep": sweep and {"branches": len(sweep.nodes), "share": sweep.share, "why": sweep.why},
    }
    return replace(laid_out.stage, layout=shown, memory=dict(layout.memory), cost=cost)


def _brief(layout: StageLayout) -> dict[str, Any]:
    return {
        "mesh": layout.mesh,
        "micro_batches": layout.micro_batches,
        "remat": layout.remat,
        "seconds": layout.seconds,
        "bytes": layout.total,
        "bound": layout.bound,
    }


def _model_of(graph: StageGraph, node: str, reference: Reference) -> str:
    """Return the declared model that a reference of a node descends from."""
    for read in graph.nodes[node].inputs:
        if read.stage == reference.name:
            return graphs.models_of(graph, read.nodes[0])[0]
    return reference.name


def _plain(program: Program, graph: StageGraph, node: str, reference: Reference) -> Shapes:
    """Return the model that a reference of a node stands for, adapters merged into it."""
    name = _model_of(graph, node, reference)
    read = [each for each in graph.nodes[node].inputs if each.stage == reference.name]
    makers = (graph.nodes[each].value for inputs in read for each in inputs.nodes)
    scores = any(getattr(maker, "yields", "") == "scores" for maker in makers)
    architecture = replace(_architecture(program, name)[0], scores=scores)
    return Shapes(architecture, program.declarations[name].value.dtype)


def _judges(program: Program, graph: StageGraph, node: str) -> tuple[Judge, ...]:
    """Return the models of the spec that score the completions of a node."""
    found: dict[Reference, bool] = {}
    for noun, name in graph.nodes[node].uses:
        kind = program.declarations[name].value if noun == "reward" else None
        if isinstance(kind, Learned):
            found[kind.from_] = False
        elif isinstance(kind, Rubric) and isinstance(kind.judge, LocalJudge):
            found[kind.judge.model] = True
    models_of = ((_plain(program, graph, node, each), speaks) for each, speaks in found.items())
    return tuple(Judge(s.architecture, DTYPE_BYTES[s.dtype], speaks) for s, speaks in models_of)


def _architecture(program: Program, name: str) -> tuple[Architecture, int]:
    """Return the architecture of a declared model without reading data, and bytes of its dtype."""
    kind = program.declarations[name].value
    size = 0
    if kind.tokenizer is not None:
        tokenizer = program.declarations[kind.tokenizer.name].value
        if isinstance(tokenizer, models.Trained):
            size = tokenizer.vocabulary  # at most: fitting it takes its data
        else:
            size = open_renderer(tokenizer, program.folder, cache=Path()).tokenizer.size
    if isinstance(kind, models.Pretrained):
        found = pretrained.planned(kind, program.folder)
        return pretrained.resized(found, size), DTYPE_BYTES[kind.dtype]
    return from_transformer(kind, size, PRESETS), DTYPE_BYTES[kind.dtype]


def _devices(
    program: Program,
    stage: Training | None,
    on: HardwareKind | None,
    store: Store,
    here: dict[int | None, Devices],
) -> Devices:
    reference = (stage and stage.on) or program.run.on
    hardware: Any = on
    if on is None and reference is not None:
        hardware = program.declarations[reference.name].value
    limit = None
    if hardware is not None:
        found = declared(hardware)
        if found is not None:
            return found
        limit = hardware.devices
    if limit not in here:
        here[limit] = local_devices(store.root / "cache", limit)
    return here[limit]


def local_devices(cache: Path, limit: int | None = None) -> Devices:
    """Return the devices of this machine, the first few of them if there is a limit."""
    devices = jax.devices()[:limit]
    kind = devices[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        # Devices that are simulated on one CPU share its memory and its cores.
        chip = Chip(
            kind,
            _measured_peak(cache) / len(jax.devices()),
            int(0.8 * memory) // len(devices),
            _CPU_BANDWIDTH,
            _CPU_BANDWIDTH,
            _CPU_CACHE // len(devices),
        )
    return Devices(chip, len(devices), True)


def _measured_peak(cache: Path) -> float:
    """Return the FLOP/s of a large matrix product in float32 here; measured once for a store."""
    path = cache / "peak.json"
    try:
        held = read_json(path)
    except StoreError:
        held = None
    if isinstance(held, dict) and held.get("cpus") == os.cpu_count():
        return float(held["peak"])
    product = jax.jit(lambda a: a @ a)
    matrix = jnp.ones((_MEASURED, _MEASURED), jnp.float32)
    product(matrix).block_until_ready()
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        product(matrix).block_until_ready()
        times.append(time.perf_counter() - begun)
    peak = 2 * _MEASURED**3 / min(times)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"cpus": os.cpu_count(), "peak": peak})
    except (OSError, StoreError):  # a store that cannot be written is said when it has to be
        pass
    return peak


def as_json(prepared: Prepared) -> str:
    """Return the plan as JSON."""
    return json.dumps(json.loads(prepared.plan.dumps()), indent=2, ensure_ascii=False)
