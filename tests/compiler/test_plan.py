"""Plans: states by what the store holds, selection, text, and the JSON round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.workspace import PIPELINE, digests, program, write
from tunelang.compiler.file_digests import Contents
from tunelang.compiler.graph import UnknownStage
from tunelang.compiler.plan import (
    FORMAT,
    Plan,
    PlanError,
    State,
    loads,
    missing_inputs,
    show,
    verify,
)
from tunelang.compiler.stage_states import plan

EVERYTHING = Path(__file__).parents[1] / "ui/right/everything.tune"


@dataclass
class Memory:
    """A store that is told what it holds."""

    done: set[str] = field(default_factory=set)
    steps: dict[str, int] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)
    last: Plan | None = None

    def finished(self, digest: str) -> bool:
        return digest in self.done

    def resumable(self, digest: str) -> int | None:
        return self.steps.get(digest)

    def begun(self, digest: str) -> bool:
        return digest in self.started

    def earlier(self, stage: str) -> Mapping[str, Mapping[str, Any]]:
        found = self.last.stages if self.last is not None else ()
        return {s.node: vars(s.fingerprint) for s in found if s.stage == stage}


def made(text: str, folder: Path, store: Memory | None = None, **options: Any) -> Plan:
    return plan(program(text, folder), store or Memory(), Contents(), **options)


def states(found: Plan) -> dict[str, str]:
    return {stage.node: stage.state.kind for stage in found.stages}


def test_states_and_text(folder: Path) -> None:
    old = made(PIPELINE, folder)
    by_stage = [stage.digest for stage in old.stages]
    store = Memory({by_stage[0]}, {by_stage[1]: 4}, {by_stage[2]}, old)
    text = PIPELINE.replace("length = 1 epoch", "length = 2 epochs")
    assert show(made(text, folder, store)) == (
        "warm                      up to date\n"
        "tuned[optimizer.lr=1e-6]  resume at step 4\n"
        "tuned[optimizer.lr=3e-6]  to run: interrupted before its first checkpoint\n"
        "polished                  to run: `length`: 1 epoch → 2 epochs\n"
        "out                       to run: `polished` has changed\n"
        "1 up to date, 1 resume, 3 to run\n"
    )


def test_first_run(folder: Path) -> None:
    assert {stage.state.reason for stage in made(PIPELINE, folder).stages} == {"first run"}


def test_a_new_branch_is_compared_with_the_most_alike(folder: Path) -> None:
    store = Memory(last=made(PIPELINE, folder))
    found = made(PIPELINE.replace("3e-6)", "5e-6)"), folder, store)
    (change,) = found.by_node["tuned[optimizer.lr=5e-6]"].state.changes
    assert (change.path, change.new) == ("optimizer.lr", "5e-6")


def test_only_needs_what_it_reads(folder: Path) -> None:
    found = made(PIPELINE, folder, only=["polished"])
    assert states(found)["polished"] == "to run"
    assert states(found)["warm"] == "left out"
    assert missing_inputs(found) == (
        ("polished", "tuned[optimizer.lr=1e-6]"),
        ("polished", "tuned[optimizer.lr=3e-6]"),
    )
    done = Memory(set(digests(PIPELINE, folder).values()) - {found.by_node["polished"].digest})
    assert not missing_inputs(made(PIPELINE, folder, done, only=["polished"]))


def test_until(folder: Path) -> None:
    found = made(PIPELINE, folder, until=["tuned"])
    left = [node for node, kind in states(found).items() if kind == "left out"]
    assert left == ["polished", "out"]
    assert not missing_inputs(found)
    with pytest.raises(UnknownStage):
        made(PIPELINE, folder, until=["nothing"])


def test_force_runs_one_stage_and_no_reader(folder: Path) -> None:
    done = Memory(set(digests(PIPELINE, folder).values()))
    found = made(PIPELINE, folder, done, force=["warm"])
    assert found.by_node["warm"].state == State("to run", "forced")
    assert set(states(found).values()) == {"to run", "up to date"}


def test_two_stages_that_are_one(folder: Path) -> None:
    text = PIPELINE + PIPELINE[PIPELINE.index("stage warm") :].partition("stage tuned")[0].replace(
        "stage warm", "stage again"
    )
    found = made(text, folder)
    kinds = states(found)
    assert sorted([kinds["warm"], kinds["again"]]) == ["same", "to run"]
    only = made(text, folder, only=["again" if kinds["again"] == "same" else "warm"])
    assert sorted([states(only)["warm"], states(only)["again"]]) == ["same", "to run"]


def test_round_trip(folder: Path) -> None:
    found = made(PIPELINE, folder, Memory(last=made(PIPELINE.replace("17", "18"), folder)))
    parts = replace(found.stages[0], layout={"mesh": {"fsdp": 4}}, memory={"weights": 2**40})
    found = replace(found, stages=(parts, *found.stages[1:]))
    again = loads(found.dumps())
    assert again == found
    assert again.dumps() == found.dumps()
    assert json.loads(found.dumps())["format"] == FORMAT


def test_round_trip_of_everything() -> None:
    folder = EVERYTHING.parents[1] / "workspace"
    found = made(EVERYTHING.read_text("utf-8"), folder)
    assert loads(found.dumps()) == found
    assert found.declarations["mode"]["value"] == "cosine"
    assert found.by_node["last"].resolved["mesh"]["fsdp"] == 8


def test_a_plan_does_not_follow_the_spec(folder: Path) -> None:
    found = made(PIPELINE, folder)
    text = found.dumps()
    write(folder / "data/sums.jsonl", "{}\n")
    assert loads(text) == found


def damaged(document: dict[str, Any], change: str) -> dict[str, Any]:
    first = document["stages"][0]
    match change:
        case "twice":
            document["stages"].append(first)
        case "order":
            document["stages"].reverse()
        case "digest":
            first["fingerprint"]["digest"] = "../.."
        case "unknown key":
            first["colour"] = "red"
        case "format":
            document["format"] = 99
        case "resume":
            first["state"]["kind"] = "resume"
        case "same":
            first["state"]["kind"] = "same"
        case "uses":
            first["uses"].append(["data", "nothing"])
    return document


@pytest.mark.parametrize(
    "change", ["twice", "order", "digest", "unknown key", "format", "resume", "same", "uses"]
)
def test_damaged_plans_are_refused(folder: Path, change: str) -> None:
    found = made(PIPELINE, folder)
    verify(found)
    with pytest.raises(PlanError):
        loads(json.dumps(damaged(json.loads(found.dumps()), change)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError):
        loads(text)


def test_planning_imports_no_jax() -> None:
    code = (
        "import sys, tunelang.compiler.stage_states; assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_fits_its_width(folder: Path) -> None:
    store = Memory(last=made(PIPELINE, folder))
    text = PIPELINE.replace("from   = tiny", "from   = tiny\n  optimizer = muon(lr = 1)")
    more = "group = 8, advantage = group_mean, entropy = 0.1, passes = 2"
    text = text.replace("group     = 4", more)
    for width in (100, 60):
        lines = show(made(text, folder, store), width).splitlines()
        assert max(map(len, lines)) <= width
