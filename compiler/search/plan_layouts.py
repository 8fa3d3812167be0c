"""Layouts of the stages of a plan, and what the plan says of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from tunelang.compiler.layout.layout_query import (
    DoesNotFitError,
    Judge,
    LayoutQuery,
    NoLayoutError,
)
from tunelang.compiler.layout.stage_layout import StageLayout, as_json
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.plan import Json, StagePlan
from tunelang.compiler.search.layout_search import (
    REPORTED_LAYOUTS,
    best_layout,
    layout_key,
    pins,
    rank_layouts,
    unpinned,
)
from tunelang.compiler.search.meshes import refuse_idle_devices
from tunelang.compiler.search.sweep_fusion import Branch, Sweep, fuse_sweeps


class LayoutError(Exception):
    """A stage cannot be laid out: the `stage`, and its `cause`."""

    def __init__(self, stage: str, cause: Exception) -> None:
        super().__init__(stage, cause)
        self.stage = stage
        self.cause = cause


@dataclass(frozen=True)
class Shapes:
    """The models of a stage's programs, by their sizes."""

    architecture: Architecture
    """With the adapter that the stage trains."""
    dtype: str
    """The dtype of activations, as the spec writes it."""
    teacher: Architecture | None = None
    judges: tuple[Judge, ...] = ()


@dataclass(frozen=True)
class LaidOut:
    """A stage, or one branch of it, with the layouts that were found for it."""

    stage: StagePlan
    query: LayoutQuery
    layouts: list[StageLayout]
    """The layouts of the branch alone that fit, best first."""
    unpinned: StageLayout | None
    """The best layout if the spec pinned nothing; None where it pins nothing."""
    sweep: Sweep | None = None
    """The branches that could be trained together, this one among them."""

    @property
    def planned(self) -> tuple[StageLayout, ...]:
        """Return the layouts of the program that trains the branch, best first."""
        if self.sweep is not None and self.sweep.fused:
            return self.sweep.layouts
        return tuple(self.layouts)


def lay_out_stages(
    queries: Iterable[tuple[StagePlan, LayoutQuery]], *, fill_devices: bool
) -> dict[str, LaidOut]:
    """Search the layouts of stages, and return them by node.

    Stages and branches with equal queries share a search. With `fill_devices` a pinned mesh has to
    use all devices that are not of this machine. Raises `LayoutError`.
    """
    searched: dict[Hashable, LaidOut] = {}
    laid_out: dict[str, LaidOut] = {}
    for stage, query in queries:
        key = layout_key(query)
        try:
            if fill_devices:
                refuse_idle_devices(query)
            if key not in searched:
                searched[key] = _search(stage, query)
        except (NoLayoutError, DoesNotFitError) as error:
            raise LayoutError(stage.stage, error) from error
        laid_out[stage.node] = replace(searched[key], stage=stage, query=query)
    return _with_sweeps(laid_out)


def report_layout(laid_out: LaidOut, steps: tuple[int, bool] | None) -> StagePlan:
    """Return the stage of a plan with its layout, memory and cost; those of a branch that is
    trained with others are its share.

    `steps` says how many there are and whether that is exact; None where it is not known.
    """
    layout, *others = laid_out.planned
    devices, sweep = laid_out.query.devices, laid_out.sweep
    free = laid_out.unpinned
    report = {
        **as_json(layout),
        "devices": str(devices),
        "here": devices.here,
        "others": [_summary(other) for other in others[: REPORTED_LAYOUTS - 1]],
        "pinned": list(pins(laid_out.query.stage)),
        "unpinned": None if free is None else _summary(free),
        "sweep": sweep and {"branches": len(sweep.nodes), "share": sweep.share, "why": sweep.why},
    }
    cost = _cost(laid_out, layout, steps)
    return replace(laid_out.stage, layout=report, memory=dict(layout.memory), cost=cost)


def _search(stage: StagePlan, query: LayoutQuery) -> LaidOut:
    layouts = rank_layouts(query)
    free: StageLayout | None = None
    if pins(query.stage):
        with suppress(NoLayoutError, DoesNotFitError):
            free = best_layout(replace(query, stage=unpinned(query.stage)))
    return LaidOut(stage, query, layouts, free)


def _with_sweeps(laid_out: dict[str, LaidOut]) -> dict[str, LaidOut]:
    """Decide which branches one program trains. Raises `LayoutError`."""
    branches: dict[str, list[Branch]] = {}
    for node in laid_out.values():
        branch = Branch(node.stage, node.query, node.layouts[0])
        branches.setdefault(node.stage.stage, []).append(branch)
    searched: dict[Hashable, tuple[StageLayout, ...]] = {}
    fused = dict(laid_out)
    for stage, siblings in branches.items():
        try:
            sweeps = fuse_sweeps(siblings, searched)
        except (NoLayoutError, DoesNotFitError) as error:
            raise LayoutError(stage, error) from error
        for sweep in sweeps:
            fused |= {name: replace(laid_out[name], sweep=sweep) for name in sweep.nodes}
    return fused


def _cost(laid_out: LaidOut, layout: StageLayout, steps: tuple[int, bool] | None) -> Json:
    devices = laid_out.query.devices
    count, exact = (None, False) if steps is None else steps
    seconds = None if count is None else count * layout.seconds / layout.branches
    hours = None if seconds is None else seconds / 3600 * devices.count
    return {
        "flops": layout.flops / layout.branches,
        "seconds": layout.seconds,
        "times": layout.times,
        "steps": count,
        "exact": exact,
        "stage_seconds": seconds,
        "device_hours": hours,
        "price": None if hours is None or devices.price is None else hours * devices.price,
    }


def _summary(layout: StageLayout) -> Json:
    return {
        "mesh": layout.mesh,
        "micro_batches": layout.micro_batches,
        "remat": layout.remat,
        "seconds": layout.seconds,
        "bytes": layout.total,
        "bound": layout.bound,
    }
