"""A plan: what would run, stage by stage, as plain data that is saved as JSON.

A plan is frozen when a run starts: what runs is what it says, whatever happens to the spec.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tunelang.compiler.changes import Change, wording
from tunelang.compiler.fingerprint import Fingerprint
from tunelang.compiler.graph import Choice, Input

FORMAT = 1
"""Version of the JSON form."""

Json = dict[str, Any]


class PlanError(ValueError):
    """A plan contradicts itself; the text says how."""


@dataclass(frozen=True)
class State:
    """The state of a node in the store, which decides what a run does with it."""

    kind: Literal["up to date", "to run", "resume", "same", "left out"]
    """`same`: another node of the plan has the same fingerprint, and its result serves both."""
    reason: Literal["", "first run", "changed", "interrupted", "forced", "gone"] = ""
    """Why a node is to run. `interrupted`: it began before, and left no checkpoint. `gone`: the
    files that it wrote are not there any more."""
    step: int | None = None
    """The step that a resumed node goes on from."""
    node: str | None = None
    """The node that a `same` one is the same as."""
    changes: tuple[Change, ...] = ()
    """Differences from the most similar fingerprint of the last run that had the stage."""

    @property
    def runs(self) -> bool:
        """Return whether a run computes anything for the node."""
        return self.kind in ("to run", "resume")


@dataclass(frozen=True)
class StagePlan:
    """One node of the stage graph, resolved."""

    node: str
    stage: str
    kind: str
    doc: str
    choices: tuple[Choice, ...]
    inputs: tuple[Input, ...]
    uses: tuple[tuple[str, str], ...]
    """Noun and name of the declarations that it depends on; `Plan.declarations` has them."""
    fingerprint: Fingerprint
    resolved: Json
    """Its attributes, defaults included, in the form of `Program.json`."""
    state: State
    layout: Json | None = None
    """Mesh, sharding rules, micro-batch, remat; None until the layout search has run."""
    memory: Json | None = None
    """Bytes for each device, by part; None until the layout search has run."""
    cost: Json | None = None
    """FLOPs, seconds and the bottleneck; None until the layout search has run."""

    @property
    def digest(self) -> str:
        """Return the fingerprint's digest, which names the stage's folder in the store."""
        return self.fingerprint.digest


@dataclass(frozen=True)
class Plan:
    """All stages and branches in an order in which each follows what it reads."""

    name: str | None
    """The run's name."""
    run: Json
    """The `run` block, resolved."""
    declarations: Json
    """Everything but stages, by name, in the form of `Program.json`."""
    stages: tuple[StagePlan, ...]
    by_node: dict[str, StagePlan] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_node", {stage.node: stage for stage in self.stages})

    def dumps(self) -> str:
        """Return the plan as JSON text."""
        document = {"format": FORMAT, **_fields(self)}
        return json.dumps(document, ensure_ascii=False, default=_fields) + "\n"


def _fields(value: Any) -> Json:
    """Return the fields of a dataclass by name."""
    return {part.name: getattr(value, part.name) for part in fields(value) if part.init}


def verify(plan: Plan) -> None:
    """Raise `PlanError` where a plan breaks what it promises."""
    seen: dict[str, StagePlan] = {}
    for stage in plan.stages:
        if stage.node in seen:
            raise PlanError(f"`{stage.node}` stands in it twice")
        if not re.fullmatch(r"[0-9a-f]{32}", stage.digest):
            raise PlanError(f"`{stage.node}` has no fingerprint")
        for read in stage.inputs:
            for node in read.nodes:
                if node not in seen:
                    raise PlanError(f"`{stage.node}` reads `{node}`, which does not stand before")
        for _, name in stage.uses:
            if name not in plan.declarations:
                raise PlanError(f"`{stage.node}` uses `{name}`, which is not declared")
        same = seen.get(stage.state.node) if stage.state.node is not None else None
        if (stage.state.kind == "same") != (same is not None and same.digest == stage.digest):
            raise PlanError(f"`{stage.node}` is the same as nothing")
        if (stage.state.kind == "resume") != (stage.state.step is not None):
            raise PlanError(f"`{stage.node}` does not say where it resumes")
        seen[stage.node] = stage


def missing_inputs(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Return pairs of a node that would run and a node that it reads, which is left out and not
    done. A run does not start while there are any.
    """
    return tuple(
        (stage.node, node)
        for stage in plan.stages
        if stage.state.runs
        for read in stage.inputs
        for node in read.nodes
        if plan.by_node[node].state.kind == "left out"
    )


def describe(state: State) -> str:
    """Return a state in words, on one line: `to run: `optimizer.lr`: 1e-5 → 1e-6`."""
    match state.kind:
        case "resume":
            return f"resume at step {state.step}"
        case "same":
            return f"same as `{state.node}`"
        case "to run" if state.reason == "changed":
            return f"to run: {'; '.join(wording(change) for change in state.changes)}"
        case "to run" if state.reason == "interrupted":
            return "to run: interrupted before its first checkpoint"
        case "to run" if state.reason == "gone":
            return "to run: its files are gone, or others"
        case "to run":
            return f"to run: {state.reason}"
    return state.kind
