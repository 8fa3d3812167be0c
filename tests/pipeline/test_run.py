"""A pipeline of three sessions, run from a spec: what is done, what is reused, what is shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tiny.workspace(tmp_path_factory.mktemp("run"))
    heard = tiny.run(spec)
    assert heard.lines[0] == "base done"
    return spec


def states(spec: Path, *sets: str) -> dict[str, str]:
    prepared, _ = tiny.planned(spec, *sets)
    return {stage.node: stage.state.kind for stage in prepared.plan.stages}


def test_everything_is_done_and_then_up_to_date(spec: Path) -> None:
    assert set(states(spec).values()) == {"up to date"}
    heard = tiny.run(spec)
    assert all("again" in line for line in heard.lines)


def test_a_changed_rate_runs_the_sweep_and_what_follows(spec: Path) -> None:
    prepared, _ = tiny.planned(spec, "rates=3e-3")
    found = {stage.stage: stage.state for stage in prepared.plan.stages}
    assert found["base"].kind == found["baseline"].kind == "up to date"
    assert found["specialist"].kind == found["generalist"].kind == "to run"
    paths = {change.path for change in found["specialist"].changes}
    assert paths == {"optimizer.lr"}


def test_training_lowers_the_loss(spec: Path) -> None:
    prepared, store = tiny.planned(spec)
    rows = store.folder(prepared.plan.by_node["baseline"].digest).metrics().rows
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert rows[0]["step"] == 0
    assert {"accuracy.score", "fluency.loss", "fluency.perplexity"} <= rows[0].keys()
    evaluated = [row["step"] for row in rows if "accuracy.score" in row]
    assert evaluated == [0, 5, 10, 12]


def test_metrics_of_a_policy_stage(spec: Path) -> None:
    prepared, store = tiny.planned(spec)
    folder = store.folder(prepared.plan.by_node["generalist"].digest)
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


def test_the_better_branch_goes_on(spec: Path) -> None:
    prepared, store = tiny.planned(spec)
    scores = {}
    for node in prepared.graph.by_stage["specialist"]:
        done = store.folder(prepared.plan.by_node[node].digest).done()
        assert done is not None
        scores[node] = done["summary"]["metrics"]["accuracy.score"]
    last = store.folder(prepared.plan.by_node["generalist"].digest).done()
    assert last is not None
    assert scores[last["summary"]["from"]] == max(scores.values())


def test_a_forced_stage_gives_the_same_again(spec: Path, tmp_path: Path) -> None:
    other = tiny.copy(spec, tmp_path / "forced")
    before = tiny.params(other, "baseline")
    assert "baseline done" in tiny.run(other, force=["baseline"]).lines
    after = tiny.params(other, "baseline")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_events_for_tensorboard(tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "events")
    spec.write_text(spec.read_text().replace(", track = []", ""))
    tiny.run(spec, only=["base"])
    events = list(spec.parent.glob(".tune/stages/*/tensorboard/events*"))
    assert len(events) == 1
    assert b"fluency.loss" in events[0].read_bytes()


def test_only_and_until(spec: Path, tmp_path: Path) -> None:
    other = tiny.workspace(tmp_path / "parts")
    assert tiny.run(other, until=["base"]).lines == ["base done"]
    assert states(other)["baseline"] == "to run"


# Meshes of one axis: programs with collectives over crossing groups can starve each other on the
# few threads of simulated devices. `tests/runtime/test_train.py` has mixed ones.
@pytest.mark.parametrize("mesh", ["axes(data = 4)", "axes(fsdp = 4)", "axes(tensor = 2)"])
def test_other_meshes_and_micro_batches_give_the_same(
    spec: Path, tmp_path: Path, mesh: str
) -> None:
    """Up to rounding: sums are taken in another order."""
    other = tiny.workspace(tmp_path / "mesh")
    sets = [f"stage.{name}.mesh={mesh}" for name in ("base", "baseline", "generalist")]
    sets += ["stage.baseline.micro_batch=1 sequence", "stage.specialist.mesh=axes(data = 2)"]
    tiny.run(other, *sets, until=["baseline"])
    one, many = tiny.params(spec, "baseline"), tiny.params(other, "baseline", *sets)
    for name in one:
        np.testing.assert_allclose(one[name], many[name], atol=2e-4, rtol=2e-3, err_msg=name)


# The command.


def tune(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tunelang.runtime", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=tiny.environment(),
        check=False,
    )


def test_run_again_says_so_at_once(spec: Path) -> None:
    done = tune("run", spec)
    assert done.returncode == 0, done.stderr
    assert "everything is up to date" in done.stderr
    assert "generalist" in done.stdout
    assert "→" in done.stdout


def test_plan_graph_and_show(spec: Path) -> None:
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


def test_generate_and_chat(spec: Path) -> None:
    found = tune("generate", spec, "generalist", "1+1=", "--max-tokens", "4", "-n", "2")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) >= 2
    command = [sys.executable, "-m", "tunelang.runtime", "chat", str(spec), "baseline"]
    talk = subprocess.run(
        command, input="2+1=\n\n", capture_output=True, text=True, timeout=120,
        env=tiny.environment(), check=False,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr


def test_run_refuses_to_start_without_what_a_stage_reads(tmp_path: Path) -> None:
    other = tiny.workspace(tmp_path / "missing")
    found = tune("run", other, "--only", "baseline")
    assert found.returncode == 3
    assert "missing-input" in found.stderr
    assert "`base` is not done, and this command does not run it" in found.stderr
    assert "--until baseline" in found.stderr
    assert not list(other.parent.glob(".tune/runs/*"))


def test_wrong_words_of_the_command(spec: Path) -> None:
    assert "no stage is called `nobody`" in tune("run", spec, "--only", "nobody").stderr
    found = tune(
        "plan", spec, "--set", "stage.base.mesh=axes(data = 64)", "--set",
        "stage.base.batch=64 sequences",
    )  # fmt: skip
    assert found.returncode == 1
    assert "cannot-lay-out" in found.stderr
    assert "tiny.tune" in found.stderr


def test_a_rollout_on_a_mesh_of_its_own_changes_nothing(spec: Path, tmp_path: Path) -> None:
    other = tiny.copy(spec, tmp_path / "mesh")
    text = other.read_text().replace("each(rates, 2 * rates)", "rates")
    i = text.index("stage specialist")
    head, tail = text[:i], text[i : text.index("stage generalist")]
    found = []
    for mesh in (
        "mesh = axes(data = 1), evals = [fluency]",
        "mesh = axes(fsdp = 4), decode_mesh = axes(data = 2, tensor = 2), evals = [accuracy]",
    ):
        tail_here = tail.replace("keep             = best(accuracy)\n", "")
        tail_here = tail_here.replace("evals            = [accuracy]\n", "")
        other.write_text(head + tail_here.replace("mesh             = axes(data = 1)", mesh))
        tiny.run(other)
        prepared, store = tiny.planned(other)
        node = prepared.plan.by_node["specialist"]
        found.append([row for row in store.folder(node.digest).metrics().rows if "loss" in row])
    for one, two in zip(*found, strict=True):
        for name in ("reward", "length", "grad_norm", "loss", "entropy"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
