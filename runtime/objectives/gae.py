"""Advantages from a critic's values: rewards of tokens, GAE, whitening, the critic's loss.

Estimates are made once a step in numpy: arrays are `[..., length]`, with a mask of the same shape
that is true on the tokens of a completion; where it is false an array may hold anything. A value is
of the state before its token. The loss is JAX.

Where this differs from PPO's papers: the last token of a completion ends it even where it was cut
off; a token off the mask in the middle is passed over; advantages are whitened by the caller.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

Floats = Float[np.ndarray, "*batch length"]
Mask = Bool[np.ndarray, "*batch length"]

_LARGEST_ERROR = 0.2
"""Bound of the relative error that the KL coefficient is corrected for (arXiv:1909.08593)."""


def token_rewards(
    rewards: Float[np.ndarray, "*batch"], penalties: Floats | float, mask: Mask
) -> Floats:
    """Put the reward of each completion on its last token.

    Args:
      rewards: Of each completion, `[...]`.
      penalties: Added to each token, such as a divergence with its sign, `[..., length]`.
      mask: True on tokens of the completion, `[..., length]`.

    Returns:
      `[..., length]`; 0 off the mask.

    """
    remaining = np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    last = mask & (remaining == 1)
    return np.where(mask, penalties, 0.0) + np.where(last, rewards[..., None], 0.0)


def gae(
    rewards: Floats, values: Floats, mask: Mask, discount: float, trace: float
) -> tuple[Floats, Floats]:
    """Estimate advantages and returns of tokens.

    With `d_t = r_t + discount V_(t+1) - V_t` the advantage is `A_t = d_t + discount trace A_(t+1)`,
    and the return `A_t + V_t`. The last token of a completion ends it: what would follow is worth
    0, also where it was cut off. A token off the mask is passed over.

    Args:
      rewards: Of each token, `[..., length]`.
      values: Of the state before each token, `[..., length]`.
      mask: True on tokens of the completion, `[..., length]`.
      discount: The paper's gamma.
      trace: The paper's lambda.

    Returns:
      Advantages and returns, `[..., length]`; 0 off the mask.

    References:
      arXiv:1506.02438, equation 16.

    """
    advantages = np.zeros(mask.shape)
    next_advantage = np.zeros(mask.shape[:-1])
    next_value = np.zeros(mask.shape[:-1])
    for step in reversed(range(mask.shape[-1])):
        counts = mask[..., step]
        value = np.where(counts, values[..., step], 0.0)
        error = np.where(counts, rewards[..., step], 0.0) + discount * next_value - value
        next_advantage = np.where(counts, error + discount * trace * next_advantage, next_advantage)
        next_value = np.where(counts, value, next_value)
        advantages[..., step] = np.where(counts, next_advantage, 0.0)
    return advantages, np.where(mask, advantages + values, 0.0)


def whiten(values: Floats, mask: Mask) -> Floats:
    """Shift and scale to mean 0 and deviation 1 over all tokens of the mask; 0 off it.

    References:
      `masked_whiten` of TRL and verl: the variance is the sample's, with 1e-8 added.

    """
    count = max(1, int(mask.sum()))
    centred = np.where(mask, values - np.sum(values, where=mask) / count, 0.0)
    variance = np.sum(np.square(centred)) / max(1, count - 1)
    white: Floats = centred / np.sqrt(variance + 1e-8)
    return white


def explained_variance(values: Floats, returns: Floats, mask: Mask) -> float:
    """Return `1 - Var(returns - values) / Var(returns)` over the mask; 0 for equal returns."""
    spread = float(np.var(returns[mask])) if mask.any() else 0.0
    return 1 - float(np.var((returns - values)[mask])) / spread if spread > 1e-12 else 0.0


def value_losses(
    values: Float[Array, "*batch"],
    old: Float[Array, "*batch"],
    returns: Float[Array, "*batch"],
    clip: float | None,
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """Compute the loss of each value, and whether clipping raises it.

    `max((V - R)^2, (clamp(V, old - clip, old + clip) - R)^2) / 2`, or the first of them without a
    clip.

    Args:
      values: By the parameters that are trained; a gradient flows through them.
      old: Before the step's first update.
      returns: From `gae`.
      clip: How far a value may move in a step.

    References:
      OpenAI's `baselines` (ppo2) and TRL; not in arXiv:1707.06347.

    """
    losses = jnp.square(values - returns)
    if clip is None:
        return losses / 2, jnp.zeros(losses.shape, bool)
    clipped = jnp.square(jnp.clip(values, old - clip, old + clip) - returns)
    return jnp.maximum(losses, clipped) / 2, clipped > losses


def adapted(coefficient: float, divergence: float, target: float, share: float) -> float:
    """Adapt the KL coefficient to the divergence of a step.

    `coefficient (1 + share clamp(divergence / target - 1, -0.2, 0.2))`.

    Args:
      coefficient: Of this step.
      divergence: Of a completion, in nats.
      target: The divergence to keep, in nats.
      share: The completions of the step over the controller's horizon.

    Returns:
      The coefficient of the next step.

    References:
      arXiv:1909.08593, section 2.2.

    """
    error = float(np.clip(divergence / target - 1, -_LARGEST_ERROR, _LARGEST_ERROR))
    return coefficient * (1 + share * error)
