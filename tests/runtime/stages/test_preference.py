"""Training steps on pairs of answers, on a mesh and in micro-batches, against one device."""

from __future__ import annotations

from dataclasses import replace

from tests.runtime.answer_batches import (
    COUNT,
    MESH,
    SMALL,
    assert_trained,
    random_steps,
    train_two_steps,
)
from tests.runtime.training_helpers import assert_trees_close
from tunelang.dsl.vocabulary.preference_stages import Preference
from tunelang.runtime.stages.preference import PairObjective
from tunelang.runtime.stages.supervised import Auxiliary


def test_pair_steps_on_a_mesh_and_in_micro_batches_equal_one_device():
    reference = Auxiliary(SMALL, live=False)
    objective = PairObjective(Preference.unvalidated(supervised=0.5), COUNT, reference)
    batches = [replace(step.batch, extras=step.log_probs) for step in random_steps()]
    expected = train_two_steps(SMALL, objective, batches)
    assert_trees_close(
        train_two_steps(SMALL, objective, batches, micro_batches=2, **MESH), expected
    )
    assert_trained(expected[1])
