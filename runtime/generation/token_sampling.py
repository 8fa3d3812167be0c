"""Draws the next token from logits: temperature, filters, the draw, and its log-probabilities.

The parameters of each slot are elements of arrays, so that one compiled program serves any mixture
of requests. The order is that of `transformers`: repetition penalty, temperature, top-k, top-p of
what top-k left, min-p.

Probability mass is counted in units of 2**-30. Integers add up to the same sum in any
order: a filter keeps exactly the tokens that its definition by a full sort keeps, on every
device and for every batch, where sums of floats would differ in the last place. For the same
reason ties are kept or dropped together, so the order of the vocabulary does not matter.

No vocabulary is sorted. Top-k and top-p look for a threshold by bisection over the 2**31 bit
patterns that a distance from the largest logit may have: 31 passes, each a comparison and a sum
(8 slots of 150 000 tokens on two CPU cores: 16 ms against 250 ms for a sort), and none where no
slot filters. A bounded set of candidates (`lax.top_k`) would need a second way for flat
distributions. The draw inverts the cumulative mass in blocks, with one random number a slot in
place of one for each token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Integer, Key

from tunelang.dsl.vocabulary.training import Sampling

_UNIT = 2**30  # the whole mass in int32, with room for the rounding of a vocabulary of 10**9
_NO_LIMIT = 2**31 - 1
_FURTHEST = 0x7F800000  # the bit pattern of infinity: the distance of a token that cannot occur


class SlotSettings(NamedTuple):
    """Sampling parameters of each slot, all `[slots]`."""

    temperature: Array
    """float32; 0 takes the likeliest token, the first of them on a tie."""
    top_k: Array
    """int32; the largest int32 for no limit. Tokens tied with the last are kept."""
    top_p: Array
    """float32; 1 for no limit. Tokens tied with the last are kept."""
    min_p: Array
    """float32; 0 for no limit."""
    repetition_penalty: Array
    """float32; 1 for none."""


class Draw(NamedTuple):
    """The drawn tokens, all `[slots]`."""

    token: Array
    """int32."""
    log_prob: Array
    """In nats, under the distribution that was sampled from; 0 at temperature 0."""
    plain_log_prob: Array
    """In nats, under the model's distribution at the temperature (1 where it is 0), without penalty
    or filter; equal to that of the trainer's program."""


def slot_settings(sampling: Sampling, slots: int) -> SlotSettings:
    """Return the sampling parameters as arrays that are the same for each of `slots` slots."""
    top_k = _NO_LIMIT if sampling.top_k is None else sampling.top_k
    return SlotSettings(
        jnp.full(slots, sampling.temperature, jnp.float32),
        jnp.full(slots, top_k, jnp.int32),
        jnp.full(slots, 1.0 if sampling.top_p is None else sampling.top_p, jnp.float32),
        jnp.full(slots, sampling.min_p or 0.0, jnp.float32),
        jnp.full(slots, sampling.repetition_penalty, jnp.float32),
    )


def token_keys(
    seed: Integer[Array, ""],
    step: Integer[Array, ""],
    prompt: Integer[Array, " slots"],
    sample: Integer[Array, " slots"],
    position: Integer[Array, " slots"],
) -> Key[Array, " slots"]:
    """Make a random key for each slot, which does not depend on the slot.

    `seed` is the run's and `step` the training step; `prompt` is its index in the data, `sample`
    the index within the group, `position` that of the token in its completion. No two draws of a
    run share a key, and none depends on slot, batch or earlier draws.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def slot_key(prompt: Array, sample: Array, position: Array) -> Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.fold_in(key, prompt), sample), position
        )

    return jax.vmap(slot_key)(prompt, sample, position)


def sample_tokens(
    logits: Float[Array, "slots vocab"],
    keys: Key[Array, " slots"],
    settings: SlotSettings,
    seen: Bool[Array, "slots vocab"] | None = None,
) -> Draw:
    """Draw the next token of each slot.

    `keys` come from `token_keys`. `seen` marks the tokens of the prompt and of the completion so
    far; without it no repetition penalty is applied. A token of logit `-inf` is never
    drawn. A NaN among a slot's logits makes its log-probabilities NaN.
    """
    logits = logits.astype(jnp.float32)
    penalised = logits
    if seen is not None:
        penalised = _penalised(logits, seen, settings.repetition_penalty)
    scaled = _scaled_once(penalised, settings.temperature)
    greedy = settings.temperature == 0

    def draw() -> tuple[Array, Array]:
        keep = filtered(scaled, settings)
        normaliser = jax.nn.logsumexp(scaled, -1, where=keep)
        return _draw(keys, jnp.where(keep, _mass(scaled), 0)), normaliser

    def none() -> tuple[Array, Array]:
        return jnp.zeros(greedy.shape, jnp.int32), jnp.zeros_like(settings.temperature)

    drawn, normaliser = lax.cond(jnp.all(greedy), none, draw)
    token = jnp.where(greedy, _likeliest(scaled), drawn)
    log_prob = _at(scaled, token) - normaliser
    return Draw(
        token.astype(jnp.int32),
        # Not `where(greedy, 0, ...)`: NaN must show there too.
        jnp.where(greedy & ~jnp.isnan(log_prob), 0.0, log_prob),
        token_log_probs(logits, token, settings.temperature),
    )


def token_log_probs(
    logits: Float[Array, "*tokens vocab"],
    tokens: Integer[Array, "*tokens"],
    temperature: Float[Array, "*tokens"],
) -> Float[Array, "*tokens"]:
    """Return log-probabilities of tokens under the model's distribution at a temperature, in nats.

    At temperature 0, whose distribution says nothing about the model, returns those at temperature
    1. Everything that is compared
    (sampler, trainer, reference) goes through the same formula.
    """
    scaled = scale(logits.astype(jnp.float32), temperature)
    return _at(scaled, tokens) - jax.nn.logsumexp(scaled, -1)


def scale(
    logits: Float[Array, "*tokens vocab"], temperature: Float[Array, "*tokens"]
) -> Float[Array, "*tokens vocab"]:
    """Subtract from logits their largest, and divide by the temperature (by 1 where it is 0).

    The subtraction comes first: 0 divided by any temperature is 0, however small it is.
    """
    temperature = jnp.where(temperature == 0, 1.0, temperature)
    largest = lax.stop_gradient(logits.max(-1, keepdims=True))
    return (logits - largest) / temperature[..., None]


def _scaled_once(logits: Array, temperature: Array) -> Array:
    """`scale`, computed into one buffer that everything reads.

    Within a program the compiler may compute logits (a soft cap, a penalty) once to find their
    largest and again, rounded otherwise, to subtract it. Then no token has distance 0, and greedy
    sampling or top-k 1 finds none; XLA on CPUs does so for `cap * tanh(logits / cap)`, and drops
    `lax.optimization_barrier` beforehand. What goes into and comes out of a conditional is a
    buffer. Its branches are equal, and the condition is a value unknown while compiling.
    """
    either = logits.ravel()[0] > 0
    scaled: Array = lax.cond(either, scale, scale, logits, temperature)
    return scaled


def filtered(
    scaled: Float[Array, "slots vocab"], settings: SlotSettings
) -> Bool[Array, "slots vocab"]:
    """Return which tokens the filters keep; `scaled` is the result of `scale`.

    - top-k keeps a token if fewer than `top_k` tokens are likelier;
    - top-p keeps a token if those likelier than it have less than `top_p` of the mass that top-k
      left (arXiv:1904.09751, with ties kept together), and the likeliest in any case;
    - min-p keeps a token at least `min_p` times as likely as the likeliest (arXiv:2407.01082).
    """
    distance = lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)
    top_k = jnp.where(settings.top_k < scaled.shape[-1], settings.top_k, 0)
    keep = distance <= _threshold(distance, jnp.ones((), jnp.int32), top_k)

    mass = jnp.where(keep, _mass(scaled), 0)
    remaining = mass.sum(-1)
    share = jnp.ceil(settings.top_p * remaining.astype(jnp.float32)).astype(jnp.int32)
    top_p = jnp.where(settings.top_p < 1, jnp.clip(share, 1, remaining), 0)
    keep &= distance <= _threshold(distance, mass, top_p)

    return keep & (jnp.exp(scaled) >= settings.min_p[:, None])


def _mass(scaled: Array) -> Array:
    """Round the probability of each token to units of 2**-30, int32."""
    relative = jnp.exp(scaled)
    return jnp.round(relative * (_UNIT / relative.sum(-1, keepdims=True))).astype(jnp.int32)


def _threshold(distance: Array, weights: Array, target: Array) -> Array:
    """Find the least distance within which the weights add up to the target, `[slots, 1]`.

    Where the target is 0 there is no limit, and where no slot has one, no pass is made.
    """

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the sum within `low` is below the target, that within `high` is not
        middle = low + (high - low) // 2
        enough = jnp.where(distance <= middle[:, None], weights, 0).sum(-1) >= target
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    high = jnp.full(target.shape, _FURTHEST, jnp.int32)
    low = jnp.where(target > 0, -1, high - 1)
    _, high = lax.while_loop(lambda bounds: jnp.any(bounds[1] - bounds[0] > 1), halve, (low, high))
    return high[:, None]


def _likeliest(scaled: Array) -> Array:
    """Find the first token of distance 0, `[slots]`: XLA's `argmax` is slower on CPUs."""
    vocab = scaled.shape[-1]
    # A minimum is one pass; `argmax` of 150 000 costs as much as ten.
    first = jnp.where(scaled == 0, jnp.arange(vocab), vocab).min(-1)
    return jnp.minimum(first, vocab - 1)  # past the end only where a logit is NaN


def _draw(keys: Array, weights: Array) -> Array:
    """Draw a token of each slot, `[slots]`, with probability in proportion to its weight.

    A random integer below the total is the mass that comes before the token in the order of the
    vocabulary: the block in which it falls is searched first, then the token.
    """
    slots, vocab = weights.shape
    width = max(1, math.isqrt(vocab))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % width))).reshape(slots, -1, width)
    block_ends = jnp.cumsum(blocks.sum(-1), -1)
    bits = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(keys)
    # The upper half of the product: uniform below the total. `jax.random.randint` takes a
    # remainder, which with totals this large makes some tokens a quarter too frequent.
    point = _upper_half(bits, block_ends[:, -1].astype(jnp.uint32)).astype(jnp.int32)
    block = (block_ends <= point[:, None]).sum(-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    point = point - (_at(block_ends, block) - inside.sum(-1))
    token = block * width + (jnp.cumsum(inside, -1) <= point[:, None]).sum(-1)
    return jnp.minimum(token, vocab - 1)  # past the end only where NaN left no mass at all


def _upper_half(a: Array, b: Array) -> Array:
    """Multiply uint32 by uint32 and return the upper 32 bits of the product, exactly.

    In place of `lax.mulhi`, which does not compile in a program that is split over a mesh (jax
    0.10.2 on CPUs: "failed to legalize operation 'mhlo.unknown'").
    """
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    low_sum = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (low_sum >> 16)


def _penalised(logits: Array, seen: Array, penalty: Array) -> Array:
    """Apply CTRL's penalty (arXiv:1909.05858, section 4.1) to logits of both signs.

    As written there, it rewards negative ones.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _at(values: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(values, tokens[..., None].astype(jnp.int32), -1)[..., 0]
