"""A pipeline of three sessions: states, metrics, results and commands of a finished run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny
from tests.pipeline.tiny import tune


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that has run to its end."""
    spec = tiny.workspace(tmp_path_factory.mktemp("run"))
    recorder = tiny.run(spec)
    assert recorder.lines[0] == "base done"
    return spec


def states(spec: Path, *sets: str) -> dict[str, str]:
    """Plan; returns the state of each stage."""
    prepared, _ = tiny.plan(spec, *sets)
    return {stage.node: stage.state.kind for stage in prepared.plan.stages}


def test_finished_run_is_up_to_date(spec: Path) -> None:
    assert set(states(spec).values()) == {"up to date"}
    recorder = tiny.run(spec)
    assert all("again" in line for line in recorder.lines)


def test_changed_rate_reruns_the_sweep_and_later_stages(spec: Path) -> None:
    prepared, _ = tiny.plan(spec, "rates=3e-3")
    states = {stage.stage: stage.state for stage in prepared.plan.stages}
    assert states["base"].kind == states["baseline"].kind == "up to date"
    assert states["specialist"].kind == states["generalist"].kind == "to run"
    paths = {change.path for change in states["specialist"].changes}
    assert paths == {"optimizer.lr"}


def test_training_lowers_the_loss(spec: Path) -> None:
    rows = tiny.metrics(spec, "baseline")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert rows[0]["step"] == 0
    assert {"accuracy.score", "fluency.loss", "fluency.perplexity"} <= rows[0].keys()
    evaluated = [row["step"] for row in rows if "accuracy.score" in row]
    assert evaluated == [0, 5, 10, 12]


def test_policy_stage_records_its_metrics_and_samples(spec: Path) -> None:
    folder = tiny.stage_folder(spec, "generalist")
    rows = [row for row in folder.metrics().rows if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {
        "reward", "reward_std", "reward/correct", "reward/short", "counts.reward", "advantage",
        "kl", "entropy", "clip_low", "clip_high", "length", "truncated", "flat_groups", "rounds",
        "mismatch_max", "tokens_per_second", "mfu", "memory", "rollout_seconds",
    } <= rows[-1].keys()  # fmt: skip
    # The sampler's log-probabilities are those of the training program.
    assert max(row["mismatch_max"] for row in rows) < 1e-4
    samples = folder.samples().rows
    assert {"prompt", "completion", "target", "reward", "parts", "source"} <= samples[0].keys()


def test_better_branch_is_the_input_of_the_next_stage(spec: Path) -> None:
    prepared, _ = tiny.plan(spec)
    scores = {
        node: tiny.summary(spec, node)["metrics"]["accuracy.score"]
        for node in prepared.graph.by_stage["specialist"]
    }
    assert scores[tiny.summary(spec, "generalist")["from"]] == max(scores.values())


def test_forced_stage_has_the_same_result(spec: Path, tmp_path: Path) -> None:
    other = tiny.copy(spec, tmp_path / "forced")
    before = tiny.params(other, "baseline")
    assert "baseline done" in tiny.run(other, force=["baseline"]).lines
    after = tiny.params(other, "baseline")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_run_writes_tensorboard_events(tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "events")
    spec.write_text(spec.read_text().replace(", track = []", ""))
    tiny.run(spec, only=["base"])
    events = list(spec.parent.glob(".tune/stages/*/tensorboard/events*"))
    assert len(events) == 1
    assert b"fluency.loss" in events[0].read_bytes()


def test_until_runs_no_later_stage(spec: Path, tmp_path: Path) -> None:
    other = tiny.workspace(tmp_path / "parts")
    assert tiny.run(other, until=["base"]).lines == ["base done"]
    assert states(other)["baseline"] == "to run"


# Meshes of one axis: programs with collectives over crossing groups can starve each other on the
# few threads of simulated devices. `tests/runtime/training/test_train_step.py` has mixed ones.
@pytest.mark.parametrize("mesh", ["axes(data = 4)", "axes(fsdp = 4)", "axes(tensor = 2)"])
def test_other_meshes_and_micro_batches_have_the_same_result(
    spec: Path, tmp_path: Path, mesh: str
) -> None:
    """Up to rounding: sums are taken in another order."""
    other = tiny.workspace(tmp_path / "mesh")
    sets = [f"stage.{name}.mesh={mesh}" for name in ("base", "baseline", "generalist")]
    sets += ["stage.baseline.micro_batch=1 sequence", "stage.specialist.mesh=axes(data = 2)"]
    tiny.run(other, *sets, until=["baseline"])
    expected, actual = tiny.params(spec, "baseline"), tiny.params(other, "baseline", *sets)
    for name in expected:
        np.testing.assert_allclose(expected[name], actual[name], atol=2e-4, rtol=2e-3, err_msg=name)


# The command.


def test_second_run_reports_up_to_date(spec: Path) -> None:
    done = tune("run", spec)
    assert done.returncode == 0, done.stderr
    assert "everything is up to date" in done.stderr
    assert "generalist" in done.stdout
    assert "→" in done.stdout


def test_plan_graph_and_show_print_the_pipeline(spec: Path) -> None:
    plan = tune("plan", spec, "--set", "lessons=13 steps", "-v")
    assert plan.returncode == 0, plan.stderr
    assert "`length`: 12 steps → 13 steps" in plan.stdout
    assert max(map(len, plan.stdout.splitlines())) <= 100
    assert '"stages"' in tune("plan", spec, "--json").stdout
    for form, mark in (
        ("text", "├─"),
        ("mermaid", "flowchart"),
        ("dot", "digraph"),
        ("svg", "<svg"),
    ):
        assert mark in tune("graph", spec, "--format", form).stdout
    shown = tune("show", spec, "generalist")
    assert shown.returncode == 0, shown.stderr
    assert "reward" in shown.stdout


def test_generate_and_chat_answer(spec: Path) -> None:
    generated = tune("generate", spec, "generalist", "1+1=", "--max-tokens", "4", "-n", "2")
    assert generated.returncode == 0, generated.stderr
    assert len(generated.stdout.splitlines()) >= 2
    command = [sys.executable, "-m", "tunelang.runtime", "chat", str(spec), "baseline"]
    chat = subprocess.run(
        command, input="2+1=\n\n", capture_output=True, text=True, timeout=120,
        env=tiny.environment(), check=False,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr


def test_run_without_a_stages_input_is_an_error(tmp_path: Path) -> None:
    other = tiny.workspace(tmp_path / "missing")
    done = tune("run", other, "--only", "baseline")
    assert done.returncode == 3
    assert "missing-input" in done.stderr
    assert "`base` is not done, and this command does not run it" in done.stderr
    assert "--until baseline" in done.stderr
    assert not list(other.parent.glob(".tune/runs/*"))


def test_unknown_stage_and_impossible_mesh_are_errors(spec: Path) -> None:
    assert "no stage is called `nobody`" in tune("run", spec, "--only", "nobody").stderr
    done = tune(
        "plan", spec, "--set", "stage.base.mesh=axes(data = 64)", "--set",
        "stage.base.batch=64 sequences",
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot-lay-out" in done.stderr
    assert "tiny.tune" in done.stderr


def test_rollout_on_another_mesh_has_the_same_metrics(spec: Path, tmp_path: Path) -> None:
    other = tiny.copy(spec, tmp_path / "mesh")
    text = other.read_text().replace("each(rates, 2 * rates)", "rates")
    i = text.index("stage specialist")
    head, tail = text[:i], text[i : text.index("stage generalist")]
    runs = []
    for mesh in (
        "mesh = axes(data = 1), evals = [fluency]",
        "mesh = axes(fsdp = 4), decode_mesh = axes(data = 2, tensor = 2), evals = [accuracy]",
    ):
        stage = tail.replace("keep             = best(accuracy)\n", "")
        stage = stage.replace("evals            = [accuracy]\n", "")
        other.write_text(head + stage.replace("mesh             = axes(data = 1)", mesh))
        tiny.run(other)
        runs.append(tiny.step_metrics(other, "specialist"))
    for one, two in zip(*runs, strict=True):
        for name in ("reward", "length", "grad_norm", "loss", "entropy"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
