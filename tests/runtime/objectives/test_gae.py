"""Advantages from values, and the loss of values, against double loops in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.runtime.objectives import gae

ROWS, WIDTH = 9, 8


def random_token_values():
    """Draw rewards, values and a mask that leaves out tokens in the middle and whole rows."""
    rng = np.random.default_rng(5)
    mask = np.arange(WIDTH) < rng.integers(1, WIDTH + 1, (ROWS, 1))
    mask[:4] &= rng.random((4, WIDTH)) < 0.7
    mask[4] = False
    rewards, values = rng.standard_normal((2, ROWS, WIDTH))
    return np.where(mask, rewards, np.nan), np.where(mask, values, np.nan), mask


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0)])
def test_gae_equals_the_sum_of_the_paper(discount, trace):
    rewards, values, mask = random_token_values()
    advantages, returns = gae.gae(rewards, values, mask, discount, trace)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for row in range(ROWS):
        places = np.flatnonzero(mask[row])
        r, v = rewards[row, places], [*values[row, places], 0.0]
        for index in range(len(places)):
            total = 0.0
            for later in range(index, len(places)):
                error = r[later] + discount * v[later + 1] - v[later]
                total += (discount * trace) ** (later - index) * error
            assert advantages[row, places[index]] == pytest.approx(total)
            assert returns[row, places[index]] == pytest.approx(total + v[index])
            if trace == 1:
                discounted = sum(discount**n * r[index + n] for n in range(len(places) - index))
                assert returns[row, places[index]] == pytest.approx(discounted)


def test_token_rewards_equal_a_loop():
    penalty, _, mask = random_token_values()
    scores = np.arange(ROWS, dtype=float)
    actual = gae.token_rewards(scores, -penalty, mask)
    for row in range(ROWS):
        expected = np.zeros(WIDTH)
        for column in np.flatnonzero(mask[row]):
            expected[column] = -penalty[row, column]
        if mask[row].any():
            expected[np.flatnonzero(mask[row])[-1]] += scores[row]
        np.testing.assert_allclose(actual[row], expected)


def test_whitened_advantages_have_mean_0_and_deviation_1():
    _, values, mask = random_token_values()
    white = gae.whiten(values, mask)
    assert not white[~mask].any()
    assert white[mask].mean() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(ddof=1) == pytest.approx(1)
    assert not gae.whiten(np.ones((2, 3)), np.ones((2, 3), bool)).any()
    assert not gae.whiten(values, np.zeros_like(mask)).any()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_losses_equal_the_clipped_squares(clip):
    rng = np.random.default_rng(1)
    now, old, returns = rng.standard_normal((3, 50))
    losses, clipped = gae.value_losses(*(jnp.asarray(array) for array in (now, old, returns)), clip)
    for index in range(50):
        plain = (now[index] - returns[index]) ** 2
        near = (
            now[index]
            if clip is None
            else min(max(now[index], old[index] - clip), old[index] + clip)
        )
        assert losses[index] == pytest.approx(
            max(plain, (near - returns[index]) ** 2) / 2, rel=1e-5
        )
        assert bool(clipped[index]) == ((near - returns[index]) ** 2 > plain + 1e-6)


def test_adapted_coefficient_follows_the_divergence():
    assert gae.adapted(0.1, 6.0, 6.0, 0.5) == pytest.approx(0.1)
    assert gae.adapted(0.1, 6.6, 6.0, 0.5) == pytest.approx(0.1 * (1 + 0.5 * 0.1))
    assert gae.adapted(0.1, 60.0, 6.0, 0.5) == pytest.approx(0.1 * (1 + 0.5 * 0.2))
    assert gae.adapted(0.1, 0.0, 6.0, 0.5) == pytest.approx(0.1 * (1 - 0.5 * 0.2))
