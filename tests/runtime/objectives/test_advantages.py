"""Advantages within a group against the formulas of the papers in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.runtime.objectives.advantages import group_advantages


def test_advantages_equal_the_papers_formulas():
    rewards = np.array([[0.7, 0.2, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    mean, deviation = rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    others = (rewards.sum(1, keepdims=True) - rewards) / 3
    expected = {
        "group_mean_std": (rewards - mean) / deviation,
        "group_mean": rewards - mean,
        "leave_one_out": rewards - others,
    }
    for kind, values in expected.items():
        actual = group_advantages(jnp.asarray(rewards), kind)
        np.testing.assert_allclose(actual.values, values, rtol=1e-5, atol=1e-6)
        assert not np.asarray(actual.flat).any()


@pytest.mark.parametrize("how", ["group_mean_std", "group_mean", "leave_one_out"])
def test_groups_without_variance_are_flat(how):
    rewards = jnp.array([[1.0, 1.0, 1.0], [0.3, 0.1 + 0.2, 0.3], [0.0, 0.0, 0.01], [-5e3] * 3])
    actual = group_advantages(rewards, how)
    np.testing.assert_array_equal(actual.flat, [True, True, False, True])
    assert not np.asarray(actual.values)[[0, 1, 3]].any()
    assert np.asarray(actual.values)[2].any()


def test_advantages_of_integers_are_floats():
    integers = group_advantages(jnp.array([[0, 1, 1]]), "group_mean")
    assert integers.values.dtype == jnp.float32
    fractions = group_advantages(jnp.array([[0.7, 0.2]]), "group_mean").values
    np.testing.assert_allclose(fractions, [[0.25, -0.25]], rtol=1e-6)


def test_group_of_one_is_an_error():
    with pytest.raises(ValueError, match="group of one"):
        group_advantages(jnp.ones((3, 1)), "group_mean_std")
