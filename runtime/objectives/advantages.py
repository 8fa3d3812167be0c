"""Advantages of completions over the others of their group."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Num

from tunelang.runtime.user_functions import UserFunction


class Advantages(NamedTuple):
    """Advantages of completions, and the groups that have none."""

    values: Array
    """`[prompts, group]`, float32."""
    flat: Array
    """`[prompts]`, true where all rewards of the group are equal: every advantage is 0."""


def group_advantages(
    rewards: Num[Array, "prompts group"], baseline: str | UserFunction
) -> Advantages:
    """Compute how much better each completion is than its group.

    Args:
      rewards: Of each completion, `[prompts, group]`.
      baseline: `group_mean_std`, `(r - mean) / std`; `group_mean`, `r - mean`; `leave_one_out`, `r`
        less the mean of the others; or a function of the user's.

    Returns:
      Advantages `[prompts, group]`. Rewards that differ by less than rounding (1e-6, relative above
      1) count as equal: the division never blows up noise, and needs no epsilon.

    Raises:
      ValueError: For a group of one.

    References:
      GRPO, arXiv:2402.03300, section 4.1.2 (`group_mean_std`; ours has the sample deviation, over
      `group - 1`, as TRL and verl). Dr. GRPO, arXiv:2503.20783 (`group_mean`). RLOO,
      arXiv:2402.14740 (`leave_one_out`).

    """
    group = rewards.shape[-1]
    if group < 2:
        raise ValueError("a group of one completion has no advantage over itself")
    rewards = rewards.astype(jnp.float32)
    spread = rewards.max(-1) - rewards.min(-1)
    flat = spread <= 1e-6 * jnp.maximum(1.0, jnp.abs(rewards).max(-1))
    centred = rewards - rewards.mean(-1, keepdims=True)
    match baseline:
        case "group_mean_std":
            variance = jnp.square(centred).sum(-1, keepdims=True) / (group - 1)
            values = centred / jnp.sqrt(jnp.where(flat[..., None], 1.0, variance))
        case "group_mean":
            values = centred
        case "leave_one_out":
            values = centred * (group / (group - 1))
        case UserFunction():
            values = baseline(rewards.shape, rewards=rewards)
            return Advantages(values, jnp.all(values == 0, axis=-1))
        case _:
            raise ValueError(f"unknown advantage {baseline!r}")
    return Advantages(jnp.where(flat[..., None], 0.0, values), flat)
