"""Update of a policy on meshes and in micro-batches, against one device and against numpy."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime import reference
from tests.runtime.architectures import LLAMA
from tests.runtime.training_helpers import ADAMW, assert_trees_close
from tunelang.dsl.vocabulary.base import Measure, Reference
from tunelang.dsl.vocabulary.data import DataRef
from tunelang.dsl.vocabulary.optimizer_kinds import Sgd
from tunelang.dsl.vocabulary.policy_stages import POLICIES, Policy
from tunelang.dsl.vocabulary.rewards import RewardConstant
from tunelang.dsl.vocabulary.training import K3, Clip, Sampling, Truncated
from tunelang.runtime.objectives.policy_gradient import PolicySettings
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.policy_step import (
    PolicyBatch,
    chosen,
    in_parts,
    joined,
    policy_step,
    score_program,
    useful_first,
)
from tunelang.runtime.training.cross_entropy import token_logprobs, token_scores
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state

PROMPTS, GROUP, BEFORE, LENGTH = 8, 2, 5, 6
ONE_DEVICE = make_layout()


def make_policy(kind: str = "grpo", **settings: object) -> Policy:
    """Make a stage of a preset, with changes."""
    return Policy(
        **{
            "from": Reference(noun="model", name="m"),
            "data": DataRef(name="d"),
            "reward": RewardConstant(value=1.0),
            "batch": 4,
            "group": 4,
            "length": Measure(value=10, unit="steps"),
            "rollout": Sampling(max_tokens=6, temperature=0.8),
            **POLICIES[kind][1],
            **settings,
        }
    )


def random_completions(seed: int = 0, **inputs: bool) -> PolicyBatch:
    """Draw a batch; `inputs` names optional log-probabilities to have."""
    rng = np.random.default_rng(seed)
    shape = (PROMPTS, GROUP, LENGTH)
    near = -4 + 0.1 * rng.standard_normal((3, *shape)).astype(np.float32)
    return PolicyBatch(
        prompts=rng.integers(0, LLAMA.vocabulary, (PROMPTS, BEFORE), dtype=np.int32),
        prompt_lengths=rng.integers(2, BEFORE + 1, PROMPTS, dtype=np.int32),
        tokens=rng.integers(0, LLAMA.vocabulary, shape, dtype=np.int32),
        mask=np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (PROMPTS, GROUP, 1)),
        advantages=rng.standard_normal((PROMPTS, GROUP)).astype(np.float32),
        sampler=near[0],
        old=near[1] if inputs.get("old") else None,
        reference=near[2] if inputs.get("reference") else None,
    )


def run_step(policy: Policy, batch: PolicyBatch, config: StepConfig, spec: object = ADAMW):
    """Take one update from random weights; returns parameters and metrics."""
    optimizer = build_optimizer(spec, 10)
    state = random_state(LLAMA, optimizer, config, 0)
    run = policy_step(LLAMA, optimizer, learning_rate(spec, 10), PolicySettings.of(policy), config)
    state, metrics = run(state, batch)
    return jax.device_get(state.params), jax.device_get(metrics)


FULL = make_policy("dapo", kl=K3(coefficient=0.1), correction=Truncated(limit=2.0), entropy=0.01)


@pytest.fixture(scope="module")
def one_device_step():
    """An update on one device without micro-batches."""
    return run_step(
        FULL, random_completions(reference=True), StepConfig(layout=ONE_DEVICE, chunk=5)
    )


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [({}, 4), ({"data": 8}, 1), ({"fsdp": 4}, 2), ({"tensor": 2, "fsdp": 4}, 1)],
)
def test_meshes_and_micro_batches_equal_one_device(one_device_step, mesh, micro_batches):
    config = StepConfig(layout=make_layout(**mesh), micro_batches=micro_batches, chunk=5)
    assert_trees_close(run_step(FULL, random_completions(reference=True), config), one_device_step)


def test_loss_equals_the_paper_on_full_logits():
    """Compute one row at a time in float64, with the full softmax."""
    batch, policy = random_completions(old=True), make_policy(clip=Clip(low=0.2, high=0.2))
    config = StepConfig(layout=ONE_DEVICE)
    optimizer = build_optimizer(Sgd(lr=1.0), 10)
    state = random_state(LLAMA, optimizer, config, 0)
    total = tokens = entropies = 0.0
    for prompt, sample in np.ndindex(PROMPTS, GROUP):
        prompt_length = batch.prompt_lengths[prompt]
        row = np.concatenate([batch.prompts[prompt, :prompt_length], batch.tokens[prompt, sample]])
        logits = reference.logits(LLAMA, state.params, row.astype(int)) / 0.8
        logits = np.asarray(logits, np.float64)[prompt_length - 1 : -1]
        normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        entropy = -(np.exp(normal) * normal).sum(-1)
        for index in np.flatnonzero(batch.mask[prompt, sample]):
            now = normal[index, batch.tokens[prompt, sample, index]]
            ratio = np.exp(now - np.float64(batch.old[prompt, sample, index]))
            gain = batch.advantages[prompt, sample]
            total -= min(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
            entropies += entropy[index]
            tokens += 1
    _, metrics = run_step(policy, batch, config, Sgd(lr=1.0))
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["entropy"] == pytest.approx(entropies / tokens, rel=1e-5)


def test_each_minibatch_of_each_pass_is_an_update():
    batch = random_completions(old=True)
    policy = make_policy(minibatches=2, passes=3)
    config = StepConfig(layout=ONE_DEVICE)
    optimizer = build_optimizer(ADAMW, 60)
    state = random_state(LLAMA, optimizer, config, 0)
    run = policy_step(LLAMA, optimizer, learning_rate(ADAMW, 60), PolicySettings.of(policy), config)
    state, metrics = run(state, batch)
    assert int(state.step) == 6
    assert all(np.isfinite(value) for value in metrics.values())


def test_one_minibatch_equals_one_update():
    """Two passes at a rate near zero have the loss of one."""
    batch = random_completions(old=True)
    one = run_step(make_policy(), batch, StepConfig(layout=ONE_DEVICE))
    two = run_step(make_policy(passes=2), batch, StepConfig(layout=ONE_DEVICE), Sgd(lr=1e-12))
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-5)


def test_batch_without_counted_tokens_changes_nothing():
    batch = random_completions()
    batch = replace(batch, mask=np.zeros_like(batch.mask))
    spec = Sgd(lr=1.0)
    after, metrics = run_step(make_policy(), batch, StepConfig(layout=ONE_DEVICE), spec)
    config = StepConfig(layout=ONE_DEVICE)
    before = random_state(LLAMA, build_optimizer(spec, 10), config, 0).params
    assert_trees_close(after, jax.device_get(before), 0)
    assert metrics["loss"] == 0


def test_empty_rows_are_grouped_without_changing_the_result():
    batch = random_completions()
    batch.mask[::2] = False
    config = StepConfig(layout=ONE_DEVICE, micro_batches=4)
    ordered = useful_first(batch, config)
    parts = ordered.mask.any((1, 2)).reshape(-1, 4).T
    assert parts.any(1).tolist() == [True, True, False, False]
    assert_trees_close(
        run_step(make_policy(), ordered, config),
        run_step(make_policy(), batch, StepConfig(layout=ONE_DEVICE)),
    )


def test_split_and_joined_batches_equal_the_batch():
    """A prompt that is run for each part of its group, and batches of several lengths put
    together.
    """
    batch = random_completions()
    config = StepConfig(layout=ONE_DEVICE)
    parts = in_parts(batch, 1)
    assert parts.tokens.shape == (PROMPTS * GROUP, 1, LENGTH)
    assert_trees_close(
        run_step(make_policy(), parts, config), run_step(make_policy(), batch, config)
    )
    near = np.arange(LENGTH) < 4
    shorter = replace(
        batch,
        mask=batch.mask & near,
        sampler=np.where(near, batch.sampler, 0),
        tokens=np.where(near, batch.tokens, 0),
    )
    names = ("tokens", "mask", "sampler")
    cut = replace(shorter, **{name: getattr(shorter, name)[..., :4] for name in names})
    first, last = np.arange(5), np.arange(5, PROMPTS)
    actual = joined([chosen(cut, first), chosen(batch, last)])
    expected = joined([chosen(shorter, first), chosen(batch, last)])
    for name, array in vars(actual).items():
        np.testing.assert_array_equal(array, getattr(expected, name))


def test_score_program_equals_one_batch_and_full_softmax():
    """In micro-batches and on a mesh, and with the entropy asked for or not."""
    config = StepConfig(layout=ONE_DEVICE, chunk=5)
    state = random_state(LLAMA, build_optimizer(ADAMW, 10), config, 0)
    batch = random_completions()
    arguments = (state.params, batch.prompts, batch.prompt_lengths, batch.tokens)
    expected = np.asarray(score_program(LLAMA, config, 0.8)(*arguments))
    micro_batched = StepConfig(layout=ONE_DEVICE, chunk=5, micro_batches=4)
    np.testing.assert_allclose(
        score_program(LLAMA, micro_batched, 0.8)(*arguments), expected, atol=1e-5
    )
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 7, 8)).astype(np.float32)
    head = rng.standard_normal((11, 8)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 7))
    arrays = [jnp.asarray(array) for array in (hidden, head, targets)]
    plain = token_logprobs(*arrays, chunk=3)
    with_entropy, entropy = token_scores(*arrays, chunk=3)
    np.testing.assert_array_equal(plain, with_entropy)
    logits = np.float64(hidden) @ np.float64(head).T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), rtol=1e-5)
