"""Runs that are killed, stopped, doubled or damaged, against one uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny
from tunelang.runtime.training.checkpoints import Checkpoints

RUN = [sys.executable, "-m", "tunelang.runtime", "run"]
KILLS = 12


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the pipeline."""
    spec = tiny.workspace(tmp_path_factory.mktemp("whole"))
    tiny.run(spec)
    return spec


def start(spec: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `tune run` in a process."""
    return subprocess.Popen(
        [*RUN, str(spec), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tiny.environment(),
    )


def run_and_kill_in_a_checkpoint(spec: Path, seed: int) -> bool:
    """Run, and kill the process a random time after it began to write a checkpoint.

    Returns whether it was killed.
    """
    script = f"""
import os, random, signal, sys, time
from pathlib import Path
import tests.pipeline.tiny as tiny
from tunelang.runtime.training.checkpoints import Checkpoints

choose = random.Random({seed})
save, left = Checkpoints.save, choose.randrange(5)

def save_and_die(self, *arguments, **named):
    global left
    save(self, *arguments, **named)
    left -= 1
    if left < 0:
        time.sleep(choose.random() * 0.06)
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
tiny.run(Path({str(spec)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=tiny.environment(), capture_output=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0


def assert_same_params(one: Path, other: Path) -> None:
    """Assert that every stage of two runs has equal parameters."""
    prepared, _ = tiny.plan(one)
    for node in prepared.graph.nodes:
        first, second = tiny.params(one, node), tiny.params(other, node)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{node} {name}")


def metrics(spec: Path, node: str) -> list[dict[str, object]]:
    """Read the metrics of a stage, without those that differ from run to run."""
    return tiny.without_timing(tiny.metrics(spec, node))


@pytest.mark.slow
def test_run_killed_inside_checkpoints_ends_bit_equal(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "killed")
    kills = sum(run_and_kill_in_a_checkpoint(spec, seed) for seed in range(KILLS))
    assert kills >= 4
    tiny.run(spec)
    assert_same_params(finished, spec)
    for node in ("baseline", "generalist"):
        assert metrics(finished, node) == metrics(spec, node)


@pytest.mark.slow
def test_run_killed_at_random_instants_ends_bit_equal(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "killed")
    choose = random.Random(7)
    kills = 0
    for _ in range(KILLS // 2):
        process = start(spec)
        try:
            process.communicate(timeout=choose.uniform(3, 14))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills
    tiny.run(spec)
    assert_same_params(finished, spec)


def test_sigint_saves_and_exits_130(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "stopped")
    text = spec.read_text().replace("length           = 8 steps", "length           = 20000 steps")
    spec.write_text(text.replace("checkpoint_every = 3 steps\n", "\n", 1))
    process = start(spec, "--only", "base")
    stages = spec.parent / ".tune" / "stages"
    end = time.monotonic() + 60
    while not any(p.stat().st_size > 2000 for p in stages.glob("*/metrics.jsonl")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    prepared, _ = tiny.plan(spec)
    assert prepared.plan.by_node["base"].state.kind == "resume"


def test_two_runs_at_once_wait_for_each_other(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "both")
    first, second = start(spec), start(spec)
    stderr = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], stderr
    assert "waiting for process" in "".join(stderr)
    assert_same_params(finished, spec)


def run_until_checkpoint(spec: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the first stage up to a checkpoint; returns its folder."""

    class StopError(Exception):
        pass

    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, step: int, *arguments: object) -> None:
        save(self, step, *arguments)
        if step >= steps:
            self.wait()
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(Exception, match="base"):
            tiny.run(spec, only=["base"])
    return tiny.stage_folder(spec, "base").path


def test_damaged_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny.workspace(tmp_path / "damaged")
    folder = run_until_checkpoint(spec, 6, monkeypatch)
    latest = folder / "checkpoints" / "6"
    for path in latest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = sorted(str(path) for path in folder.rglob("*"))
    process = start(spec, "--only", "base")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert "error[store-fails]: cannot read" in stderr
    assert "checkpoints/6" in stderr
    assert "to continue from the checkpoint before" in stderr
    assert "Traceback" not in stderr
    assert set(before) <= {str(path) for path in folder.rglob("*")}


def test_damaged_line_of_metrics_is_skipped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.workspace(tmp_path / "lines")
    folder = run_until_checkpoint(spec, 3, monkeypatch)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo\xff\n{"cut')
    tiny.run(spec, only=["base"])
    assert metrics(spec, "base") == metrics(finished, "base")


def test_full_disk_is_an_error(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files makes writes fail, in Python and inside Orbax."""
    spec = tiny.workspace(tmp_path / "full")
    run_until_checkpoint(spec, 3, monkeypatch)
    script = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from tunelang.runtime.cli import main
sys.argv = ["tune", "run", sys.argv[1], "--only", "base"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(spec)],
        env={**tiny.environment(), "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "error[store-fails]: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    tiny.run(spec)
    assert_same_params(finished, spec)


def test_run_records_its_plan(finished: Path) -> None:
    runs = sorted((finished.parent / ".tune" / "runs").glob("*.json"))
    entry = json.loads(runs[-1].read_text())
    assert entry["outcome"] == "done"
    assert {stage["node"] for stage in entry["plan"]["stages"]} >= {"base", "generalist"}
    assert os.path.exists(finished.parent / ".tune" / ".gitignore")
