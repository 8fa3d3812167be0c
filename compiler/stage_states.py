"""From a Program and what the store holds to a Plan. Touches no device and needs no JAX."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from tunelang.compiler import graph as graphs
from tunelang.compiler.changes import changes
from tunelang.compiler.file_digests import Contents
from tunelang.compiler.fingerprint import Fingerprint, fingerprints
from tunelang.compiler.plan import Json, Plan, StagePlan, State, verify
from tunelang.dsl.program import Program, plain
from tunelang.dsl.vocabulary.raw_values import RegexValue, Word

_COMPARED = 32
"""Earlier branches that are compared to find the most alike."""


class StoreView(Protocol):
    """The queries that planning makes of a store; each answer holds for one moment."""

    def finished(self, digest: str) -> bool:
        """Return whether a stage with this fingerprint is done, with all that it wrote."""

    def resumable(self, digest: str) -> int | None:
        """Return the step of the last whole checkpoint of a stage that is not done."""

    def begun(self, digest: str) -> bool:
        """Return whether a stage with this fingerprint has a folder."""

    def earlier(self, stage: str) -> Mapping[str, Json]:
        """Return the fingerprints (`digest`, `components`, `words`) of a stage's nodes, by their
        ids, in the last run that had the stage.
        """


def plan(
    program: Program,
    store: StoreView,
    contents: Contents,
    *,
    only: Collection[str] = (),
    until: Collection[str] = (),
    force: Collection[str] = (),
) -> Plan:
    """Return the plan of a checked Program.

    `only`, `until` and `force` name stages or nodes. A forced node runs although it is up to date;
    what reads it does not, for its fingerprint stays the same.

    Raises `UnknownStage`, `GraphError`, and `ContentError` for a file that cannot be read.
    """
    graph = graphs.build(program)
    chosen = {*graphs.only(graph, only), *graphs.until(graph, until)}
    if not only and not until:
        chosen = set(graph.nodes)
    prints = fingerprints(graph, contents)
    wanted = {prints[node].digest for node in chosen}
    forced = {prints[node].digest for node in graphs.only(graph, force)} & wanted
    first: dict[str, str] = {}
    stages: list[StagePlan] = []
    for node in graph.nodes.values():
        fingerprint = prints[node.id]
        same = first.setdefault(fingerprint.digest, node.id)
        if same != node.id:
            state = State("same", node=same)
        elif fingerprint.digest in forced:
            state = State("to run", "forced")
        else:
            state = _state(store, node, fingerprint, fingerprint.digest in wanted)
        stages.append(
            StagePlan(
                node=node.id,
                stage=node.stage,
                kind=node.kind,
                doc=program.declarations[node.stage].doc,
                choices=node.choices,
                inputs=node.inputs,
                uses=node.uses,
                fingerprint=fingerprint,
                resolved=_json(node.value),
                state=state,
            )
        )
    declarations: Json = {
        name: {
            "noun": declared.noun,
            "kind": declared.kind,
            "doc": declared.doc,
            "value": _json(declared.value),
        }
        for name, declared in program.declarations.items()
        if declared.noun != "stage"
    }
    plan = Plan(program.run.name, _json(program.run), declarations, tuple(stages))
    verify(plan)
    return plan


def _state(store: StoreView, node: graphs.StageNode, new: Fingerprint, wanted: bool) -> State:
    if store.finished(new.digest):
        return State("up to date")
    if not wanted:
        return State("left out")
    step = store.resumable(new.digest)
    if step is not None:
        return State("resume", step=step)
    if store.begun(new.digest):
        return State("to run", "interrupted")
    old = _most_alike(store.earlier(node.stage), node.id, new)
    if old is None:
        return State("to run", "first run")
    differences = changes(old, new)
    if not differences:
        return State("to run", "first run")
    return State("to run", "changed", changes=differences)


def _most_alike(earlier: Mapping[str, Json], node: str, new: Fingerprint) -> Fingerprint | None:
    """Return the same node of the earlier run, or else the branch with the fewest differences."""
    candidates = [earlier[node]] if node in earlier else list(earlier.values())[:_COMPARED]
    if not candidates:
        return None
    items = new.components.items()
    best = min(candidates, key=lambda old: len(old["components"].items() ^ items))
    return Fingerprint(best["digest"], dict(best["components"]), dict(best["words"]))


def _json(value: object) -> Any:
    """Convert a value to plain JSON."""
    return json.loads(json.dumps(plain(value), default=_parameter))


def _parameter(value: object) -> str:
    """Convert values that only parameters and named expressions have to the words of the spec."""
    match value:
        case Word():
            return value.text
        case RegexValue():
            return value.pattern
    raise TypeError(f"{value!r} has no JSON form")
