"""A chain of stages with adapters: each stage starts from the result of the stage before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny
from tests.pipeline.test_pretrained import spec as spec
from tunelang.runtime.errors import StageFailed
from tunelang.runtime.loading.initial_weights import load_merged
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.pipeline.weight_sources import WeightSources
from tunelang.runtime.sharding import make_layout

STAGES = """
reward early = matches("{completion}", /.*[a-m].*/)

stage first : sft {
  from      = small
  data      = sums
  length    = 6 steps
  batch     = 4 sequences
  adapter   = lora(rank = 2, alpha = 4)
  optimizer = adamw(lr = 1e-2)
  evals     = [fluency]
  checkpoint_every = 2 steps
  log_every = 1 step
  mesh      = axes(data = 1)
}

stage stacked : grpo {
  from      = first
  data      = sums
  reward    = early
  group     = 8
  batch     = 2 prompts
  length    = 2 steps
  rollout   = sampling(max_tokens = 4)
  kl        = k3(0.1)
  adapter   = dora(rank = 2)
  optimizer = adamw(lr = 1e-2)
  evals     = [fluency]
  log_every = 1 step
  mesh      = axes(data = 1)
}

stage further : sft {
  from      = stacked
  data      = sums
  length    = 2 steps
  batch     = 4 sequences
  adapter   = continued
  optimizer = adamw(lr = 1e-2)
  evals     = [fluency]
  log_every = 1 step
  mesh      = axes(data = 1)
}

stage whole : sft {
  from      = further
  data      = sums
  length    = 2 steps
  batch     = 4 sequences
  optimizer = adamw(lr = 1e-3)
  evals     = [fluency]
  log_every = 1 step
  mesh      = axes(data = 1)
}
"""


@pytest.fixture
def chain(spec: Path) -> Path:
    """The workspace of `test_pretrained`, with a chain of adapters."""
    text = spec.read_text()
    spec.write_text(text[: text.index("stage baseline")] + STAGES)
    return spec


def test_stage_starts_from_the_result_before_it(chain: Path) -> None:
    text = chain.read_text().replace('path = "small"', 'path = "small", weights = nf4')
    chain.write_text(text)
    recorder = tiny.run(chain)
    assert recorder.lines == [f"{name} done" for name in ("first", "stacked", "further", "whole")]
    prepared, store = tiny.plan(chain)
    assert {stage.state.kind for stage in prepared.plan.stages} == {"up to date"}
    # Adapters alone are kept.
    names = tiny.params(chain, "stacked")
    assert {name.split(".")[-3] for name in names} == {"adapters"}
    assert {name.split(".")[-2] for name in names} == {"1"}
    # Each stage begins with what the one before ended with, and learned something.
    last = None
    tolerance = 1e-4
    for node in ("first", "stacked", "further", "whole"):
        rows = store.folder(prepared.plan.by_node[node].digest).metrics().rows
        losses = [row["fluency.loss"] for row in rows if "fluency.loss" in row]
        if last is not None and losses[0] != last:  # else it was known
            assert abs(losses[0] - last) < tolerance
        assert abs(losses[-1] - losses[0]) > 1e-5
        last = losses[-1]
    rows = store.folder(prepared.plan.by_node["stacked"].digest).metrics().rows
    first = next(row for row in rows if "loss" in row)
    # The reference is the adapter's beginning; the sampler's adapters are the trainer's.
    assert abs(first["kl"]) < 1e-6
    assert first["mismatch_max"] < 1e-3


def test_resumed_run_equals_the_uninterrupted_one(chain: Path, tmp_path: Path) -> None:
    tiny.run(chain, only=["first"])
    expected = tiny.params(chain, "first")
    copy = tiny.copy(chain, tmp_path / "other")
    folder = tiny.stage_folder(copy, "first")
    # As if it had been stopped at step 4.
    subprocess.run(["rm", "-rf", str(copy.parent / ".tune")], check=True)
    step = _run_until_step(copy, 4)
    assert step == 4
    assert folder.steps()[-1] == 4
    tiny.run(copy, only=["first"])
    resumed = tiny.params(copy, "first")
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value)


def _run_until_step(spec: Path, step: int) -> int:
    """Run the first stage until a step, and end as after Ctrl-C."""
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.pipeline import tiny\n"
        "class Stopping(tiny.Recorder):\n"
        "    def step(self, step, steps, values):\n"
        f"        if step >= {step - 1}: os.kill(os.getpid(), signal.SIGINT)\n"
        "tiny.Recorder = Stopping\n"
        "from tunelang.runtime.errors import Interrupted\n"
        "try: tiny.run(Path(sys.argv[1]), only=['first'])\n"
        "except Interrupted: pass\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(spec)], check=True, env=tiny.environment(), timeout=300
    )
    return tiny.stage_folder(spec, "first").steps()[-1]


def test_loaded_weights_contain_the_adapters(chain: Path) -> None:
    tiny.run(chain, only=["first", "stacked"])
    prepared, store = tiny.plan(chain)
    resources = Resources(prepared.program, store.root / "cache", ())
    sources = WeightSources(prepared.plan, prepared.graph, store, prepared.program)
    weights = {}
    for node in ("first", "stacked"):
        steps = store.folder(prepared.plan.by_node[node].digest).steps()
        origin = sources.at_step(node, steps[-1])
        params = load_merged(origin, resources.model(origin.model), make_layout(), 0)
        weights[node] = np.asarray(params["blocks"]["attention"]["q"]["weight"][...])
    assert np.abs(weights["first"] - weights["stacked"]).max() > 1e-6


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        (("rank = 2, alpha = 4", "targets = [head]"), "no matrix of the model is called `head`", 1),
        (("rank = 2, alpha = 4", "targets = [/nowhere/]"), "called `nowhere`", 1),
        (("dora(rank = 2)", "dora(targets = [embed])"), "`dora` is for the matrices of blocks", 1),
    ],
)
def test_target_without_a_matrix_is_an_error(
    chain: Path, change: tuple[str, str], words: str, code: int
) -> None:
    chain.write_text(chain.read_text().replace(*change))
    done = tiny.tune("plan", chain)
    assert done.returncode == code, done.stderr
    assert "error[no-target]" in done.stderr
    assert words in done.stderr


def test_lost_result_below_an_adapter_is_named(chain: Path) -> None:
    tiny.run(chain, only=["first", "stacked"])
    folder = tiny.stage_folder(chain, "first")
    (folder.path / "done").unlink(missing_ok=True)
    (folder.path / "done.json").unlink(missing_ok=True)
    with pytest.raises(StageFailed) as failed:
        tiny.run(chain, only=["further"])
    assert "first" in str(failed.value.__cause__)
