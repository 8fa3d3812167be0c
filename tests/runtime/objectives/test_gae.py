"""Advantages from values against double loops in float64; the critic's part of the update."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.architectures import LLAMA
from tests.runtime.stages.test_policy_step import GROUP, LENGTH, PROMPTS, make_batch
from tests.runtime.training.test_train_step import ADAMW, same
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

ROWS, WIDTH = 9, 8


@pytest.fixture
def given():
    """Rewards, values and a mask with tokens in the middle and whole rows off it."""
    rng = np.random.default_rng(5)
    mask = np.arange(WIDTH) < rng.integers(1, WIDTH + 1, (ROWS, 1))
    mask[:4] &= rng.random((4, WIDTH)) < 0.7
    mask[4] = False
    rewards, found = rng.standard_normal((2, ROWS, WIDTH))
    return np.where(mask, rewards, np.nan), np.where(mask, found, np.nan), mask


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0)])
def test_gae_is_the_sum_of_the_paper(given, discount, trace):
    rewards, found, mask = given
    advantages, returns = gae.gae(rewards, found, mask, discount, trace)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for row in range(ROWS):
        there = np.flatnonzero(mask[row])
        r, v = rewards[row, there], [*found[row, there], 0.0]
        for at in range(len(there)):
            total = 0.0
            for later in range(at, len(there)):
                error = r[later] + discount * v[later + 1] - v[later]
                total += (discount * trace) ** (later - at) * error
            assert advantages[row, there[at]] == pytest.approx(total)
            assert returns[row, there[at]] == pytest.approx(total + v[at])
            if trace == 1:
                rest = sum(discount**n * r[at + n] for n in range(len(there) - at))
                assert returns[row, there[at]] == pytest.approx(rest)


def test_rewards_of_tokens(given):
    penalty, _, mask = given
    scores = np.arange(ROWS, dtype=float)
    found = gae.token_rewards(scores, -penalty, mask)
    for row in range(ROWS):
        expected = np.zeros(WIDTH)
        for at in np.flatnonzero(mask[row]):
            expected[at] = -penalty[row, at]
        if mask[row].any():
            expected[np.flatnonzero(mask[row])[-1]] += scores[row]
        np.testing.assert_allclose(found[row], expected)


def test_each_token_is_credited_with_its_own_reward(given):
    rewards, found, mask = map(np.nan_to_num, given)
    lengths = np.maximum(mask.sum(1), 1)
    mask = np.arange(WIDTH) < lengths[:, None]
    own = np.where(mask, rewards, 0.0)[:, : lengths.max()]  # as wide as the longest completion
    rest = np.arange(ROWS, dtype=float)
    batch = PolicyBatch(*[None] * 3, *[mask.reshape(3, 3, WIDTH)] * 2)
    stage = Ppo.unvalidated(discount=0.9, trace=0.8, kl=None)
    scores = Scores(own.sum(1) + rest, {}, (), own)
    estimated = GaeEstimator(stage, LLAMA, None).estimate(batch, found.reshape(3, 3, WIDTH), scores)
    each = np.pad(own, ((0, 0), (0, WIDTH - own.shape[1])))
    each[np.arange(ROWS), lengths - 1] += rest
    expected = gae.gae(each, found, mask, 0.9, 0.8)
    for one, other in zip((estimated.advantages, estimated.returns), expected, strict=True):
        np.testing.assert_allclose(one.reshape(ROWS, WIDTH), other, rtol=1e-5, atol=1e-6)


def test_whitened_it_has_mean_0_and_the_samples_deviation_1(given):
    _, found, mask = given
    white = gae.whiten(found, mask)
    assert not white[~mask].any()
    assert white[mask].mean() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(ddof=1) == pytest.approx(1)
    assert not gae.whiten(np.ones((2, 3)), np.ones((2, 3), bool)).any()
    assert not gae.whiten(found, np.zeros_like(mask)).any()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_of_values(clip):
    rng = np.random.default_rng(1)
    now, old, returns = rng.standard_normal((3, 50))
    losses, held = gae.value_losses(*(jnp.asarray(each) for each in (now, old, returns)), clip)
    for at in range(50):
        plain = (now[at] - returns[at]) ** 2
        near = now[at] if clip is None else min(max(now[at], old[at] - clip), old[at] + clip)
        assert losses[at] == pytest.approx(max(plain, (near - returns[at]) ** 2) / 2, rel=1e-5)
        assert bool(held[at]) == ((near - returns[at]) ** 2 > plain + 1e-6)


def test_the_coefficient_follows_the_divergence():
    assert gae.adapted(0.1, 6.0, 6.0, 0.5) == pytest.approx(0.1)
    assert gae.adapted(0.1, 6.6, 6.0, 0.5) == pytest.approx(0.1 * (1 + 0.5 * 0.1))
    assert gae.adapted(0.1, 60.0, 6.0, 0.5) == pytest.approx(0.1 * (1 + 0.5 * 0.2))
    assert gae.adapted(0.1, 0.0, 6.0, 0.5) == pytest.approx(0.1 * (1 - 0.5 * 0.2))


# In the update.

SCORES = replace(LLAMA, scores=True)


def make_ppo(trunk: str, **settings: object) -> Ppo:
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


def step(policy: Ppo, config: StepConfig):
    optimizer = build_optimizer(ADAMW, 10)
    learner = learner_of(policy.critic, SCORES, 10)
    head = score_head(LLAMA, jnp.linspace(-1, 1, LLAMA.width), config.layout)
    whole = random_state(SCORES, optimizer, config, 1).params
    params = head if learner.architecture is None else whole
    critic = CriticSetup(learner, SCORES, params, 0.01, estimator=None)
    state = with_critic(random_state(LLAMA, optimizer, config, 0), critic, config)
    batch = make_batch(old=policy.passes > 1)
    rng = np.random.default_rng(9)
    shape = (3, PROMPTS, GROUP, LENGTH)
    advantages, found, returns = rng.standard_normal(shape).astype(np.float32)
    batch = replace(batch, advantages=advantages, values=found, returns=returns)
    scored = score_program(SCORES, config, 1.0)(
        whole, batch.prompts, batch.prompt_lengths, batch.tokens
    )
    scored = np.asarray(scored)
    settings = PolicySettings.of(policy)
    make = policy_step(LLAMA, optimizer, learning_rate(ADAMW, 10), settings, config, learner)
    state, metrics = make(state, batch)
    assert state.critic is not None
    params = {"policy": state.params, "critic": state.critic.params}
    return jax.device_get(params), jax.device_get(metrics), batch, scored


@cache
def once(kind: str):
    """One update on one device."""
    settings = {}
    if kind == "weightless":
        kind = "shared"
        settings["critic"] = Critic(trunk="shared", optimizer=Sgd(lr=0.01), weight=1e-9)
    return step(make_ppo(kind, **settings), StepConfig(layout=make_layout()))


@pytest.mark.parametrize(("trunk", "mesh"), [("separate", {"fsdp": 2}), ("shared", {})])
def test_meshes_and_micro_batches_change_nothing(trunk, mesh):
    parts = StepConfig(layout=make_layout(**mesh), micro_batches=2)
    same(step(make_ppo(trunk), parts)[:2], once(trunk)[:2])


def test_a_separate_critic_has_a_loss_of_its_own():
    params, found, batch, scored = once("separate")
    near = np.clip(scored, batch.values - 0.2, batch.values + 0.2)
    losses = np.maximum((scored - batch.returns) ** 2, (near - batch.returns) ** 2) / 2
    assert found["value_loss"] == pytest.approx(losses[batch.mask].mean(), rel=1e-4)
    # The policy's update is the one that it has without.
    alone, other, *_ = once("weightless")
    assert found["loss"] == pytest.approx(other["loss"], rel=1e-4)
    same(params["policy"], alone["policy"])


def test_a_shared_trunk_learns_both():
    params, found, *_ = once("shared")
    alone, other, *_ = once("weightless")
    total = other["loss"] + 0.5 * found["value_loss"]
    assert found["loss"] == pytest.approx(total, rel=1e-4)
    assert params["critic"].keys() == {"score"}
    blocks = [each["policy"]["blocks"]["attention"]["q"]["weight"][...] for each in (params, alone)]
    assert not np.allclose(*blocks)


def test_passes_and_minibatches_update_the_critic():
    policy = make_ppo("separate", passes=2, minibatches=2)
    _, found, *_ = step(policy, StepConfig(layout=make_layout()))
    assert found["value_loss"] < once("separate")[1]["value_loss"]
    assert np.isfinite(list(found.values())).all()
