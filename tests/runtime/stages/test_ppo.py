"""The critic of PPO: its estimates against `gae`, its part of an update against numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.architectures import LLAMA
from tests.runtime.objectives.test_gae import ROWS, WIDTH, random_token_values
from tests.runtime.stages.test_policy_step import GROUP, LENGTH, PROMPTS, random_completions
from tests.runtime.training_helpers import ADAMW, assert_trees_close
from tunelang.dsl.vocabulary.base import Measure, Reference
from tunelang.dsl.vocabulary.data import DataRef
from tunelang.dsl.vocabulary.optimizer_kinds import Sgd
from tunelang.dsl.vocabulary.policy_stages import Ppo
from tunelang.dsl.vocabulary.rewards import RewardConstant
from tunelang.dsl.vocabulary.training import Critic, Sampling
from tunelang.runtime.loading.initial_weights import score_head
from tunelang.runtime.objectives import gae
from tunelang.runtime.objectives.policy_gradient import PolicySettings
from tunelang.runtime.rewards.reward_functions import Scores
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.policy import CriticSetup, with_critic
from tunelang.runtime.stages.policy_step import PolicyBatch, policy_step, score_program
from tunelang.runtime.stages.ppo import GaeEstimator, learner_of
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state


def test_estimator_adds_token_rewards_to_the_answers_reward():
    rewards, values, mask = map(np.nan_to_num, random_token_values())
    lengths = np.maximum(mask.sum(1), 1)
    mask = np.arange(WIDTH) < lengths[:, None]
    by_token = np.where(mask, rewards, 0.0)[:, : lengths.max()]  # as wide as the longest completion
    by_answer = np.arange(ROWS, dtype=float)
    batch = PolicyBatch(*[None] * 3, *[mask.reshape(3, 3, WIDTH)] * 2)
    stage = Ppo.unvalidated(discount=0.9, trace=0.8, kl=None)
    scores = Scores(by_token.sum(1) + by_answer, {}, (), by_token)
    estimated = GaeEstimator(stage, LLAMA, None).estimate(
        batch, values.reshape(3, 3, WIDTH), scores
    )
    padded = np.pad(by_token, ((0, 0), (0, WIDTH - by_token.shape[1])))
    padded[np.arange(ROWS), lengths - 1] += by_answer
    expected = gae.gae(padded, values, mask, 0.9, 0.8)
    for actual, wanted in zip((estimated.advantages, estimated.returns), expected, strict=True):
        np.testing.assert_allclose(actual.reshape(ROWS, WIDTH), wanted, rtol=1e-5, atol=1e-6)


SCORES = replace(LLAMA, scores=True)


def ppo_stage(trunk: str, **settings: object) -> Ppo:
    """Make a stage of PPO whose critic has the given trunk."""
    return Ppo(
        **{
            "from": Reference(noun="model", name="m"),
            "data": DataRef(name="d"),
            "reward": RewardConstant(value=1.0),
            "batch": PROMPTS,
            "group": GROUP,
            "length": Measure(value=10, unit="steps"),
            "rollout": Sampling(max_tokens=6, temperature=0.8),
            "critic": Critic(trunk=trunk, optimizer=Sgd(lr=0.01, clip_norm=None)),
            "passes": 1,
            "minibatches": 1,
            **settings,
        }
    )


def run_update(policy: Ppo, config: StepConfig):
    """Take one update; returns parameters, metrics, its batch and the scores before it."""
    optimizer = build_optimizer(ADAMW, 10)
    learner = learner_of(policy.critic, SCORES, 10)
    head = score_head(LLAMA, jnp.linspace(-1, 1, LLAMA.width), config.layout)
    critic_params = random_state(SCORES, optimizer, config, 1).params
    params = head if learner.architecture is None else critic_params
    critic = CriticSetup(learner, SCORES, params, 0.01, estimator=None)
    state = with_critic(random_state(LLAMA, optimizer, config, 0), critic, config)
    batch = random_completions(old=policy.passes > 1)
    rng = np.random.default_rng(9)
    shape = (3, PROMPTS, GROUP, LENGTH)
    advantages, values, returns = rng.standard_normal(shape).astype(np.float32)
    batch = replace(batch, advantages=advantages, values=values, returns=returns)
    scored = score_program(SCORES, config, 1.0)(
        critic_params, batch.prompts, batch.prompt_lengths, batch.tokens
    )
    scored = np.asarray(scored)
    settings = PolicySettings.of(policy)
    step = policy_step(LLAMA, optimizer, learning_rate(ADAMW, 10), settings, config, learner)
    state, metrics = step(state, batch)
    assert state.critic is not None
    params = {"policy": state.params, "critic": state.critic.params}
    return jax.device_get(params), jax.device_get(metrics), batch, scored


@cache
def run_update_once(kind: str):
    """Run one update on one device."""
    settings = {}
    if kind == "weightless":
        kind = "shared"
        settings["critic"] = Critic(trunk="shared", optimizer=Sgd(lr=0.01), weight=1e-9)
    return run_update(ppo_stage(kind, **settings), StepConfig(layout=make_layout()))


@pytest.mark.parametrize(("trunk", "mesh"), [("separate", {"fsdp": 2}), ("shared", {})])
def test_update_on_a_mesh_and_in_micro_batches_equals_one_device(trunk, mesh):
    parts = StepConfig(layout=make_layout(**mesh), micro_batches=2)
    assert_trees_close(run_update(ppo_stage(trunk), parts)[:2], run_update_once(trunk)[:2])


def test_separate_critic_does_not_change_the_policy_loss():
    params, metrics, batch, scored = run_update_once("separate")
    near = np.clip(scored, batch.values - 0.2, batch.values + 0.2)
    losses = np.maximum((scored - batch.returns) ** 2, (near - batch.returns) ** 2) / 2
    assert metrics["value_loss"] == pytest.approx(losses[batch.mask].mean(), rel=1e-4)
    # The policy's update is that without a critic.
    alone_params, alone_metrics, *_ = run_update_once("weightless")
    assert metrics["loss"] == pytest.approx(alone_metrics["loss"], rel=1e-4)
    assert_trees_close(params["policy"], alone_params["policy"])


def test_shared_trunk_adds_the_value_loss():
    params, metrics, *_ = run_update_once("shared")
    alone_params, alone_metrics, *_ = run_update_once("weightless")
    total = alone_metrics["loss"] + 0.5 * metrics["value_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)
    assert params["critic"].keys() == {"score"}
    blocks = [
        tree["policy"]["blocks"]["attention"]["q"]["weight"][...] for tree in (params, alone_params)
    ]
    assert not np.allclose(*blocks)


def test_passes_and_minibatches_lower_the_value_loss():
    policy = ppo_stage("separate", passes=2, minibatches=2)
    _, metrics, *_ = run_update(policy, StepConfig(layout=make_layout()))
    assert metrics["value_loss"] < run_update_once("separate")[1]["value_loss"]
    assert np.isfinite(list(metrics.values())).all()
