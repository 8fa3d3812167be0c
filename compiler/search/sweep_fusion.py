"""The decision whether one program trains the branches of a sweep side by side.

Branches that differ in nothing but the learning rate read the same batches. In one program (`vmap`)
each has weights, moments and activations of its own, while frozen weights are read, and gathered
over the mesh, once for all of them; so are the answers of a reference and of a teacher.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery, NoLayoutError
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.plan import StagePlan
from tunelang.compiler.search.layout_search import layout_key, rank_layouts
from tunelang.dsl.vocabulary.optimizer_kinds import Muon, Optimizer

WORTH = 0.95
"""Share of the time of one branch after another that one program may take to be chosen."""


@dataclass(frozen=True)
class Branch:
    """A branch with the layout that it would have alone."""

    planned: StagePlan
    query: LayoutQuery
    alone: StageLayout

    @property
    def wish(self) -> str:
        """Return the stage's attribute `sweep`: `auto`, `fused` or `in_turn`."""
        return getattr(self.query.stage, "sweep", "auto")


@dataclass(frozen=True)
class Sweep:
    """Branches that differ in the learning rate alone."""

    nodes: tuple[str, ...]
    alone: StageLayout
    """The layout of one of them."""
    layouts: tuple[StageLayout, ...]
    """The layouts of one program for all of them, best first; empty where none fits."""
    fused: bool
    """Whether one program trains them."""
    why: str = ""
    """Why one program is out of the question."""

    @property
    def share(self) -> float | None:
        """Return the time of one program over the time of one branch after another."""
        if not self.layouts:
            return None
        return self.layouts[0].seconds / (len(self.nodes) * self.alone.seconds)


def fuse_sweeps(
    branches: Iterable[Branch], searched: dict[Hashable, tuple[StageLayout, ...]]
) -> list[Sweep]:
    """Return the sweeps among the branches of one stage.

    `searched` caches layouts of several branches. Raises `NoLayoutError` and `DoesNotFitError`
    where the spec demands one program and there can be none.
    """
    groups: dict[Hashable, list[Branch]] = {}
    kinds: set[Hashable] = set()
    for branch in branches:
        kinds.add(kind := _fusible_kind(branch))
        # Branches that a crash left at different steps go on one after another.
        state = branch.planned.state
        groups.setdefault((kind, state.step, state.reason == "forced"), []).append(branch)
    sweeps: list[Sweep] = []
    for group in groups.values():
        wish = group[0].wish
        if len(kinds) > 1 and wish == "fused":
            raise NoLayoutError("sweep", "its branches differ in more than the learning rate")
        if len(group) > 1 and wish != "in_turn":
            sweeps.append(_weigh(group, searched))
    return sweeps


def at_unit_rate(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with a peak rate of 1: its updates are proportional to its rate."""
    change: dict[str, float] = {"lr": 1.0}
    if isinstance(optimizer, Muon) and optimizer.adam_lr is not None:
        change["adam_lr"] = optimizer.adam_lr / optimizer.lr
    return optimizer.model_copy(update=change)


def _fusible_kind(branch: Branch) -> Hashable:
    """Return what branches that one program can train have in common."""
    stage = branch.query.stage
    unit = stage.model_copy(update={"optimizer": at_unit_rate(stage.optimizer)})
    return str(unit), branch.planned.inputs


def _weigh(group: list[Branch], searched: dict[Hashable, tuple[StageLayout, ...]]) -> Sweep:
    """Compare one program for the branches of a kind, at one step, with one branch after
    another.
    """
    first, demanded = group[0], group[0].wish == "fused"
    nodes = tuple(branch.planned.node for branch in group)
    why = cost_of(first.query.stage).why_in_turn
    if not why and first.alone.offload:
        why = "the memory of the host is for the moments of one branch"
    if demanded and why:
        raise NoLayoutError("sweep", why)
    if first.query.devices.chip.platform == "cpu" and not demanded:
        why = why or "on CPUs one program of all is seldom faster"
    if why:
        return Sweep(nodes, first.alone, (), fused=False, why=why)
    together = replace(first.query, branches=len(group))
    key = layout_key(together)
    if key not in searched:
        try:
            searched[key] = tuple(rank_layouts(together))
        except (NoLayoutError, DoesNotFitError):
            if demanded:
                raise
            searched[key] = ()
    sweep = Sweep(nodes, first.alone, searched[key], demanded)
    share = sweep.share
    return replace(sweep, fused=demanded or (share is not None and share <= WORTH))
