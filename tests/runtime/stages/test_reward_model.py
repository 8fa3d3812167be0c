"""Training steps of a reward model, on a mesh and in micro-batches, against one device."""

from __future__ import annotations

from dataclasses import replace

from tests.runtime.answer_batches import (
    COUNT,
    MESH,
    SCORES,
    assert_trained,
    random_steps,
    train_two_steps,
)
from tests.runtime.training_helpers import assert_trees_close
from tunelang.dsl.vocabulary.preference_stages import RewardModel
from tunelang.runtime.stages.reward_model import ScoreObjective


def test_score_steps_on_a_mesh_and_in_micro_batches_equal_one_device():
    objective = ScoreObjective(RewardModel.unvalidated(centring=0.05), COUNT, True)
    batches = [replace(step.batch, extras=step.labels) for step in random_steps()]
    expected = train_two_steps(SCORES, objective, batches)
    assert_trees_close(
        train_two_steps(SCORES, objective, batches, micro_batches=2, **MESH), expected
    )
    assert_trained(expected[1])
