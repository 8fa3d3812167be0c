"""Mismatched answers against the items that they come from; training steps against one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import pytest

from tests.runtime.answer_batches import (
    ANSWERS_OF_ITEM,
    COUNT,
    MESH,
    PAD,
    ROWS,
    SMALL,
    assert_trained,
    flatten,
    pack,
    random_items,
    random_params,
    random_steps,
    train_two_steps,
    unpack,
)
from tests.runtime.training_helpers import assert_trees_close
from tunelang.dsl.vocabulary.preference_stages import Kto
from tunelang.runtime.stages.kto import KtoExtras, KtoObjective, mismatch
from tunelang.runtime.stages.supervised import Auxiliary


def test_mismatched_answers_come_from_the_next_item():
    items = random_items()
    mismatched = unpack(mismatch(pack(flatten(items)), PAD, ANSWERS_OF_ITEM))
    for row, sequence in enumerate(items):
        # The only item of a sequence gets those of the first item of the next one.
        one_item = len(sequence) == 1
        others = items[(row + 1) % ROWS][:1] if one_item else sequence[1:] + sequence[:1]
        prompts = [prompt for item in sequence for prompt, _ in item]
        answers = [answer for item in others for _, answer in item]
        assert mismatched[row] == list(zip(prompts, answers, strict=True))
        assert all(segment not in flatten(items)[row] for segment in mismatched[row])
    lengths = [sorted(len(answer) for _, answer in row) for row in mismatched]
    before = [sorted(len(answer) for _, answer in row) for row in flatten(items)]
    assert [lengths[row] for row in (0, 3)] == [before[row] for row in (0, 3)]


def test_mismatched_answer_that_is_too_long_is_cut():
    one, two = ([1] * 20, [2] * 8), ([3] * 2, [4] * 11)
    mismatched = mismatch(pack([[one], [two]]), PAD, 1)
    assert unpack(mismatched) == [[([1] * 20, [4] * 8)], [([3] * 2, [2] * 8)]]
    assert not mismatched.segments[1, 10:].any()


@cache
def train_kto(micro_batches: int = 1, **mesh: int) -> Any:
    """Train two steps; returns weights and metrics."""
    objective = KtoObjective(Kto.unvalidated(desirable=1.5), COUNT, Auxiliary(SMALL, live=True))
    batches = [
        replace(batch, extras=KtoExtras(labels, mismatch(batch, PAD, ANSWERS_OF_ITEM)))
        for batch, _, labels in random_steps()
    ]
    # Surer than the policy and no better, so that the divergence from it is above 0.
    reference = jax.tree.map(lambda array: 2 * array, random_params(SMALL))
    return train_two_steps(
        SMALL, objective, batches, micro_batches=micro_batches, reference=reference, **mesh
    )


@pytest.mark.parametrize("mesh", [MESH, {}])
def test_kto_steps_on_a_mesh_and_in_micro_batches_equal_one_device(mesh):
    expected = train_kto()
    assert_trees_close(train_kto(micro_batches=2, **mesh), expected)
    assert_trained(expected[1])
    assert (expected[1].more["kl"] > 0).all()
