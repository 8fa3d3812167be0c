"""Branches of a sweep in one program, against the same branches one after another."""

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
    """A pipeline that has run `base`, with the sweeps still to run."""
    spec = tiny.workspace(tmp_path_factory.mktemp("sweeps"))
    sums = (spec.parent / "sums.jsonl").read_text()
    (spec.parent / "pairs.jsonl").write_text(sums)
    text = spec.read_text()
    spec.write_text(text[: text.index("stage baseline")] + STAGES)
    tiny.run(spec, only=["base"])
    return spec


@pytest.fixture(scope="module")
def in_turn(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the sweeps, branch after branch."""
    spec = tiny.copy(workspace, tmp_path_factory.mktemp("turn") / "copy")
    tiny.run(spec)
    return spec


@pytest.fixture(scope="module")
def fused(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the sweeps, the branches of each in one program."""
    spec = tiny.copy(workspace, tmp_path_factory.mktemp("fused") / "copy")
    recorder = tiny.run(spec, *FUSED)
    done = [line for line in recorder.lines if line.endswith("done")]
    assert done == [f"{node} done" for node in BRANCHES]
    return spec


def assert_params_close(one: Path, other: Path, node: str) -> None:
    """Assert that a stage has nearly the same parameters in two runs."""
    first, second = tiny.params(one, node), tiny.params(other, node)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=2e-4, err_msg=f"{node} {name}")


@pytest.mark.parametrize("node", BRANCHES)
def test_fused_branch_equals_the_branch_alone(in_turn: Path, fused: Path, node: str) -> None:
    assert_params_close(in_turn, fused, node)
    alone, together = tiny.metrics(in_turn, node), tiny.metrics(fused, node)
    assert [row["step"] for row in alone] == [row["step"] for row in together]
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - MEASURED:
            np.testing.assert_allclose(one[name], other[name], rtol=2e-3, atol=1e-4, err_msg=name)


def test_plan_counts_the_branches_of_a_program(workspace: Path) -> None:
    prepared, _ = tiny.plan(workspace, *FUSED)
    for node in BRANCHES:
        assert prepared.layout(node).branches == (3 if node.startswith("tuned") else 2)
    assert not tiny.plan(workspace)[0].fused  # on a CPU, one after another


def test_interrupted_sweep_resumes_in_one_program(
    workspace: Path, fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    only = {"only": ["tuned"]}
    prepared, store = tiny.plan(spec, *FUSED, **only)
    steps: list[int] = []
    due = training_loop.CheckpointSchedule.due

    def record_step(saving: training_loop.CheckpointSchedule, step: int) -> bool:
        steps.append(step)
        # The user asks for it when the first branch has looked at step 3: all go on to the next.
        saving.stopping = lambda: steps.count(3) > 1 or steps[-1] > 3
        return due(saving, step)

    monkeypatch.setattr(training_loop.CheckpointSchedule, "due", record_step)
    with pytest.raises(Interrupted):
        execute(prepared, store, tiny.Recorder())
    monkeypatch.undo()
    again, _ = tiny.plan(spec, *FUSED, **only)
    assert {stage.state.step for stage in again.plan.stages if stage.stage == "tuned"} == {4}
    assert set(again.fused) == set(BRANCHES[:3])
    crashed = tiny.copy(spec, tmp_path / "crashed")  # one of them had not saved yet
    folder = Store(crashed.parent / ".tune").folder(again.plan.by_node[BRANCHES[1]].digest)
    shutil.rmtree(folder.checkpoints / "4")
    assert set(tiny.plan(crashed, *FUSED, **only)[0].fused) == {BRANCHES[0], BRANCHES[2]}
    tiny.run(spec, *FUSED, **only)
    for node in BRANCHES[:3]:
        assert_params_close(spec, fused, node)


def test_unfinished_branches_are_trained_together(
    workspace: Path, fused: Path, tmp_path: Path
) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    tiny.run(spec, only=[BRANCHES[0]])
    recorder = tiny.run(spec, *FUSED, only=["tuned"])
    assert f"{BRANCHES[0]} again" in recorder.lines
    for node in BRANCHES[:3]:
        assert_params_close(spec, fused, node)


def test_diverged_branch_does_not_stop_the_others(workspace: Path, tmp_path: Path) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    spec.write_text(
        spec.read_text().replace("adamw(lr = each(1e-3, 1e-2", "sgd(lr = each(1e-3, 1e38")
    )
    with pytest.raises(StageFailed) as caught:
        tiny.run(spec, *FUSED, only=["tuned"])
    assert caught.value.node == "tuned[optimizer.lr=1e38]"
    assert isinstance(caught.value.__cause__, DivergedError)
    states = {stage.node: stage.state.kind for stage in tiny.plan(spec)[0].plan.stages}
    kinds = [states[f"tuned[optimizer.lr={rate}]"] for rate in ("1e-3", "1e38", "2e-2")]
    assert kinds == ["up to date", "to run", "up to date"]


def test_sweep_that_cannot_be_fused_is_an_error(workspace: Path, tmp_path: Path) -> None:
    spec = tiny.copy(workspace, tmp_path / "copy")
    text = spec.read_text()
    for change, why in (
        (("length = 7 steps", "length = each(7 steps, 8 steps)"), "more than the learning rate"),
        (("length = 7 steps", "length = 7 steps, offload = optimizer"), "memory of the host"),
    ):
        spec.write_text(text.replace(*change))
        with pytest.raises(StageFailed) as caught:
            tiny.plan(spec, *FUSED)
        assert caught.value.stage == "tuned"
        assert why in str(caught.value.__cause__)
        assert caught.value.__cause__.attribute == "sweep"  # type: ignore[attr-defined]
