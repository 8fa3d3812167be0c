"""Plans a checked spec, for the devices of this machine or for other hardware."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tunelang.compiler import graph as graphs
from tunelang.compiler.file_digests import Contents
from tunelang.compiler.graph import StageGraph
from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.adapters import NoTargetError
from tunelang.compiler.plan import Plan, StagePlan, State
from tunelang.compiler.search.plan_layouts import (
    LayoutError,
    Shapes,
    lay_out_stages,
    report_layout,
)
from tunelang.compiler.search.remedies import remedies
from tunelang.compiler.search.sweep_fusion import Sweep
from tunelang.compiler.stage_states import plan as plan_stages
from tunelang.dsl.program import Program
from tunelang.dsl.rules.data_fields import common_roles
from tunelang.dsl.vocabulary.models import HardwareKind
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Stage, Training
from tunelang.dsl.vocabulary.utility_stages import Export
from tunelang.runtime.errors import StageFailed
from tunelang.runtime.planning.declared_models import DTYPE_BYTES, DeclaredModels
from tunelang.runtime.planning.estimate_steps import Extent, estimate_steps
from tunelang.runtime.planning.local_devices import StageDevices
from tunelang.runtime.store.export_manifest import export_folder, is_written
from tunelang.runtime.store.run_store import Store


@dataclass(frozen=True)
class Prepared:
    """A plan with the objects that it was made from."""

    program: Program
    plan: Plan
    graph: StageGraph
    layouts: dict[str, StageLayout]
    """Node -> its layout if it is trained alone; training stages only."""
    fused: dict[str, Sweep]
    """Node -> the branches, itself among them, that one program trains."""
    devices: dict[str, Devices]
    """Node -> the devices that it runs on."""
    shapes: dict[str, Shapes]
    """Node -> the models of its programs; training stages only."""
    queries: dict[str, LayoutQuery]
    """Node -> the query of its layout search; training stages only."""
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
    """Plan a program: states from the store, and a layout for each training stage that is to run.

    `on` is the hardware of all stages. Raises `UnknownStage`, `GraphError`, `ContentError`,
    `StoreError`, `StageFailed` and what opening tokenizers raises.
    """
    contents = Contents.load(store.contents)
    plan = plan_stages(program, store, contents, only=only, until=until, force=force)
    contents.save()
    graph = graphs.build(program)
    stages = [_checked_export(program, graph, stage) for stage in plan.stages]
    models = DeclaredModels(program, graph)
    devices = StageDevices(program, on, store.root / "cache")
    # A mesh on the spec's own hardware was checked with the spec.
    queries = _queries(program, graph, stages, models, devices)
    with _failing_stages():
        laid_out = lay_out_stages(queries, fill_devices=on is not None)
    measured = dict(_measured(graph, stages, models))
    extents: dict[str, Extent] = {}
    for position, stage in enumerate(stages):
        if stage.node in laid_out:
            node = laid_out[stage.node]
            steps = estimate_steps(
                program, node.query.stage, models.name_of(stage.node), node.layouts[0], extents
            )
            stages[position] = report_layout(node, steps)
    return Prepared(
        program=program,
        plan=replace(plan, stages=tuple(stages)),
        graph=graph,
        layouts={name: node.layouts[0] for name, node in laid_out.items()},
        fused={
            n: layout.sweep for n, layout in laid_out.items() if layout.sweep and layout.sweep.fused
        },
        devices=(dict.fromkeys(measured, devices.of(None)) if measured else {})
        | {name: node.query.devices for name, node in laid_out.items()},
        shapes={name: _shapes(models, name, node.query) for name, node in laid_out.items()},
        queries={name: node.query for name, node in laid_out.items()},
        measured=measured,
    )


def as_json(prepared: Prepared) -> str:
    """Return the plan as JSON."""
    return json.dumps(json.loads(prepared.plan.dumps()), indent=2, ensure_ascii=False)


@contextmanager
def _failing_stages() -> Iterator[None]:
    """Raise errors of a stage's layout as `StageFailed`, with what would make the stage fit."""
    try:
        yield
    except LayoutError as error:
        if isinstance(error.cause, DoesNotFitError):
            error.cause.remedies = tuple(remedies(error.cause.query))
        raise StageFailed(error.stage) from error.cause


def _checked_export(program: Program, graph: StageGraph, stage: StagePlan) -> StagePlan:
    """Return the stage, with the state `to run` if it is an export whose files are gone."""
    if isinstance(graph.nodes[stage.node].value, Export) and stage.state.kind == "up to date":
        if not is_written(export_folder(program, graph, stage.node), stage.digest):
            return replace(stage, state=State("to run", "gone"))
    return stage


def _queries(
    program: Program,
    graph: StageGraph,
    stages: list[StagePlan],
    models: DeclaredModels,
    devices: StageDevices,
) -> Iterator[tuple[StagePlan, LayoutQuery]]:
    """Yield the training stages that are to run, with the queries for their layouts.

    Raises `LayoutError`.
    """
    for stage in stages:
        value = graph.nodes[stage.node].value
        if not isinstance(value, Training) or not stage.state.runs:
            continue
        name = models.name_of(stage.node)
        architecture = models.architecture(name)
        if value.adapter is not None:
            try:
                architecture = models.with_adapters(stage.node, architecture)
            except (NoTargetError, ValueError) as error:
                raise LayoutError(stage.stage, error) from error
        teacher = value.teacher_reference
        yield (
            stage,
            LayoutQuery(
                stage=value,
                architecture=architecture,
                dtype_bytes=DTYPE_BYTES[models.dtype(name)],
                devices=devices.of(value),
                attention=program.declarations[name].value.attention,
                teacher=None if teacher is None else models.referenced(stage.node, teacher),
                judges=models.judges(stage.node) if isinstance(value, Policy) else (),
                roles=common_roles(value.data, program),
            ),
        )


def _measured(
    graph: StageGraph, stages: list[StagePlan], models: DeclaredModels
) -> Iterator[tuple[str, tuple[Shapes, ...]]]:
    """Yield the other stages that are to run, with the models that they sample from or measure."""
    for stage in stages:
        value = graph.nodes[stage.node].value
        references = value.models_run if isinstance(value, Stage) else ()
        if references and stage.state.runs:
            shapes = (models.merged(stage.node, reference) for reference in references)
            yield stage.node, tuple(dict.fromkeys(shapes))


def _shapes(models: DeclaredModels, node: str, query: LayoutQuery) -> Shapes:
    dtype = models.dtype(models.name_of(node))
    return Shapes(query.architecture, dtype, query.teacher, query.judges)
