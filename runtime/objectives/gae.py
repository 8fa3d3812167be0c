"""Advantages of tokens from values: rewards of tokens, GAE, whitening, the loss of the values.

What is estimated once a step is numpy, `[..., length]` with a mask of the same shape that is true
on the tokens of a completion; where it is false an array may hold anything. A value is of the state
before its token. The loss is JAX, element by element.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_LARGEST_ERROR = 0.2
"""Bound of the relative error that the KL coefficient is corrected for (arXiv:1909.08593)."""


def token_rewards(rewards: Floats, own: Floats | float, mask: NDArray[np.bool_]) -> Floats:
    """Compute the reward of each token: its own, `[..., length]`, with the completion's, `[...]`,
    on the last; 0 off the mask.
    """
    found = np.where(mask, own, 0.0)
    later = np.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    return found + np.where(mask & (later == 1), rewards[..., None], 0.0)


def gae(
    rewards: Floats, values: Floats, mask: NDArray[np.bool_], discount: float, trace: float
) -> tuple[Floats, Floats]:
    """Estimate advantages and returns of tokens (arXiv:1506.02438, equation 16); 0 off the mask.

    With `d_t = r_t + discount V_(t+1) - V_t` the advantage is `A_t = d_t + discount trace A_(t+1)`,
    and the return `A_t + V_t`. The last token of a completion ends it: what would follow is worth
    0, also where it was cut off. A token off the mask is passed over.
    """
    advantages = np.zeros(mask.shape)
    after = np.zeros(mask.shape[:-1])
    following = np.zeros(mask.shape[:-1])
    for at in reversed(range(mask.shape[-1])):
        there, value = mask[..., at], np.where(mask[..., at], values[..., at], 0.0)
        error = np.where(there, rewards[..., at], 0.0) + discount * following - value
        after = np.where(there, error + discount * trace * after, after)
        following = np.where(there, value, following)
        advantages[..., at] = np.where(there, after, 0.0)
    return advantages, np.where(mask, advantages + values, 0.0)


def whiten(values: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Shift and scale to mean 0 and deviation 1 over all tokens of the mask; 0 off it.

    As `masked_whiten` of TRL and verl: the variance is the sample's, with 1e-8 added.
    """
    count = max(1, int(mask.sum()))
    centred = np.where(mask, values - np.sum(values, where=mask) / count, 0.0)
    variance = np.sum(np.square(centred)) / max(1, count - 1)
    white: Floats = centred / np.sqrt(variance + 1e-8)
    return white


def explained_variance(values: Floats, returns: Floats, mask: NDArray[np.bool_]) -> float:
    """Return `1 - Var(returns - values) / Var(returns)` over the mask; 0 for equal returns."""
    spread = float(np.var(returns[mask])) if mask.any() else 0.0
    return 1 - float(np.var((returns - values)[mask])) / spread if spread > 1e-12 else 0.0


def value_losses(
    values: Array, old: Array, returns: Array, clip: float | None
) -> tuple[Array, Array]:
    """Compute the loss of each value, and whether clipping holds it.

    `max((V - R)^2, (clamp(V, old - clip, old + clip) - R)^2) / 2`, as in PPO's own code and in TRL;
    `old` are the values before the step's first update.
    """
    losses = jnp.square(values - returns)
    if clip is None:
        return losses / 2, jnp.zeros(losses.shape, bool)
    held = jnp.square(jnp.clip(values, old - clip, old + clip) - returns)
    return jnp.maximum(losses, held) / 2, held > losses


def adapted(coefficient: float, divergence: float, target: float, share: float) -> float:
    """Return the KL coefficient of the next step (arXiv:1909.08593, section 2.2).

    `coefficient (1 + share clamp(divergence / target - 1, -0.2, 0.2))`: `divergence` is a
    completion's in nats, `share` the completions of the step over the controller's horizon.
    """
    error = float(np.clip(divergence / target - 1, -_LARGEST_ERROR, _LARGEST_ERROR))
    return coefficient * (1 + share * error)
