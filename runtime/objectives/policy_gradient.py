"""Policy-gradient losses of sampled completions: GRPO and its relatives, PPO, CISPO, GSPO, RLOO.

A `Policy` of the vocabulary chooses one function for each role: the ratio, the clip, the correction
for the sampler, the divergence term, the aggregate. No algorithm has a name here. With `A` the
advantage and `w` the correction, the term of a token is

    w * (surrogate(ratio, A) + kl.coefficient * kl) - entropy.coefficient * H

and the loss is the sum of the terms, weighted as `aggregate` says, over a denominator. Sum and
denominator are returned apart: both add up over micro-batches, and the gradient of a step is the
added gradient of the sums over the added denominator, however the step is divided.

Where this differs from the papers, for every row of `dsl.vocabulary.stages.POLICIES`:

1. The divergence has its own gradient, whichever estimator measures it (`divergence_term`). In GRPO
   (arXiv:2402.03300, equation 4) k3 is differentiated as it stands.
2. A group whose rewards are equal gets no advantage, in place of a division by a small epsilon.
3. The deviation of a group is the sample's, over `group - 1`, as in TRL and verl.
4. Rollouts are corrected for the difference between the sampler's program and the trainer's
   (`correction`), which the papers assume to be none.
5. Ratios are bounded by `exp(20)`, far outside of every clip.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

from tunelang.compiler.search.sweep_fusion import at_unit_rate
from tunelang.dsl.vocabulary.base import Function
from tunelang.dsl.vocabulary.optimizer_kinds import Optimizer
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.training import (
    K1,
    K2,
    Clip,
    ClipWeights,
    KlTerm,
    Masked,
    Sampling,
    Truncated,
)
from tunelang.runtime.user_functions import UserFunction

MISMATCH_BOUNDS = {"mismatch_error": 1.05, "mismatch_kl": 5e-4}
"""Bounds of a healthy run on two metrics: NeMo-RL's probability error and PRIME-RL's divergence."""

Tokens = Float[Array, "*sequences length"]
Mask = Bool[Array, "*sequences length"]
Scalar = Float[Array, ""]

# exp(20) is 5e8: far outside every clip, and squares and sums of it are finite in float32.
_LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicySettings:
    """The choices that the update of a policy is compiled for."""

    ratio: str
    clip: Function | None
    loss: object
    aggregate: str
    kl: KlTerm | None
    correction: Function | None
    entropy: float
    rollout: Sampling
    optimizer: Optimizer
    """At a peak learning rate of 1."""
    minibatches: int
    passes: int

    @classmethod
    def of(cls, stage: Policy) -> PolicySettings:
        """Take the choices of a stage."""
        stated = {field.name: getattr(stage, field.name) for field in fields(cls)}
        return cls(**stated | {"optimizer": at_unit_rate(stage.optimizer)})

    @property
    def updates_per_step(self) -> int:
        """Updates that a step makes."""
        return self.minibatches * self.passes


class Completions(NamedTuple):
    """Completions of a micro-batch; all arrays are `[sequences, length]`, in nats.

    All log-probabilities are those of the tokens taken, at the temperature of the rollout: also
    `now` and `reference`, or the divergence of a model from itself is not 0. Where `mask` is false
    (prompt, padding, what follows the stop token) an array may hold anything, NaN included.
    """

    now: Array
    """Log-probabilities by the trained parameters; the gradient flows through them."""
    mask: Array
    """True on the tokens of the completion, the stop token included."""
    advantages: Array
    """`Advantages.values`, equal on all tokens of a completion, or the advantages of `gae`."""
    old: Array | None = None
    """Log-probabilities by the trainer's program with the parameters that sampled; None: `now`."""
    sampler: Array | None = None
    """Log-probabilities that the sampler reported: `plain_log_prob` of `token_sampling.Draw`. Only
    the difference between the two programs is corrected; `log_prob` would count filters too."""
    reference: Array | None = None
    """Log-probabilities by the reference model."""
    entropy: Array | None = None
    """Entropy of the whole distribution at each token; the gradient flows through it."""


class Totals(NamedTuple):
    """Scalars of a micro-batch that metrics are made of: `sums` add up, of `maxima` the largest
    counts.

    Start a scan with zeros: every maximum is at least 0.
    """

    denominator: Array
    """The divisor of the loss sum, once both are added up over the step."""
    tokens: Array
    """Number of tokens that count."""
    sums: dict[str, Array]
    maxima: dict[str, Array]


# Before the loss.


def penalised(
    rewards: Float[Array, "*sequences"], kl: KlTerm, old: Tokens, reference: Tokens, mask: Mask
) -> Float[Array, "*sequences"]:
    """Subtract the divergence from the reference, summed over each completion, from its reward.

    This is `kl = k1(..., at = reward)`: `r - beta log(pi(y|x) / pi_ref(y|x))`.

    Args:
      rewards: Of each completion, `[sequences]`.
      kl: The estimator and its coefficient.
      old: Log-probabilities by the parameters that sampled, `[sequences, length]`.
      reference: By the reference, `[sequences, length]`.
      mask: True on tokens of the completion, `[sequences, length]`.

    References:
      RLOO, arXiv:2402.14740, with k1.

    """
    return rewards - kl.coefficient * divergences(kl, old, reference, mask).sum(-1)


def divergences(kl: KlTerm, old: Tokens, reference: Tokens, mask: Mask) -> Tokens:
    """Estimate the divergence from the reference on each token, in nats; 0 off the mask."""
    log_ratio = _bounded(_masked(mask, old) - _masked(mask, reference))
    return _masked(mask, _estimate(kl, log_ratio))


# The loss.


def objective(policy: Policy | PolicySettings, batch: Completions) -> tuple[Scalar, Totals]:
    """Compute the loss sum of a micro-batch, for `jax.value_and_grad(..., has_aux=True)`.

    Args:
      policy: The choices.
      batch: Log-probabilities, advantages and mask; only `now` and `entropy` carry a gradient.

    Returns:
      The sum, and the totals to divide it by and to make metrics of.

    Raises:
      ValueError: Where the policy needs log-probabilities that the batch does not have.

    """
    _require(policy, batch)
    mask = batch.mask.astype(bool)
    now = _masked(mask, batch.now)
    old = lax.stop_gradient(now if batch.old is None else _masked(mask, batch.old))
    advantage = lax.stop_gradient(_masked(mask, batch.advantages))

    ratio = ratios(now - old, mask, policy.ratio)
    if isinstance(policy.loss, UserFunction):
        term = policy.loss(ratio.shape, ratio=ratio, advantages=advantage, log_probs=now, mask=mask)
        clipped: dict[str, Array] = {}
    else:
        term, clipped = surrogate(ratio, now, advantage, policy.clip)
    sums = {"ratio": ratio, **clipped}
    maxima = {"ratio_max": ratio}
    if batch.reference is not None:
        log_ratio = now - lax.stop_gradient(_masked(mask, batch.reference))
        divergence = divergence_term(policy.kl, log_ratio, now - old)
        sums["kl"] = _estimate(policy.kl, _bounded(log_ratio))
        if policy.kl is not None and policy.kl.at == "loss":
            term = term + policy.kl.coefficient * divergence
    if batch.sampler is not None:
        sampler = lax.stop_gradient(_masked(mask, batch.sampler))
        mismatch = old - sampler
        weight, cut = correction_weights(mismatch, policy.correction)
        term = weight * term
        sums |= {
            "correction": weight,
            "correction_cut": cut,
            # The sampler drew the tokens, so this is the divergence of it from the trainer.
            "mismatch_kl": _k3(-_bounded(mismatch)),
            "mismatch_error": jnp.exp(_bounded(jnp.abs(mismatch))),
        }
        maxima |= {"correction_max": weight, "mismatch_max": jnp.abs(mismatch)}
    # Without the whole distribution, the taken token's surprise estimates its entropy.
    sums["entropy"] = -now if batch.entropy is None else _masked(mask, batch.entropy)
    if policy.entropy:
        term = term - policy.entropy * sums["entropy"]
    return summed(policy, mask, term, sums, maxima)


def summed(
    policy: Policy | PolicySettings,
    mask: Mask,
    term: Tokens,
    sums: dict[str, Array],
    maxima: dict[str, Array],
) -> tuple[Scalar, Totals]:
    """Add up the terms of tokens, weighted as `aggregate` says, and what metrics are made of.

    Args:
      policy: Chooses the aggregate.
      mask: True on the tokens that count, `[sequences, length]`.
      term: The loss of each token, `[sequences, length]`.
      sums: Metrics whose mean over tokens is reported, `[sequences, length]` each.
      maxima: Metrics whose maximum is reported, `[sequences, length]` each.

    """
    totals = Totals(
        denominator(policy, mask),
        mask.sum(dtype=jnp.float32),
        {name: _masked(mask, values).sum(dtype=jnp.float32) for name, values in sums.items()},
        {name: _masked(mask, values).max() for name, values in maxima.items()},
    )
    totals = lax.stop_gradient(totals)
    return (_masked(mask, term) * _token_weights(policy, mask)).sum(), totals


def denominator(policy: Policy | PolicySettings, mask: Mask) -> Scalar:
    """Return the number that the loss sum of these sequences is divided by.

    With `token_mean`, the number of tokens that count (DAPO, arXiv:2503.14476, section 3.3); with
    `sequence_mean`, of sequences with any (GRPO, arXiv:2402.03300, equation 3); with
    `fixed_length`, these times `max_tokens` (Dr. GRPO, arXiv:2503.20783). `mask` is `[sequences,
    length]`.
    """
    if policy.aggregate == "token_mean":
        return mask.sum(dtype=jnp.float32)
    sequences = mask.any(-1).sum(dtype=jnp.float32)
    return sequences * (policy.rollout.max_tokens if policy.aggregate == "fixed_length" else 1)


def add(first: Totals, second: Totals) -> Totals:
    """Put the totals of two micro-batches together."""
    return Totals(
        first.denominator + second.denominator,
        first.tokens + second.tokens,
        jax.tree.map(jnp.add, first.sums, second.sums),
        jax.tree.map(jnp.maximum, first.maxima, second.maxima),
    )


def metrics(loss: Scalar, totals: Totals) -> dict[str, Array]:
    """Loss and metrics of a whole step, from its added loss sums and totals.

    Means are over tokens: `ratio`, `clip_low` and `clip_high` (shares of tokens whose update is
    cut), `kl` and `entropy` in nats, `correction`, `correction_cut` (share of tokens), and
    `mismatch_kl`, `mismatch_error` (mean `exp|difference|` of sampler and trainer), which
    `MISMATCH_BOUNDS` bounds. All are 0 where no token counts.
    """
    tokens = jnp.maximum(totals.tokens, 1.0)
    means = {name: total / tokens for name, total in totals.sums.items()}
    return {"loss": loss / jnp.maximum(totals.denominator, 1.0), **means, **totals.maxima}


# The roles; arrays are `[sequences, length]` with finite values everywhere.


def ratios(log_ratio: Tokens, mask: Mask, level: str) -> Tokens:
    """Compute the ratio of the policy's probability to the sampling one's, on every token.

    Args:
      log_ratio: `log pi - log pi_old`, `[sequences, length]`.
      mask: True on tokens of the completion, `[sequences, length]`.
      level: `token`, `pi(y_t) / pi_old(y_t)`; `sequence`, the geometric mean of these over the
        completion; `sequence_token`, that value with the gradient of the token's own probability.

    References:
      GSPO, arXiv:2507.18071, equations 7 (`sequence`) and 14 (`sequence_token`).

    """
    if level == "token":
        return jnp.exp(_bounded(log_ratio))
    lengths = jnp.maximum(mask.sum(-1, keepdims=True, dtype=log_ratio.dtype), 1)
    mean = _masked(mask, log_ratio).sum(-1, keepdims=True) / lengths
    sequence = jnp.broadcast_to(jnp.exp(_bounded(mean)), log_ratio.shape)
    if level == "sequence":
        return sequence
    return lax.stop_gradient(sequence) * jnp.exp(log_ratio - lax.stop_gradient(log_ratio))


def surrogate(
    ratio: Tokens, now: Tokens, advantage: Tokens, clip: Function | None
) -> tuple[Tokens, dict[str, Array]]:
    """Compute each token's policy term, to be minimised, and where its update is cut.

    Args:
      ratio: From `ratios`, `[sequences, length]`.
      now: Log-probabilities by the parameters that are trained, `[sequences, length]`.
      advantage: Of each token, `[sequences, length]`.
      clip: None, `-ratio A`, importance-weighted REINFORCE; `Clip`, `-min(ratio A, clip(ratio, 1 -
        low, 1 + high) A)`; `ClipWeights`, `-sg(clip(ratio)) A log pi`.

    Returns:
      The terms, and by the names of metrics where clipping cuts from below and from above.

    References:
      PPO, arXiv:1707.06347, equation 7; with two bounds, DAPO, arXiv:2503.14476, section 3.1
      (`Clip`). CISPO, arXiv:2506.13585, section 3.1 (`ClipWeights`).

    """
    never = jnp.zeros(ratio.shape, bool)
    match clip:
        case None:
            return -ratio * advantage, {"clip_low": never, "clip_high": never}
        case Clip():
            low, high = ratio < 1 - clip.low, ratio > 1 + clip.high
            clipped = jnp.clip(ratio, 1 - clip.low, 1 + clip.high)
            cuts = {"clip_low": low & (advantage < 0), "clip_high": high & (advantage > 0)}
            return -jnp.minimum(ratio * advantage, clipped * advantage), cuts
        case ClipWeights():
            lowest = 0.0 if clip.low is None else 1 - clip.low
            weight = lax.stop_gradient(jnp.clip(ratio, lowest, 1 + clip.high))
            cuts = {"clip_low": ratio < lowest, "clip_high": ratio > 1 + clip.high}
            return -weight * advantage * now, cuts
    raise ValueError(f"unknown clip {clip!r}")


def divergence_term(kl: KlTerm | None, log_ratio: Tokens, step: Tokens) -> Tokens:
    """Estimate the divergence from the reference on each token, with the divergence's own gradient.

    The tokens were drawn from `pi_old`, so the estimate is weighted by `pi / pi_old`.
    Differentiating an estimator as it stands is wrong: k1 gives 0 in the mean, and k3 gives the
    gradient of the *forward* divergence. Its own is `E[log(pi / pi_ref) grad log pi]`, which is
    what differentiating the weighted k3 comes to, and what every estimator has here: the choice
    decides what value is measured. As in all of these papers the sum is over tokens: what a token
    does to the divergence of later ones is left out.

    Args:
      kl: The estimator.
      log_ratio: `log pi - log pi_ref`, `[sequences, length]`.
      step: `log pi - log pi_old`, `[sequences, length]`.

    References:
      arXiv:2506.09477 (gradients of the estimators). DeepSeek-V3.2, arXiv:2512.02556, equation 7.

    """
    log_ratio = _bounded(log_ratio)
    weight = lax.stop_gradient(jnp.exp(_bounded(step)))
    value = lax.stop_gradient(weight * _estimate(kl, log_ratio))
    slope = lax.stop_gradient(weight * log_ratio)
    return value + slope * (step - lax.stop_gradient(step))


def correction_weights(mismatch: Tokens, correction: Function | None) -> tuple[Tokens, Mask]:
    """Weight each token for having been drawn by the sampler `mu`, and say where that is cut.

    Args:
      mismatch: `log pi_old - log mu`, `[sequences, length]`.
      correction: `Truncated`, `min(pi_old / mu, limit)`; `Masked`, `pi_old / mu` within `[1 /
        limit, limit]` and else 0; None, 1.

    """
    weight = jnp.exp(_bounded(mismatch))
    match correction:
        case None:
            return jnp.ones_like(weight), jnp.zeros(weight.shape, bool)
        case Truncated():
            return jnp.minimum(weight, correction.limit), weight > correction.limit
        case Masked():
            cut = (weight > correction.limit) | (weight * correction.limit < 1)
            return jnp.where(cut, 0.0, weight), cut
    raise ValueError(f"unknown correction {correction!r}")


def _estimate(kl: KlTerm | None, log_ratio: Tokens) -> Tokens:
    """Estimate `KL(pi || pi_ref)` from `log pi - log pi_ref` (Schulman 2020), by k3 if unsaid."""
    if isinstance(kl, K1):
        return log_ratio
    if isinstance(kl, K2):
        return jnp.square(log_ratio) / 2
    return _k3(log_ratio)


def _k3(log_ratio: Tokens) -> Tokens:
    # expm1 keeps the small difference that exp(x) - 1 would lose to rounding.
    return jnp.expm1(-log_ratio) + log_ratio


def _token_weights(policy: Policy | PolicySettings, mask: Mask) -> Tokens:
    if policy.aggregate != "sequence_mean":
        return jnp.ones(mask.shape, jnp.float32)
    return jnp.broadcast_to(
        1.0 / jnp.maximum(mask.sum(-1, keepdims=True, dtype=jnp.float32), 1.0), mask.shape
    )


def _bounded(log_ratio: Array) -> Array:
    return jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _masked(mask: Array, values: Array) -> Array:
    # `where` and not a product: what stands outside the mask may be NaN, and so may its gradient.
    return jnp.where(mask, values, jnp.zeros((), values.dtype))


def _require(policy: Policy | PolicySettings, batch: Completions) -> None:
    needs = {
        "reference": policy.kl is not None and policy.kl.at == "loss",
        "sampler": policy.correction is not None,
        "entropy": policy.entropy > 0,
    }
    lacking = [name for name, needed in needs.items() if needed and getattr(batch, name) is None]
    if lacking:
        raise ValueError(f"this policy needs `{'`, `'.join(lacking)}` of every token")
