"""PPO run whole: a critic of its own, on the policy's trunk, from a reward model; and resumed."""

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
    spec = tiny.workspace(tmp_path_factory.mktemp("ppo"))
    text = spec.read_text()
    spec.write_text(text[: text.index("stage specialist")] + STAGES.format(REST=REST))
    tiny.run(spec)
    return spec


def rows(spec: Path, stage: str) -> list[dict[str, Any]]:
    prepared, store = tiny.planned(spec)
    found = store.folder(prepared.plan.by_node[stage].digest).metrics().rows
    timing = {"time", "steps_per_second", "tokens_per_second", "mfu", "memory", "rollout_seconds"}
    return [{n: v for n, v in row.items() if n not in timing} for row in found if "loss" in row]


@pytest.mark.parametrize("stage", ["apart", "joint"])
def test_it_learns(spec: Path, stage: str) -> None:
    found = rows(spec, stage)
    assert found[-1]["reward"] > found[0]["reward"] + 0.2
    assert found[0]["value"] == 0  # its head begins with zeros
    assert found[-1]["value"] == pytest.approx(found[-1]["return"], abs=0.3)
    assert {"explained_variance", "critic_grad_norm", "value_clip"} <= found[0].keys()


def test_the_coefficient_of_the_divergence_adapts(spec: Path) -> None:
    found = [row["kl_coefficient"] for row in rows(spec, "apart")]
    assert found[1] == pytest.approx(0.02 * (1 - 0.2 * 16 / 100))  # nothing has moved yet
    assert all(0.96 < b / a < 1.04 for a, b in pairwise(found))


@pytest.mark.parametrize("stage", ["apart", "joint"])
def test_what_it_yields_is_the_policy(spec: Path, stage: str) -> None:
    before, after = tiny.params(spec, "baseline"), tiny.params(spec, stage)
    assert before.keys() == after.keys()
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_a_reward_model_is_where_values_begin(spec: Path) -> None:
    found = rows(spec, "adapted")
    assert found[0]["value"] != 0
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
def test_resumed_it_ends_the_same(
    spec: Path, tmp_path: Path, stage: str, sets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; up to rounding where moments and the reference lie at the host, against a run
    where they do not.
    """

    class StopError(Exception):
        pass

    other = tiny.copy(spec, tmp_path / "copy")
    save = Checkpoints.save

    def then_stop(self: Checkpoints, step: int, *arguments: object) -> None:
        save(self, step, *arguments)
        self.wait()
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", then_stop)
        with pytest.raises(Exception, match=stage):
            tiny.run(other, *sets, only=[stage], force=[stage])
    prepared, _ = tiny.planned(other, *sets, only=[stage])
    assert prepared.plan.by_node[stage].state.kind == "resume"
    tiny.run(other, *sets, only=[stage])
    one, two = tiny.params(spec, stage), tiny.params(other, stage)
    if sets:
        for name in one:
            np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)
        return
    assert rows(other, stage) == rows(spec, stage)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
