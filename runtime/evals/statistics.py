"""Statistics of scored samples: estimates over prompts, and their confidence intervals.

`groups` are scores `[prompts, samples]`; a completion passes with a score of at least 1. Prompts
are independent draws, samples of one prompt are not. All results are float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Shaped

LEVEL = 0.95
"""The confidence of an interval."""


def pass_at_k(groups: Shaped[np.ndarray, "prompts samples"], k: int) -> float:
    """Estimate the chance that one of `k` samples of a prompt passes, without bias.

    `1 - C(n - c, k) / C(n, k)` for `c` of `n` samples, averaged over prompts (arXiv:2107.03374,
    equation 1). Raises `ValueError` unless `1 <= k <= samples`.
    """
    samples = groups.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    failed = samples - (groups >= 1).sum(1, keepdims=True)
    drawn = np.arange(k)
    # The chance that each draw fails after the previous ones; 0 once all that failed are drawn.
    return float(1 - ((failed - drawn) / (samples - drawn)).prod(1).mean())


def majority(
    answers: Sequence[Sequence[Hashable]], groups: Shaped[np.ndarray, "prompts samples"]
) -> float:
    """Return the share of prompts whose most common answer passes (arXiv:2203.11171).

    `answers` are `[prompts, samples]`. Of equally common answers the first counts, and of its
    samples the first is the one whose score is read.
    """
    passed = 0
    for votes, scores in zip(answers, groups, strict=True):
        [(winner, _)] = Counter(votes).most_common(1)
        passed += bool(scores[votes.index(winner)] >= 1)
    return passed / len(groups)


def interval(groups: Shaped[np.ndarray, "prompts samples"]) -> tuple[float, float]:
    """Return the 95% confidence interval of the mean score.

    The error is that of the mean over prompts, each a cluster of samples (arXiv:2411.00640), and
    the interval is normal. Where every score is 0 or 1, it is Wilson's (1927) with an effective
    number of samples (Korn and Graubard 1998): as many independent ones as have that error, at most
    all, and at least one a prompt, which is used if none pass or all; so 0 of n has a bound above
    0. One prompt says nothing of others: it counts as one sample, or its interval is infinite.
    """
    scores = np.asarray(groups, np.float64)
    count, samples = scores.shape
    quantile = NormalDist().inv_cdf((1 + LEVEL) / 2)
    mean = float(scores.mean())
    variance = float(scores.mean(1).var(ddof=1)) if count > 1 else math.inf
    if not np.isin(scores, (0, 1)).all():
        error = quantile * math.sqrt(variance / count)
        return mean - error, mean + error
    of_sample = mean * (1 - mean)
    of_prompt = min(max(variance, of_sample / samples), of_sample)
    effective = count * of_sample / of_prompt if of_prompt else count
    spread = quantile**2 / effective
    centre = (mean + spread / 2) / (1 + spread)
    error = math.sqrt(spread * (of_sample + spread / 4)) / (1 + spread)
    return max(0.0, centre - error), min(1.0, centre + error)
