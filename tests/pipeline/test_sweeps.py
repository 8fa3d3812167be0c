"""Branches of a sweep in one program: each learns what it learns by itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny
from tunelang.runtime.errors import Interrupted, StageFailed
from tunelang.runtime.pipeline.execute_plan import execute
from tunelang.runtime.store.run_store import Store
from tunelang.runtime.training import training_loop
from tunelang.runtime.training.training_loop import DivergedError

STAGES = """
data pairs : jsonl { path = "pairs.jsonl", prompt = "{a}+{b}=", chosen = "{c}", rejected = "{a}" }

stage tuned : sft {
  from = base, data = sums, length = 7 steps, batch = 8 sequences, keep = lowest(fluency)
  optimizer = adamw(lr = each(1e-3, 1e-2, 2e-2)), evals = [fluency], eval_every = 3 steps
  log_every = 1 step, checkpoint_every = 2 steps, mesh = axes(data = 1)
}

stage adapted : sft {
  from = tuned, data = both, length = 6 steps, batch = 8 sequences, keep = all
  adapter = lora(rank = 2, dropout = 0.2), optimizer = muon(lr = each(1e-2, 2e-2))
  log_every = 1 step, mesh = axes(data = 1), micro_batch = 2 sequences
}

stage preferred : dpo {
  from = tuned, data = pairs, length = 3 steps, batch = 4 sequences
  reference_log_probs = live, optimizer = adamw(lr = each(1e-3, 3e-3)), keep = lowest(loss)
  log_every = 1 step, mesh = axes(data = 1)
}
"""
FUSED = [f"stage.{name}.sweep=fused" for name in ("tuned", "adapted", "preferred")]
BRANCHES = (
    *(f"tuned[optimizer.lr={rate}]" for rate in ("1e-3", "1e-2", "2e-2")),
    *(f"adapted[optimizer.lr={rate}]" for rate in ("1e-2", "2e-2")),
    *(f"preferred[optimizer.lr={rate}]" for rate in ("1e-3", "3e-3")),
)

MEASURED = {
    "time", "tokens_per_second", "steps_per_second", "mfu", "memory",
    "accuracy",  # of margins that begin at zero: their signs are rounding
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished `base`, and the sweeps to run."""
    spec = tiny.workspace(tmp_path_factory.mktemp("sweeps"))
    sums = (spec.parent / "sums.jsonl").read_text()
    (spec.parent / "pairs.jsonl").write_text(sums)
    text = spec.read_text()
    spec.write_text(text[: text.index("stage baseline")] + STAGES)
    tiny.run(spec, only=["base"])
    return spec


@pytest.fixture(scope="module")
def in_turn(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tiny.copy(workspace, tmp_path_factory.mktemp("turn") / "copy")
    tiny.run(spec)
    return spec


@pytest.fixture(scope="module")
def fused(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tiny.copy(workspace, tmp_path_factory.mktemp("fused") / "copy")
    heard = tiny.run(spec, *FUSED)
    done = [line for line in heard.lines if line.endswith("done")]
    assert done == [f"{node} done" for node in BRANCHES]
    return spec


def metrics(spec: Path, node: str) -> list[dict[str, float]]:
    prepared, store = tiny.planned(spec)
    return store.folder(prepared.plan.by_node[node].digest).metrics().rows


def close(one: Path, other: Path, node: str) -> None:
    first, second = tiny.params(one, node), tiny.params(other, node)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=2e-4, err_msg=f"{node} {name}")


@pytest.mark.parametrize("node", BRANCHES)
def test_each_branch_is_what_it_is_by_itself(in_turn: Path, fused: Path, node: str) -> None:
    close(in_turn, fused, node)
    alone, beside = metrics(in_turn, node), metrics(fused, node)
    assert [row["step"] for row in alone] == [row["step"] for row in beside]
    for one, other in zip(alone, beside, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - MEASURED:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-3, atol=1e-4, err_msg=name)


def test_the_plan_knows_one_program(workspace: Path) -> None:
    prepared, _ = tiny.planned(workspace, *FUSED)
    for node in BRANCHES:
        assert prepared.layout(node).branches == (3 if node.startswith("tuned") else 2)
    assert not tiny.planned(workspace)[0].fused  # on a CPU, one after another


def test_an_interrupted_sweep_goes_on_together(
    workspace: Path, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    only = {"only": ["tuned"]}
    prepared, store = tiny.planned(spec, *FUSED, **only)
    steps: list[int] = []
    due = training_loop.CheckpointSchedule.due

    def noted(saving: training_loop.CheckpointSchedule, step: int) -> bool:
        steps.append(step)
        # The user asks for it when the first branch has looked at step 3: all go on to the next.
        saving.stopping = lambda: steps.count(3) > 1 or steps[-1] > 3
        return due(saving, step)

    monkeypatch.setattr(training_loop.CheckpointSchedule, "due", noted)
    with pytest.raises(Interrupted):
        execute(prepared, store, tiny.Heard())
    monkeypatch.undo()
    again, _ = tiny.planned(spec, *FUSED, **only)
    assert {each.state.step for each in again.plan.stages if each.stage == "tuned"} == {4}
    assert set(again.fused) == set(BRANCHES[:3])
    crashed = tiny.copy(spec, tmp_path / "crashed")  # one of them had not saved yet
    held = Store(crashed.parent / ".tune").folder(again.plan.by_node[BRANCHES[1]].digest)
    shutil.rmtree(held.checkpoints / "4")
    assert set(tiny.planned(crashed, *FUSED, **only)[0].fused) == {BRANCHES[0], BRANCHES[2]}
    tiny.run(spec, *FUSED, **only)
    for node in BRANCHES[:3]:
        close(spec, fused, node)


def test_only_what_is_left_is_trained_together(
    workspace: Path, fused: Path, tmp_path: Path
) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    tiny.run(spec, only=[BRANCHES[0]])
    heard = tiny.run(spec, *FUSED, only=["tuned"])
    assert f"{BRANCHES[0]} again" in heard.lines
    for node in BRANCHES[:3]:
        close(spec, fused, node)


def test_a_branch_that_diverges_leaves_the_others(workspace: Path, tmp_path: Path) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    spec.write_text(
        spec.read_text().replace("adamw(lr = each(1e-3, 1e-2", "sgd(lr = each(1e-3, 1e38")
    )
    with pytest.raises(StageFailed) as caught:
        tiny.run(spec, *FUSED, only=["tuned"])
    assert caught.value.node == "tuned[optimizer.lr=1e38]"
    assert isinstance(caught.value.__cause__, DivergedError)
    states = {each.node: each.state.kind for each in tiny.planned(spec)[0].plan.stages}
    kinds = [states[f"tuned[optimizer.lr={rate}]"] for rate in ("1e-3", "1e38", "2e-2")]
    assert kinds == ["up to date", "to run", "up to date"]


def test_what_cannot_be_one_program_says_why(workspace: Path, tmp_path: Path) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    text = spec.read_text()
    for change, why in (
        (("length = 7 steps", "length = each(7 steps, 8 steps)"), "more than the learning rate"),
        (("length = 7 steps", "length = 7 steps, offload = optimizer"), "memory of the host"),
    ):
        spec.write_text(text.replace(*change))
        with pytest.raises(StageFailed) as caught:
            tiny.planned(spec, *FUSED)
        assert caught.value.stage == "tuned"
        assert why in str(caught.value.__cause__)
        assert caught.value.__cause__.attribute == "sweep"  # type: ignore[attr-defined]
