"""Branches of a sweep that are trained side by side in one program, and whether they should be.

Branches that differ in nothing but the learning rate read the same batches. Side by side (`vmap`)
each has weights, moments and activations of its own, while what is frozen is read, and gathered
over the mesh, once for all of them; so are the answers of a reference and of a teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery, NoLayoutError
from tunelang.compiler.layout.layout_search import layout_key, rank_layouts
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.vocabulary.optimizer_kinds import Muon, Optimizer
from tunelang.dsl.vocabulary.stages import Training

WORTH = 0.95
"""Share of the time of one after another that side by side takes at most, to be chosen."""


@dataclass(frozen=True)
class Branch:
    """A branch with the layout that it would have by itself."""

    planned: StagePlan
    query: LayoutQuery
    alone: StageLayout

    @property
    def value(self) -> Training:
        """The stage as the branch has it."""
        return self.query.stage


@dataclass(frozen=True)
class Sweep:
    """Branches that differ in the learning rate alone."""

    nodes: tuple[str, ...]
    alone: StageLayout
    layouts: tuple[StageLayout, ...]
    """Of all of them together, the best first; none where they do not fit."""
    fused: bool
    """Whether one program trains them."""
    why: str = ""
    """Why one program is out of the question."""

    @property
    def share(self) -> float | None:
        """What side by side takes of the time of one after another."""
        if not self.layouts:
            return None
        return self.layouts[0].seconds / (len(self.nodes) * self.alone.seconds)


Known = dict[object, tuple[StageLayout, ...]]


def sweeps(branches: Iterable[Branch], known: Known) -> list[Sweep]:
    """Return what could be trained side by side of the branches of one stage.

    `known` keeps layouts that were searched for. Raises `NoLayoutError` and `DoesNotFitError` where
    the spec wants what cannot be.
    """
    groups: dict[object, list[Branch]] = {}
    kinds: set[object] = set()
    for branch in branches:
        kinds.add(kind := _kind(branch))
        # Those that a crash left at different steps go on one after another.
        state = branch.planned.state
        groups.setdefault((kind, state.step, state.reason == "forced"), []).append(branch)
    found: list[Sweep] = []
    for group in groups.values():
        asked = _asked(group[0])
        if len(kinds) > 1 and asked == "fused":
            raise NoLayoutError("sweep", "its branches differ in more than the learning rate")
        if len(group) > 1 and asked != "in_turn":
            found.append(_weighed(group, known))
    return found


def _asked(branch: Branch) -> str:
    return getattr(branch.value, "sweep", "auto")


def _kind(branch: Branch) -> object:
    """Return what branches have in common that one program can train."""
    value = branch.value
    unit = value.model_copy(update={"optimizer": at_unit_rate(value.optimizer)})
    return str(unit), branch.planned.inputs


def _weighed(group: list[Branch], known: Known) -> Sweep:
    """Weigh one program for branches of a kind, at one step, against one after another."""
    first, count = group[0], len(group)
    value, wanted = first.value, _asked(first) == "fused"
    why = cost_of(value).why_in_turn
    if not why and first.alone.offload:
        why = "the memory of the host is for the moments of one branch"
    if wanted and why:
        raise NoLayoutError("sweep", why)
    if first.query.devices.chip.platform == "cpu" and not wanted:
        why = why or "on CPUs one program of all is seldom faster"
    nodes = tuple(branch.planned.node for branch in group)
    if why:
        return Sweep(nodes, first.alone, (), fused=False, why=why)
    together = replace(first.query, branches=count)
    key = layout_key(together)
    if key not in known:
        try:
            known[key] = tuple(rank_layouts(together))
        except (NoLayoutError, DoesNotFitError):
            if wanted:
                raise
            known[key] = ()
    sweep = Sweep(nodes, first.alone, known[key], wanted)
    share = sweep.share
    return replace(sweep, fused=wanted or (share is not None and share <= WORTH))


def at_unit_rate(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with a peak rate of 1: its updates are proportional to its rate."""
    change: dict[str, float] = {"lr": 1.0}
    if isinstance(optimizer, Muon) and optimizer.adam_lr is not None:
        change["adam_lr"] = optimizer.adam_lr / optimizer.lr
    return optimizer.model_copy(update=change)
