"""Sequences of packed answers, and short runs over them, for tests of objectives over answers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
from optax import identity

from tests.runtime.architectures import LLAMA
from tests.runtime.training_helpers import ADAMW
from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.sharding import make_layout, shardings
from tunelang.runtime.training.objective import Batch, Objective
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import initial_state, random_state
from tunelang.runtime.training.train_step import train_step

ONE_DEVICE = make_layout()
ROWS, LENGTH, ANSWERS_OF_ITEM = 4, 28, 2
ITEMS = (2, 1, 1, 2)
"""Number of items of each sequence; an item has a prompt and `ANSWERS_OF_ITEM` answers to it."""
COUNT = ANSWERS_OF_ITEM * max(ITEMS)
"""The most segments of a sequence."""
SMALL = replace(LLAMA, layers=1)
SCORES = replace(SMALL, scores=True)
PAD = 0
MESH = {"fsdp": 2, "context": 2, "tensor": 2}

Segment = tuple[list[int], list[int]]
"""Prompt and answer."""


def random_items(seed: int = 0) -> list[list[list[Segment]]]:
    """Draw the items of each sequence: answers of different lengths to a random prompt."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(1, SMALL.vocabulary, random.integers(low, high + 1)).tolist()

    sequences = []
    for count in ITEMS:
        prompts = [ids(1, 3) for _ in range(count)]
        sequences.append(
            [[(prompt, ids(1, 4)) for _ in range(ANSWERS_OF_ITEM)] for prompt in prompts]
        )
    return sequences


def flatten(items: list[list[list[Segment]]]) -> list[list[Segment]]:
    """List the segments of each sequence without its division into items."""
    return [[segment for item in row for segment in item] for row in items]


def pack(sequences: list[list[Segment]]) -> Batch:
    """Lay segments out one after another in numpy arrays of one step."""
    shape = (len(sequences), LENGTH)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    trained = np.zeros(shape, bool)
    for row, sequence in enumerate(sequences):
        start = 0
        for number, (prompt, answer) in enumerate(sequence, 1):
            end = start + len(prompt) + len(answer)
            tokens[row, start:end] = prompt + answer
            trained[row, start + len(prompt) : end] = True
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            start = end
    return Batch(tokens, trained, segments, positions)


def unpack(batch: Batch) -> list[list[Segment]]:
    """Undo `pack`, and assert that its arrays agree with each other."""
    sequences: list[list[Segment]] = []
    for row in range(len(batch.tokens)):
        sequence = []
        for number in range(1, int(batch.segments[row].max()) + 1):
            places = np.flatnonzero(batch.segments[row] == number)
            trained = batch.trained[row, places]
            begin = len(places) - int(trained.sum())
            assert not trained[:begin].any()
            np.testing.assert_array_equal(batch.positions[row, places], np.arange(len(places)))
            ids = batch.tokens[row, places].tolist()
            sequence.append((ids[:begin], ids[begin:]))
        sequences.append(sequence)
    return sequences


@cache
def random_params(architecture: Architecture) -> Any:
    """Draw parameters on the host."""
    config = StepConfig(layout=ONE_DEVICE)
    return jax.device_get(random_state(architecture, identity(), config, 0).params)


class RandomStep(NamedTuple):
    """The data of one step, and numbers `[ROWS, COUNT]` for the answers."""

    batch: Batch
    log_probs: np.ndarray
    labels: np.ndarray
    """0 or 1, in float32."""


def random_steps() -> list[RandomStep]:
    """Draw the data of two steps."""
    random = np.random.default_rng(5)
    steps = []
    for seed in range(2):
        log_probs = random.normal(-10, 3, (ROWS, COUNT)).astype(np.float32)
        labels = random.integers(0, 2, log_probs.shape).astype(np.float32)
        steps.append(RandomStep(pack(flatten(random_items(seed))), log_probs, labels))
    return steps


def train_two_steps(
    architecture: Architecture,
    objective: Objective,
    batches: list[Batch],
    *,
    micro_batches: int = 1,
    reference: Any = None,
    **mesh: int,
) -> Any:
    """Train on two batches from `random_params`; returns weights and metrics on the host."""
    config = StepConfig(layout=make_layout(**mesh), micro_batches=micro_batches, chunk=16)
    optimizer = build_optimizer(ADAMW, 10)
    params = random_params(architecture)
    places = shardings(params, config.layout)
    state = initial_state(architecture, jax.device_put(params, places), optimizer, config)
    if reference is not None:
        state = replace(state, aux_params=jax.device_put(reference, places))
    run = train_step(architecture, optimizer, learning_rate(ADAMW, 10), config, objective)
    state, metrics = run(state, jax.tree.map(lambda *arrays: np.stack(arrays), *batches))
    return jax.device_get(state.params), jax.device_get(metrics)


def assert_trained(metrics: Any) -> None:
    """Assert that each step had a loss and a gradient."""
    assert (metrics.loss != 0).all()
    assert (metrics.grad_norm > 0).all()
