"""Sums over the answers of packed sequences, against one answer at a time in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime import reference
from tests.runtime.answer_batches import (
    COUNT,
    ONE_DEVICE,
    ROWS,
    SCORES,
    SMALL,
    flatten,
    pack,
    random_items,
    random_params,
)
from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.objectives.answer_scores import segment_program, segment_sums
from tunelang.runtime.training.step_config import StepConfig


def test_segment_sums_equal_numpy():
    random = np.random.default_rng(0)
    values = random.normal(0, 10, (3, 50)).astype(np.float32)
    segments = np.sort(random.integers(0, 6, (3, 50)), axis=1)
    segments[:, -5:] = 0  # padding
    sums = segment_sums(jnp.asarray(values), jnp.asarray(segments), 7)
    for row, number in np.ndindex(3, 7):
        expected = np.float64(values[row])[segments[row] == number + 1].sum()
        assert float(sums[row, number]) == pytest.approx(expected, abs=1e-4)
    assert not np.asarray(sums)[:, 5:].any()


@pytest.mark.parametrize("architecture", [SMALL, SCORES], ids=["log-probabilities", "scores"])
def test_packed_answers_score_as_they_do_alone(architecture: Architecture):
    config, params = StepConfig(layout=ONE_DEVICE, chunk=5), random_params(architecture)
    sequences = flatten(random_items())
    batch = jax.tree.map(lambda array: array[None], pack(sequences))
    scores, tokens = segment_program(architecture, config, COUNT)(params, batch)
    reference_params = params
    if architecture.scores:
        # The head of a language model, so that its logits are the hidden states.
        names = ("embedding", "blocks", "norm")
        reference_params = {**{name: params[name] for name in names}, "head": IdentityHead()}
    expected, counts = np.zeros((2, ROWS, COUNT))
    for row, sequence in enumerate(sequences):
        for number, (prompt, answer) in enumerate(sequence):
            ids = np.array(prompt + answer)
            logits = reference.logits(architecture, reference_params, ids)
            counts[row, number] = len(answer)
            if architecture.scores:
                weight = np.float64(params["score"].get_value())
                expected[row, number] = logits[-1] @ weight
                continue
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            places = np.arange(len(prompt) - 1, len(ids) - 1)
            expected[row, number] = log_probs[places, ids[places + 1]].sum()
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens[0], counts)


class IdentityHead:
    """A head whose logits are the hidden states."""

    def get_value(self) -> Any:
        return np.eye(SMALL.width)
