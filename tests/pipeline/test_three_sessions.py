"""`specs/gemma_three_sessions.tune` planned as it is and run with a small random Gemma; the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline import tiny
from tests.runtime.rewards.test_endpoint import StandIn
from tests.small_gemma import write

SPECS = Path(__file__).parents[2] / "specs"
SPEC = "gemma_three_sessions.tune"
SMALL = (
    "run.on=none",
    "run.track=[]",
    "model.gemma.context=320",
    "eval.accuracy.max_tokens=16",
    "eval.accuracy.limit=4",
    "stage.baseline.batch=8 sequences",
    "stage.baseline.length=3 steps",
    *(
        f"stage.{stage}.{setting}"
        for stage in ("specialist", "generalist")
        for setting in (
            "batch=4 prompts",
            "group=4",
            "length=2 steps",
            "rollout=sampling(max_tokens = 16)",
        )
    ),
)


def tune(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `tune` in a folder, without the network."""
    return tiny.tune(*words, cwd=folder, timeout=400, HF_HUB_OFFLINE="1", **variables)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of `specs/`."""
    shutil.copytree(SPECS, tmp_path / "specs", ignore=shutil.ignore_patterns(".tune"))
    return tmp_path / "specs"


@pytest.fixture
def judge() -> Iterator[StandIn]:
    """A server that scores texts by their length."""
    server = StandIn()
    server.reply = lambda text: f'{{"scores": [{len(text) % 10}, 5, 1]}}'
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_spec_is_planned_for_the_real_model(folder: Path) -> None:
    done = tune(folder, "plan", SPEC)
    assert done.returncode == 0, done.stderr
    assert "6 to run; 32 × v5e" in done.stdout
    assert "64 × 2048 tokens" in done.stdout


@pytest.mark.slow
def test_spec_runs_with_a_small_model(folder: Path, judge: StandIn) -> None:
    small = folder / "small"
    write(small, (folder / "data/gsm8k/train.jsonl").read_text("utf-8").splitlines())
    sets = (
        *SMALL,
        'model.gemma.path="small"',
        f'reward.taste.judge=endpoint("{judge.url}", model = "judge")',
    )
    words = [word for setting in sets for word in ("--set", setting)]
    done = tune(folder, "run", SPEC, *words)
    assert done.returncode == 0, done.stderr
    assert "the winner is" in done.stderr  # one of the sweep
    assert "release  written to" in done.stderr
    assert (folder / "out" / "generalist" / "model.safetensors").exists()
    assert judge.requests  # the creative prompts
    again = tune(folder, "run", SPEC, *words)
    assert "everything is up to date" in again.stderr
    shown = tune(folder, "show", SPEC, "generalist", *words)
    assert "reward" in shown.stdout


# The hub's cache.


def put_into_cache(cache: Path, name: str, source: Path) -> None:
    """Put a folder into the hub's cache, as a download would."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(source, repository / "snapshots" / ("0" * 40))


HUB = """
run {{ seed = 3, track = [] }}
model small : pretrained {{ path = "some/{name}", context = 64 }}
data sums : jsonl {{ path = "sums.jsonl", prompt = "{{a}}+{{b}}=", response = "{{c}}" }}
stage tuned : sft {{
  from      = small
  data      = sums
  length    = 1 step
  batch     = 4 sequences
  adapter   = lora(rank = 2)
  mesh      = axes(data = 1)
}}
"""


def test_model_is_read_from_the_cache_of_the_hub(tmp_path: Path) -> None:
    tiny.workspace(tmp_path)
    cache = tmp_path / "hub"
    write(tmp_path / "model", ["some text"] * 3, vocabulary=300)
    put_into_cache(cache, "some/model", tmp_path / "model")
    (tmp_path / "hub.tune").write_text(HUB.format(name="model"))
    done = tune(tmp_path, "run", "hub.tune", HF_HUB_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    # Not there, and no network.
    (tmp_path / "other.tune").write_text(HUB.format(name="other"))
    for command in ("plan", "run"):
        done = tune(tmp_path, command, "other.tune", HF_HUB_CACHE=str(cache))
        assert done.returncode == 3, done.stderr
        assert "error[weights-fail]" in done.stderr
        assert "it is not in the hub's cache, and the hub cannot be reached" in done.stderr
        assert "hf download some/other" in done.stderr
        assert "other.tune:3:" in done.stderr
    assert not os.path.exists(tmp_path / "some")
