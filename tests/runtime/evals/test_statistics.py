"""Estimates against enumeration, intervals against their formulas and by how often they hold."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from tunelang.runtime.evals import statistics
from tunelang.runtime.evals.statistics import interval, majority, pass_at_k


def draws(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


@pytest.mark.parametrize("k", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(k):
    groups = (draws(20, 7) < draws(20, 1, seed=2)).astype(np.float32)
    subsets = [
        [any(scores[list(drawn)]) for drawn in combinations(range(7), k)] for scores in groups
    ]
    assert pass_at_k(groups, k) == pytest.approx(np.mean(subsets), rel=1e-14)


def test_pass_at_k_of_many_samples():
    groups = np.zeros((1, 10_000))
    groups[0, :3] = 1
    expected = 1 - math.comb(9_997, 5_000) / math.comb(10_000, 5_000)
    assert pass_at_k(groups, 5_000) == pytest.approx(expected, rel=1e-12)
    assert pass_at_k(groups, 9_998) == 1


def test_score_of_1_passes():
    assert pass_at_k(np.array([[0.99, 1.5, np.nan, -1.0]]), 1) == 0.25


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_beyond_the_samples_raises_value_error(k):
    with pytest.raises(ValueError, match=f"pass@{k} of 3 samples"):
        pass_at_k(np.ones((2, 3)), k)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        ("abb", (1, 0, 0), 0),
        ("abb", (0, 1, 1), 1),
        ("abba", (0, 1, 1, 0), 0),
        ("baab", (1, 0, 0, 1), 1),
        ("aab", (0.5, 1, 1), 0),
        ("a", (1.5,), 1),
    ],
)
def test_majority_scores_the_most_common_answer(answers, scores, expected):
    assert majority([list(answers)], np.array([scores])) == expected


def test_majority_is_the_mean_over_prompts():
    assert majority([["a", "a"], ["b", "c"]], np.array([[1, 1], [0, 1]])) == 0.5


def wilson(passed: float, count: float) -> list[float]:
    """The roots `p` of `(rate - p)^2 = z^2 p (1 - p) / count`, at 95%."""
    rate, z2 = passed / count, 1.959963984540054**2
    return sorted(np.roots([1 + z2 / count, -(2 * rate + z2 / count), rate**2]).real)


@pytest.mark.parametrize("passed", [0, 1, 7, 20])
def test_interval_of_one_sample_a_prompt_is_wilsons(passed):
    groups = (np.arange(20) < passed)[:, None]
    assert interval(groups) == pytest.approx(wilson(passed, 20), abs=1e-12)


@pytest.mark.parametrize("passed", [0, 1, 7, 20])
def test_repeated_samples_do_not_narrow_the_interval(passed):
    groups = (np.arange(20) < passed)[:, None]
    assert interval(groups.repeat(8, axis=1)) == pytest.approx(interval(groups))


def test_interval_is_no_narrower_than_that_of_independent_samples():
    assert interval(np.tile([0, 1], (15, 3))) == pytest.approx(wilson(45, 90))


def test_interval_uses_the_error_over_prompts(monkeypatch):
    groups = draws(30, 4) + draws(30, 1, seed=2)
    means = groups.mean(1)
    error = means.std(ddof=1) / math.sqrt(30)
    low, high = interval(groups)
    assert (low + high) / 2 == pytest.approx(means.mean())
    assert (high - low) / 2 == pytest.approx(1.959963984540054 * error)
    monkeypatch.setattr(statistics, "LEVEL", 0.6826894921370859)
    assert interval(groups)[0] == pytest.approx(means.mean() - error)


def test_interval_of_one_prompt_is_infinite_or_of_one_sample():
    assert interval(np.array([[0.2, 0.7]])) == (-math.inf, math.inf)
    assert interval(np.array([[0, 1]])) == pytest.approx(wilson(0.5, 1))


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("kind", ["passes", "scores"])
def test_interval_covers_the_rate_at_its_level(kind, samples, monkeypatch):
    random = np.random.default_rng(5)
    if kind == "passes":
        rate, shape = 0.1, (3000, 60)
        groups = random.random((*shape, samples)) < random.beta(0.3, 2.7, shape)[..., None]
    else:
        rate, shape = 0.0, (3000, 60)
        groups = random.normal(random.normal(0, 1, shape)[..., None], 1, (*shape, samples))
    monkeypatch.setattr(statistics, "LEVEL", 0.9)
    intervals = np.array([interval(scores) for scores in groups])
    covered = ((intervals[:, 0] <= rate) & (rate <= intervals[:, 1])).mean()
    assert covered == pytest.approx(0.9, abs=0.03)
