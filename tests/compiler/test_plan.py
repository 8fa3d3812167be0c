"""Plans: states by what the store holds, selection, their words, and their JSON form."""

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
    StagePlan,
    State,
    describe,
    missing_inputs,
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


def test_states_are_described_in_words(folder: Path) -> None:
    old = made(PIPELINE, folder)
    by_stage = [stage.digest for stage in old.stages]
    store = Memory({by_stage[0]}, {by_stage[1]: 4}, {by_stage[2]}, old)
    text = PIPELINE.replace("length = 1 epoch", "length = 2 epochs")
    planned = made(text, folder, store).stages
    assert {stage.node: describe(stage.state) for stage in planned} == {
        "warm": "up to date",
        "tuned[optimizer.lr=1e-6]": "resume at step 4",
        "tuned[optimizer.lr=3e-6]": "to run: interrupted before its first checkpoint",
        "polished": "to run: `length`: 1 epoch → 2 epochs",
        "out": "to run: `polished` has changed",
    }


def test_first_run_runs_every_stage(folder: Path) -> None:
    assert {stage.state.reason for stage in made(PIPELINE, folder).stages} == {"first run"}


def test_new_branch_is_compared_with_the_most_similar(folder: Path) -> None:
    store = Memory(last=made(PIPELINE, folder))
    found = made(PIPELINE.replace("3e-6)", "5e-6)"), folder, store)
    (change,) = found.by_node["tuned[optimizer.lr=5e-6]"].state.changes
    assert (change.path, change.new) == ("optimizer.lr", "5e-6")


def test_only_reports_missing_inputs(folder: Path) -> None:
    found = made(PIPELINE, folder, only=["polished"])
    assert states(found)["polished"] == "to run"
    assert states(found)["warm"] == "left out"
    assert missing_inputs(found) == (
        ("polished", "tuned[optimizer.lr=1e-6]"),
        ("polished", "tuned[optimizer.lr=3e-6]"),
    )
    done = Memory(set(digests(PIPELINE, folder).values()) - {found.by_node["polished"].digest})
    assert not missing_inputs(made(PIPELINE, folder, done, only=["polished"]))


def test_until_includes_all_dependencies(folder: Path) -> None:
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


def test_equal_stages_run_once(folder: Path) -> None:
    text = PIPELINE + PIPELINE[PIPELINE.index("stage warm") :].partition("stage tuned")[0].replace(
        "stage warm", "stage again"
    )
    found = made(text, folder)
    kinds = states(found)
    assert sorted([kinds["warm"], kinds["again"]]) == ["same", "to run"]
    only = made(text, folder, only=["again" if kinds["again"] == "same" else "warm"])
    assert sorted([states(only)["warm"], states(only)["again"]]) == ["same", "to run"]


def test_json_contains_all_of_the_plan(folder: Path) -> None:
    found = made(PIPELINE, folder, Memory(last=made(PIPELINE.replace("17", "18"), folder)))
    first = replace(found.stages[0], layout={"mesh": {"fsdp": 4}}, memory={"weights": 2**40})
    document = json.loads(replace(found, stages=(first, *found.stages[1:])).dumps())
    assert document["format"] == FORMAT
    assert [stage["node"] for stage in document["stages"]] == [each.node for each in found.stages]
    assert document["stages"][0]["memory"] == {"weights": 2**40}
    assert document["stages"][0]["fingerprint"]["digest"] == first.digest
    assert document["stages"][0]["state"]["changes"]


def test_json_contains_params_and_resolved_meshes() -> None:
    folder = EVERYTHING.parents[1] / "workspace"
    document = json.loads(made(EVERYTHING.read_text("utf-8"), folder).dumps())
    assert document["declarations"]["mode"]["value"] == "cosine"
    (last,) = [stage for stage in document["stages"] if stage["node"] == "last"]
    assert last["resolved"]["mesh"]["fsdp"] == 8


def test_plan_does_not_change_with_its_files(folder: Path) -> None:
    found = made(PIPELINE, folder)
    text = found.dumps()
    write(folder / "data/sums.jsonl", "{}\n")
    assert found.dumps() == text


def damaged(stages: tuple[StagePlan, ...], change: str) -> tuple[StagePlan, ...]:
    first, *others = stages
    match change:
        case "twice":
            return (*stages, first)
        case "order":
            return stages[::-1]
        case "digest":
            first = replace(first, fingerprint=replace(first.fingerprint, digest="../.."))
        case "resume":
            first = replace(first, state=replace(first.state, kind="resume"))
        case "same":
            first = replace(first, state=replace(first.state, kind="same"))
        case "uses":
            first = replace(first, uses=(*first.uses, ("data", "nothing")))
    return (first, *others)


@pytest.mark.parametrize("change", ["twice", "order", "digest", "resume", "same", "uses"])
def test_plan_that_contradicts_itself_is_refused(folder: Path, change: str) -> None:
    found = made(PIPELINE, folder)
    verify(found)
    with pytest.raises(PlanError):
        verify(replace(found, stages=damaged(found.stages, change)))


def test_planning_imports_no_jax() -> None:
    code = (
        "import sys, tunelang.compiler.stage_states; assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
