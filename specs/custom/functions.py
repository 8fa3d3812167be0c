"""Functions that `custom.tune` puts in place of words of the language.

`tune explain sft.loss` (and `grpo.advantage`, `adamw.decay`, ...) says what each is called with:
only what its parameters name. Losses, advantages and schedules are traced by JAX and become a part
of the compiled step; the others are plain Python.
"""

import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp


def vowels(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Data: made-up words with their vowels."""
    draw = random.Random(seed)
    for _ in range(count):
        syllables = draw.randint(2, 3)
        word = "".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(syllables))
        yield {"word": word, "vowels": "".join(letter for letter in word if letter in "aeiou")}


def focal(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Loss: the cross entropy, less of it where the model is sure (arXiv:1708.02002, gamma 1)."""
    every = jax.nn.log_softmax(logits)
    log_probs = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
    return -(1 - jnp.exp(log_probs)) * log_probs


def square_root(progress: jax.Array) -> jax.Array:
    """Schedule: falling slowly, then fast."""
    return jnp.sqrt(1 - progress)


def closeness(completion: str, target: str) -> float:
    """Reward: the share of letters that stand at their place."""
    same = sum(one == other for one, other in zip(completion, target, strict=False))
    return same / max(len(completion), len(target), 1)


def letters(completion_tokens: list[str], target: str) -> list[float]:
    """Reward of each token: 1 for the right letter at its place, and for ending there."""
    found, at = [], 0
    for piece in completion_tokens:  # the one that ends a completion has no text
        right = target[at : at + len(piece)] == piece if piece else at == len(target)
        found.append(float(right))
        at += len(piece)
    return found


def ranks(rewards: jax.Array) -> jax.Array:
    """Advantage: the place within the group, from -1 to 1; equal rewards share theirs."""
    ahead = jnp.sign(rewards[:, :, None] - rewards[:, None, :])
    return ahead.sum(2) / (rewards.shape[1] - 1)


def smooth(ratio: jax.Array, advantages: jax.Array) -> jax.Array:
    """Policy loss: a ratio that saturates, where the clipped one has a corner."""
    return -advantages * jnp.tanh(2 * (ratio - 1)) / 2


def longest_right(completion: list[str], score: list[float]) -> float:
    """Metric: the letters of the longest answer that is wholly right."""
    return max((len(c) for c, s in zip(completion, score, strict=True) if s == 1), default=0)
