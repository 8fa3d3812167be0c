"""Runs that are killed, stopped, doubled, or that meet broken files: nothing is lost."""

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
    """A run that nothing interrupted."""
    spec = tiny.workspace(tmp_path_factory.mktemp("whole"))
    tiny.run(spec)
    return spec


def start(spec: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*RUN, str(spec), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tiny.environment(),
    )


def killed_inside_a_checkpoint(spec: Path, seed: int) -> bool:
    """Run, and kill the process a random time after one of its checkpoints began to be written;
    returns whether it came to that.
    """
    script = f"""
import os, random, signal, sys, time
from pathlib import Path
import tests.pipeline.tiny as tiny
from tunelang.runtime.training.checkpoints import Checkpoints

choose = random.Random({seed})
save, left = Checkpoints.save, choose.randrange(5)

def then_die(self, *arguments, **named):
    global left
    save(self, *arguments, **named)
    left -= 1
    if left < 0:
        time.sleep(choose.random() * 0.06)
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = then_die
tiny.run(Path({str(spec)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=tiny.environment(), capture_output=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode != 0


def same(one: Path, other: Path) -> None:
    prepared, _ = tiny.planned(one)
    for node in prepared.graph.nodes:
        first, second = tiny.params(one, node), tiny.params(other, node)
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{node} {name}")


def lines(spec: Path, node: str) -> list[dict[str, object]]:
    prepared, store = tiny.planned(spec)
    timing = {"time", "steps_per_second", "tokens_per_second", "mfu", "memory", "rollout_seconds"}
    rows = store.folder(prepared.plan.by_node[node].digest).metrics().rows
    return [{name: row[name] for name in row if name not in timing} for row in rows]


@pytest.mark.slow
def test_killed_inside_checkpoints_it_ends_bit_equal(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "killed")
    kills = sum(killed_inside_a_checkpoint(spec, seed) for seed in range(KILLS))
    assert kills >= 4
    tiny.run(spec)
    same(finished, spec)
    for node in ("baseline", "generalist"):
        assert lines(finished, node) == lines(spec, node)


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_bit_equal(finished: Path, tmp_path: Path) -> None:
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
    same(finished, spec)


def test_sigint_saves_and_exits_130(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "stopped")
    text = spec.read_text().replace("length           = 8 steps", "length           = 20000 steps")
    spec.write_text(text.replace("checkpoint_every = 3 steps\n", "\n", 1))
    process = start(spec, "--only", "base")
    metrics = spec.parent / ".tune" / "stages"
    end = time.monotonic() + 60
    while not any(p.stat().st_size > 2000 for p in metrics.glob("*/metrics.jsonl")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted" in said
    prepared, _ = tiny.planned(spec)
    assert prepared.plan.by_node["base"].state.kind == "resume"


def test_two_runs_at_once(finished: Path, tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path / "both")
    first, second = start(spec), start(spec)
    said = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert "waiting for process" in "".join(said)
    same(finished, spec)


def stopped_after(spec: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the first stage up to a checkpoint; returns the stage's folder."""

    class StopError(Exception):
        pass

    save = Checkpoints.save

    def then_stop(self: Checkpoints, step: int, *arguments: object) -> None:
        save(self, step, *arguments)
        if step >= steps:
            self.wait()
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", then_stop)
        with pytest.raises(Exception, match="base"):
            tiny.run(spec, only=["base"])
    prepared, store = tiny.planned(spec)
    return store.folder(prepared.plan.by_node["base"].digest).path


def test_a_damaged_checkpoint_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.workspace(tmp_path / "damaged")
    folder = stopped_after(spec, 6, monkeypatch)
    latest = folder / "checkpoints" / "6"
    for path in latest.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = sorted(str(path) for path in folder.rglob("*"))
    process = start(spec, "--only", "base")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3, said
    assert "error[store-fails]: cannot read" in said
    assert "checkpoints/6" in said
    assert "to continue from the checkpoint before" in said
    assert "Traceback" not in said
    assert set(before) <= {str(path) for path in folder.rglob("*")}


def test_a_damaged_line_of_metrics_is_left_out(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.workspace(tmp_path / "lines")
    folder = stopped_after(spec, 3, monkeypatch)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo\xff\n{"cut')
    tiny.run(spec, only=["base"])
    assert lines(spec, "base") == lines(finished, "base")


def test_a_full_disk_is_a_named_error(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files makes real writes fail, in Python and in Orbax's own code."""
    spec = tiny.workspace(tmp_path / "full")
    stopped_after(spec, 3, monkeypatch)
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
    same(finished, spec)


def test_the_plan_of_a_run_is_kept(finished: Path) -> None:
    runs = sorted((finished.parent / ".tune" / "runs").glob("*.json"))
    entry = json.loads(runs[-1].read_text())
    assert entry["outcome"] == "done"
    assert {stage["node"] for stage in entry["plan"]["stages"]} >= {"base", "generalist"}
    assert os.path.exists(finished.parent / ".tune" / ".gitignore")
