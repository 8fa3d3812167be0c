"""A random batch, a short training run, and comparisons, for tests that take training steps."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from tests.runtime.architectures import LLAMA
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state
from tunelang.runtime.training.train_step import train_step

STEPS, ROWS, LENGTH = 2, 16, 8
# Adam divides by the root of a squared gradient that may be near 0, where rounding decides; this
# epsilon keeps differences of rounding small.
ADAMW = AdamW(lr=1e-2, weight_decay=0.1, eps=1e-4)


def random_batch(steps: int = STEPS, rows: int = ROWS, seed: int = 0) -> Batch:
    """Draw batches of rows that hold two segments and padding, stacked by step."""
    rng = np.random.default_rng(seed)
    shape = (steps, rows, LENGTH)
    first = rng.integers(2, LENGTH - 1, (steps, rows, 1))
    last = rng.integers(LENGTH - 1, LENGTH + 1, (steps, rows, 1))
    place = np.arange(LENGTH)
    segments = np.where(place < first, 1, np.where(place < last, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, place - first, place).astype(np.int32)
    tokens = rng.integers(0, LLAMA.vocabulary, shape, dtype=np.int32)
    # Rows differ much in how many tokens count, so that a mean of means would be seen.
    trained = rng.random(shape) < rng.random((steps, rows, 1))
    return Batch(tokens, trained, segments, positions)


def train(
    config: StepConfig,
    architecture: Architecture = LLAMA,
    spec: Optimizer = ADAMW,
    batch: Batch | None = None,
) -> Any:
    """Train random weights on each step of a batch; returns weights and metrics on the host."""
    batch = random_batch() if batch is None else batch
    optimizer = build_optimizer(spec, 10, offloaded=config.offloaded)
    state = random_state(architecture, optimizer, config, 0)
    step = train_step(architecture, optimizer, learning_rate(spec, 10), config)
    state, metrics = step(state, batch)
    return jax.device_get(state.params), jax.device_get(metrics)


def assert_trees_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Assert that the arrays of two trees agree, by a relative and an absolute tolerance."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        actual, expected,
    )  # fmt: skip


def loop_bodies(hlo: str) -> list[str]:
    """List the text of each computation that a loop of a compiled program repeats."""
    blocks = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", hlo, re.S | re.M))
    return [blocks[name] for name in re.findall(r"body=%?([\w.\-]+)", hlo)]
