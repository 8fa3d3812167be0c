"""Objectives over whole answers: what a segment adds up to, mismatched answers, and the same steps
in micro-batches and on a mesh.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import identity

from tests.runtime import reference
from tests.runtime.architectures import LLAMA
from tests.runtime.training.test_train_step import ADAMW, same
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.preference_stages import Kto, Preference, RewardModel
from tunelang.runtime.objectives.answer_scores import segment_program, segment_sums
from tunelang.runtime.sharding import make_layout, shardings
from tunelang.runtime.stages.kto import KtoExtras, KtoObjective, mismatch
from tunelang.runtime.stages.preference import PairObjective
from tunelang.runtime.stages.reward_model import ScoreObjective
from tunelang.runtime.stages.supervised import Auxiliary
from tunelang.runtime.training.objective import Batch, Objective
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import initial_state, random_state
from tunelang.runtime.training.train_step import train_step

ONE = make_layout()
ROWS, LENGTH, PIECES = 4, 28, 2
ITEMS = (2, 1, 1, 2)
"""Items of each sequence, of `PIECES` segments."""
COUNT = PIECES * max(ITEMS)
SMALL = replace(LLAMA, layers=1)
SCORES = replace(SMALL, scores=True)
PAD = 0

Segment = tuple[list[int], list[int]]
"""Prompt and answer."""


def items_of(seed: int = 0) -> list[list[list[Segment]]]:
    """Of each sequence its items: two answers of different lengths to a prompt of its own."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(1, SMALL.vocabulary, random.integers(low, high + 1)).tolist()

    found = []
    for count in ITEMS:
        prompts = [ids(1, 3) for _ in range(count)]
        found.append([[(prompt, ids(1, 4)) for _ in range(PIECES)] for prompt in prompts])
    return found


def batch_of(sequences: list[list[Segment]]) -> Batch:
    """Numpy arrays of one step."""
    shape = (len(sequences), LENGTH)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    trained = np.zeros(shape, bool)
    for row, own in enumerate(sequences):
        at = 0
        for number, (prompt, answer) in enumerate(own, 1):
            end = at + len(prompt) + len(answer)
            tokens[row, at:end] = prompt + answer
            trained[row, at + len(prompt) : end] = True
            segments[row, at:end] = number
            positions[row, at:end] = np.arange(end - at)
            at = end
    return Batch(tokens, trained, segments, positions)


def flat(items: list[list[list[Segment]]]) -> list[list[Segment]]:
    return [[segment for item in row for segment in item] for row in items]


def segments_of(batch: Batch) -> list[list[Segment]]:
    """Undo `batch_of`."""
    found: list[list[Segment]] = []
    for row in range(len(batch.tokens)):
        own = []
        for number in range(1, int(batch.segments[row].max()) + 1):
            at = np.flatnonzero(batch.segments[row] == number)
            counted = batch.trained[row, at]
            begin = len(at) - int(counted.sum())
            assert not counted[:begin].any()
            np.testing.assert_array_equal(batch.positions[row, at], np.arange(len(at)))
            ids = batch.tokens[row, at].tolist()
            own.append((ids[:begin], ids[begin:]))
        found.append(own)
    return found


# Segments.


def test_sums_of_segments():
    random = np.random.default_rng(0)
    values = random.normal(0, 10, (3, 50)).astype(np.float32)
    segments = np.sort(random.integers(0, 6, (3, 50)), axis=1)
    segments[:, -5:] = 0  # padding
    found = segment_sums(jnp.asarray(values), jnp.asarray(segments), 7)
    for row, number in np.ndindex(3, 7):
        expected = np.float64(values[row])[segments[row] == number + 1].sum()
        assert float(found[row, number]) == pytest.approx(expected, abs=1e-4)
    assert not np.asarray(found)[:, 5:].any()


@pytest.mark.parametrize("architecture", [SMALL, SCORES], ids=["log-probabilities", "scores"])
def test_each_segment_is_what_it_is_alone(architecture: Architecture):
    """Against one answer at a time in numpy and float64."""
    program, params = StepConfig(layout=ONE, chunk=5), random_params(architecture)
    sequences = flat(items_of())
    batch = jax.tree.map(lambda array: array[None], batch_of(sequences))
    found, tokens = segment_program(architecture, program, COUNT)(params, batch)
    plain = params
    if architecture.scores:
        # The head of a language model, so that its logits are the hidden states.
        plain = {**{n: params[n] for n in ("embedding", "blocks", "norm")}, "head": Eye()}
    expected, counts = np.zeros((2, ROWS, COUNT))
    for row, own in enumerate(sequences):
        for at, (prompt, answer) in enumerate(own):
            ids = np.array(prompt + answer)
            given = reference.logits(architecture, plain, ids)
            counts[row, at] = len(answer)
            if architecture.scores:
                weight = np.float64(params["score"].get_value())
                expected[row, at] = given[-1] @ weight
                continue
            log_probs = given - np.log(np.exp(given).sum(-1, keepdims=True))
            places = np.arange(len(prompt) - 1, len(ids) - 1)
            expected[row, at] = log_probs[places, ids[places + 1]].sum()
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens[0], counts)


class Eye:
    """A head that gives hidden states."""

    def get_value(self) -> Any:
        return np.eye(SMALL.width)


# Mismatched answers.


def test_mismatched_answers_are_of_the_next_item():
    items = items_of()
    found = segments_of(mismatch(batch_of(flat(items)), PAD, PIECES))
    for row, own in enumerate(items):
        # The only item of a sequence gets those of the first item of the next one.
        others = items[(row + 1) % ROWS][:1] if len(own) == 1 else own[1:] + own[:1]
        prompts = [prompt for item in own for prompt, _ in item]
        answers = [answer for item in others for _, answer in item]
        assert found[row] == list(zip(prompts, answers, strict=True))
        assert all(given not in flat(items)[row] for given in found[row])
    lengths = [sorted(len(answer) for _, answer in row) for row in found]
    kept = [sorted(len(answer) for _, answer in row) for row in flat(items)]
    assert [lengths[row] for row in (0, 3)] == [kept[row] for row in (0, 3)]


def test_a_mismatched_answer_is_cut_to_the_room_that_there_is():
    one, two = ([1] * 20, [2] * 8), ([3] * 2, [4] * 11)
    found = mismatch(batch_of([[one], [two]]), PAD, 1)
    assert segments_of(found) == [[([1] * 20, [4] * 8)], [([3] * 2, [2] * 8)]]
    assert not found.segments[1, 10:].any()


# Steps.

AHEAD, LIVE = Auxiliary(SMALL, live=False), Auxiliary(SMALL, live=True)
OBJECTIVES: dict[str, tuple[Architecture, Objective]] = {
    "pairs": (
        SMALL,
        PairObjective(Preference.unvalidated(supervised=0.5), COUNT, AHEAD),
    ),
    "kto": (
        SMALL,
        KtoObjective(Kto.unvalidated(desirable=1.5), COUNT, LIVE),
    ),
    "scores": (SCORES, ScoreObjective(RewardModel.unvalidated(centring=0.05), COUNT, True)),
}


@cache
def random_params(architecture: Architecture) -> Any:
    """On the host."""
    return jax.device_get(random_state(architecture, identity(), StepConfig(layout=ONE), 0).params)


@cache
def batches(name: str) -> Batch:
    """The batches of two steps, with the extras of an objective."""
    random = np.random.default_rng(5)
    made = []
    for seed in range(2):
        batch = batch_of(flat(items_of(seed)))
        near = random.normal(-10, 3, (ROWS, COUNT)).astype(np.float32)
        values = random.integers(0, 2, near.shape).astype(np.float32)
        extras = {
            "pairs": near,
            "kto": KtoExtras(values, mismatch(batch, PAD, PIECES)),
            "scores": values,
        }
        made.append(replace(batch, extras=extras[name]))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *made)


@cache
def stepped(name: str, micro_batches: int = 1, **mesh: int) -> Any:
    """The weights and metrics of both steps, on the host."""
    architecture, objective = OBJECTIVES[name]
    config = StepConfig(layout=make_layout(**mesh), micro_batches=micro_batches, chunk=16)
    optimizer = build_optimizer(ADAMW, 10)
    params = random_params(architecture)
    places = shardings(params, config.layout)
    state = initial_state(architecture, jax.device_put(params, places), optimizer, config)
    if name == "kto":
        # Surer than the policy and no better, so that the divergence from it is above 0.
        known = jax.tree.map(lambda array: 2 * array, params)
        state = replace(state, aux_params=jax.device_put(known, places))
    run = train_step(architecture, optimizer, learning_rate(ADAMW, 10), config, objective)
    state, metrics = run(state, batches(name))
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*((name, {"fsdp": 2, "context": 2, "tensor": 2}) for name in OBJECTIVES), ("kto", {})],
)
def test_micro_batches_and_meshes_change_nothing(name, mesh):
    whole = stepped(name)
    same(stepped(name, micro_batches=2, **mesh), whole)
    metrics = whole[1]
    assert (metrics.loss != 0).all()
    assert (metrics.grad_norm > 0).all()
    assert name != "kto" or (metrics.more["kl"] > 0).all()
