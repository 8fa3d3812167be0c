"""Preference losses: DPO and its relatives, and reward models.

All arrays are float32 of one shape, an element for each pair or answer, and so are losses and
metrics; the caller takes the means. Metrics carry no gradient. Where a pair does not exist an array
may hold zeros: loss and gradient are finite there, to be masked.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from tunelang.dsl.vocabulary.preference_stages import Preference
from tunelang.runtime.user_functions import UserFunction

Answers = Float[Array, "*answers"]

# That of the largest probability below 1 in float32.
_LARGEST_LOG_PROB = -(2.0**-24)


class Pairs(NamedTuple):
    """Answers to the same prompts, one better than the other.

    Log-probabilities are summed over the tokens of an answer, in nats, at temperature 1.
    """

    chosen: Array
    """The log-probability of the better answer by the trained parameters; has a gradient."""
    rejected: Array
    """The same of the worse answer; has a gradient too."""
    chosen_tokens: Array
    """Number of tokens of the better answer, the stop token included."""
    rejected_tokens: Array
    reference_chosen: Array | None = None
    """The log-probability of the better answer by the reference model."""
    reference_rejected: Array | None = None


def pair_losses(stage: Preference, pairs: Pairs) -> tuple[Answers, dict[str, Array]]:
    """Compute the loss of each pair, without the supervised part, and the metrics of each.

    With `m` the chosen answer's reward less the rejected one's and `target_margin`, and `e` the
    `label_smoothing`, which the other losses do not read:

    - `sigmoid`: `-(1 - e) log sigmoid(m) - e log sigmoid(-m)`.
    - `robust`: `(-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e)`.
    - `hinge`: `max(0, 1 - m)`.
    - `ipo`: `(m / beta - 1 / (2 beta))^2`. Differs from the paper, as TRL does: rewards are means
      over tokens, `length_normalised` or not.
    - `odds_ratio`: `-beta log sigmoid(m)`, where rewards are log-odds, never measured from a
      reference.

    Args:
      stage: Names the loss, and whether rewards are measured from a reference.
      pairs: Summed log-probabilities and numbers of tokens, `[pairs]`.

    Returns:
      Losses `[pairs]`, and metrics `[pairs]`: `accuracy` (1 or 0, a half for a tie),
      `chosen_reward`, `rejected_reward`, `margin` (between these two), and with a reference `drift`
      (the mean over both answers of `log pi - log pi_ref`, in nats).

    Raises:
      ValueError: Where a reference is needed and missing.

    References:
      DPO, arXiv:2305.18290, equation 7; SimPO, arXiv:2405.14734, equation 6; conservative DPO,
      Mitchell 2023 (`sigmoid`). arXiv:2403.00409 (`robust`). SLiC, arXiv:2305.10425 (`hinge`).
      arXiv:2310.12036, equation 17 (`ipo`). ORPO, arXiv:2403.07691, equation 7 (`odds_ratio`).

    """
    chosen = _rewards(stage, pairs.chosen, pairs.chosen_tokens, pairs.reference_chosen)
    rejected = _rewards(stage, pairs.rejected, pairs.rejected_tokens, pairs.reference_rejected)
    margin = chosen - rejected - stage.target_margin
    right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    share = stage.label_smoothing
    match stage.loss:
        case "sigmoid":
            loss = (1 - share) * right + share * wrong
        case "robust":
            loss = ((1 - share) * right - share * wrong) / (1 - 2 * share)
        case "hinge":
            loss = jax.nn.relu(1 - margin)
        case "ipo":
            loss = jnp.square((margin - 0.5) / stage.beta)
        case "odds_ratio":
            loss = stage.beta * right
        case UserFunction() as function:
            loss = function(
                chosen.shape,
                chosen=chosen,
                rejected=rejected,
                chosen_tokens=pairs.chosen_tokens,
                rejected_tokens=pairs.rejected_tokens,
                beta=stage.beta,
            )
        case _:
            raise ValueError(f"unknown loss {stage.loss!r}")
    metrics = _pair_metrics(chosen, rejected)
    if pairs.reference_chosen is not None and pairs.reference_rejected is not None:
        drift = pairs.chosen - pairs.reference_chosen + pairs.rejected - pairs.reference_rejected
        metrics["drift"] = lax.stop_gradient(drift / 2)
    return loss, metrics


def bradley_terry(
    chosen: Answers, rejected: Answers, margin: Answers | None = None, centring: float = 0.0
) -> tuple[Answers, dict[str, Array]]:
    """Compute the loss of each pair from the scores of its answers, and the metrics of each.

    The loss is `-log sigmoid(chosen - rejected - margin)`, and `centring` times the square of the
    sum of both scores.

    Args:
      chosen: Scores of the better answers, `[pairs]`.
      rejected: Scores of the worse ones, `[pairs]`.
      margin: How far apart the labels put them, `[pairs]`; 0 if None.
      centring: Weight of the term that keeps scores around 0.

    Returns:
      Losses and the metrics of `pair_losses`, `[pairs]`.

    References:
      arXiv:2203.02155, equation 1. The margin: Llama 2, arXiv:2307.09288, equation 2. The
      centring: arXiv:2312.09244.

    """
    ahead = chosen - rejected
    loss = -jax.nn.log_sigmoid(ahead if margin is None else ahead - margin)
    return loss + centring * jnp.square(chosen + rejected), _pair_metrics(chosen, rejected)


def log_odds(log_prob: Answers) -> Answers:
    """Compute `log(p / (1 - p))` from `log p`, in nats, up to 16.6 where `p` is 1 to float32.

    `log(1 - p)` is taken as `log(-expm1(log p))`, which near `p = 1` keeps the difference that
    `log1p(-exp(log p))` loses, and far from it loses only what adding `log p` does anyway.
    """
    log_prob = jnp.minimum(log_prob, _LARGEST_LOG_PROB)
    return log_prob - jnp.log(-jnp.expm1(log_prob))


def _rewards(
    stage: Preference, log_prob: Answers, tokens: Array, reference: Answers | None
) -> Answers:
    odds = stage.loss == "odds_ratio"
    if not stage.reference_free and not odds:
        if reference is None:
            raise ValueError("these rewards need the reference's log-probabilities")
        log_prob = log_prob - lax.stop_gradient(reference)
    if stage.length_normalised or stage.loss == "ipo":
        log_prob = log_prob / jnp.maximum(tokens, 1)
    return log_odds(log_prob) if odds else stage.beta * log_prob


def _pair_metrics(chosen: Answers, rejected: Answers) -> dict[str, Array]:
    chosen, rejected = lax.stop_gradient((chosen, rejected))
    return {
        "accuracy": (1 + jnp.sign(chosen - rejected)) / 2,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }
