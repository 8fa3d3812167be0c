"""PPO in a pipeline: rewards and values against those at the start; resumed against full runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipeline import tiny
from tunelang.runtime.training.checkpoints import Checkpoints

STAGES = """
reward brief = 2.0 - 1.0 * length()

stage apart : ppo {{ from = baseline, {REST}
  reward = brief, length = 8 steps, checkpoint_every = 3 steps, optimizer = adamw(lr = 3e-3)
  kl = k1(0.02, at = reward), kl_target = 0.5, kl_horizon = 100
  critic = critic(optimizer = adamw(lr = 1e-2)) }}

stage joint : ppo {{ from = baseline, {REST}
  reward = brief, length = 8 steps, checkpoint_every = 3 steps, optimizer = adamw(lr = 3e-3)
  critic = critic(trunk = shared, optimizer = adamw(lr = 1e-2)), kl = k3(0.01) }}

data pairs : jsonl {{ path = "sums.jsonl", prompt = "{{a}}+{{b}}=", chosen = "{{c}}"
  rejected = "{{a}}{{b}}{{c}}" }}
stage judge : reward_model {{ from = baseline, data = pairs, length = 4 steps
  batch = 8 sequences, mesh = axes(data = 1) }}
reward helpful : learned {{ from = judge }}

stage adapted : ppo {{ from = baseline, {REST}
  reward = helpful, value_model = judge, length = 3 steps, group = 2, checkpoint_every = 1 step
  adapter = lora(rank = 4), optimizer = adamw(lr = 1e-2) }}
"""
REST = (
    "data = sums, batch = 16 prompts, passes = 2, minibatches = 2, log_every = 1 step,"
    " rollout = sampling(max_tokens = 2), mesh = axes(data = 1)"
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that has run three stages `ppo` with different critics."""
    spec = tiny.workspace(tmp_path_factory.mktemp("ppo"))
    text = spec.read_text()
    spec.write_text(text[: text.index("stage specialist")] + STAGES.format(REST=REST))
    tiny.run(spec)
    return spec


def step_metrics(spec: Path, stage: str) -> list[dict[str, Any]]:
    """Read the metrics of steps, without those that differ from run to run."""
    return tiny.without_timing(tiny.step_metrics(spec, stage))


@pytest.mark.parametrize("stage", ["apart", "joint"])
def test_ppo_raises_the_reward_and_fits_the_values(spec: Path, stage: str) -> None:
    rows = step_metrics(spec, stage)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.2
    assert rows[0]["value"] == 0  # its head begins with zeros
    assert rows[-1]["value"] == pytest.approx(rows[-1]["return"], abs=0.3)
    assert {"explained_variance", "critic_grad_norm", "value_clip"} <= rows[0].keys()


def test_coefficient_of_the_divergence_adapts(spec: Path) -> None:
    coefficients = [row["kl_coefficient"] for row in step_metrics(spec, "apart")]
    assert coefficients[1] == pytest.approx(0.02 * (1 - 0.2 * 16 / 100))  # nothing has moved yet
    assert all(0.96 < b / a < 1.04 for a, b in pairwise(coefficients))


@pytest.mark.parametrize("stage", ["apart", "joint"])
def test_result_is_the_policy_without_the_critic(spec: Path, stage: str) -> None:
    before, after = tiny.params(spec, "baseline"), tiny.params(spec, stage)
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_critic_starts_from_the_reward_model(spec: Path) -> None:
    rows = step_metrics(spec, "adapted")
    assert rows[0]["value"] != 0
    names = tiny.params(spec, "adapted")
    assert names
    assert all("adapters" in name for name in names)


@pytest.mark.parametrize(
    ("stage", "sets"),
    [
        ("apart", []),
        ("joint", []),
        ("adapted", []),
        ("apart", ["stage.apart.offload=both"]),
        ("joint", ["stage.joint.offload=optimizer"]),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    spec: Path, tmp_path: Path, stage: str, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; up to rounding where moments and the reference lie at the host, against a run
    where they do not.
    """

    class StopError(Exception):
        pass

    copy = tiny.copy(spec, tmp_path / "copy")
    save = Checkpoints.save

    def save_and_stop(self: Checkpoints, step: int, *arguments: object) -> None:
        save(self, step, *arguments)
        self.wait()
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(Exception, match=stage):
            tiny.run(copy, *sets, only=[stage], force=[stage])
    prepared, _ = tiny.plan(copy, *sets, only=[stage])
    assert prepared.plan.by_node[stage].state.kind == "resume"
    tiny.run(copy, *sets, only=[stage])
    expected, resumed = tiny.params(spec, stage), tiny.params(copy, stage)
    if sets:
        for name in expected:
            np.testing.assert_allclose(expected[name], resumed[name], atol=1e-5, err_msg=name)
        return
    assert step_metrics(copy, stage) == step_metrics(spec, stage)
    for name in expected:
        np.testing.assert_array_equal(expected[name], resumed[name], err_msg=name)
