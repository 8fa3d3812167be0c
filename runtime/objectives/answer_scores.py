"""Log-probabilities and scores of whole answers, the segments of packed sequences.

A pair is two neighbouring segments, the chosen one first, so that no micro-batch splits it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.sharding import jit
from tunelang.runtime.training.cross_entropy import token_logprobs
from tunelang.runtime.training.objective import (
    Batch,
    Models,
    balance,
    hidden_states,
    shift_targets,
)
from tunelang.runtime.training.step_config import StepConfig

Metrics = dict[str, jax.Array]


class Answers(NamedTuple):
    """Log-probability and length of each segment of a batch, `[batch, segments]` float32."""

    log_probs: jax.Array
    """Summed over the trained tokens, in nats."""
    tokens: jax.Array
    """Trained tokens; 0 where there is no segment."""


def segment_sums(values: jax.Array, segments: jax.Array, count: int) -> jax.Array:
    """Sum `[batch, length]` over the tokens of each segment: `[batch, count]`."""
    chosen = segments[:, None, :] == jnp.arange(1, count + 1)[:, None]
    return jnp.sum(jnp.where(chosen, values[:, None, :], 0.0), axis=-1)


def answers(
    decoder: Decoder,
    batch: Batch,
    count: int,
    config: StepConfig,
    keys: jax.Array | None = None,
) -> tuple[Answers, jax.Array]:
    """Return the log-probability of each of `count` segments, and the load-balance loss."""
    hidden, routed = hidden_states(decoder, batch, keys, config)
    targets, counted = shift_targets(batch)
    token_log_probs = token_logprobs(
        hidden,
        decoder.head_weight(),
        targets,
        chunk=config.chunk,
        cap=decoder.architecture.logit_cap,
        layout=config.layout,
    )
    log_probs = segment_sums(jnp.where(counted > 0, token_log_probs, 0.0), batch.segments, count)
    tokens = segment_sums(counted, batch.segments, count)
    return Answers(log_probs, tokens), balance(decoder, batch, routed)


def scores(
    decoder: Decoder,
    batch: Batch,
    count: int,
    config: StepConfig,
    keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the score of each segment at its last token, and the load-balance loss.

    Scores are `[batch, count]`, 0 where there is no segment.
    """
    hidden, routed = hidden_states(decoder, batch, keys, config)
    following = jnp.roll(batch.segments, -1, axis=1).at[:, -1].set(0)
    last = (batch.segments > 0) & (following != batch.segments)
    token_scores = jnp.where(last, decoder.scores(hidden), 0.0)
    return segment_sums(token_scores, batch.segments, count), balance(decoder, batch, routed)


def count_segments(batch: Batch) -> jax.Array:
    """Count the segments of a batch."""
    return jnp.sum(jnp.max(batch.segments, axis=1)).astype(jnp.float32)


def split_pairs(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split `[batch, 2 * pairs]` into chosen and rejected answers, `[batch, pairs]` each."""
    return array[:, 0::2], array[:, 1::2]


def mean_metrics(values: Metrics, is_counted: jax.Array, count: jax.Array) -> Metrics:
    """Average each of `values` where `is_counted`, dividing by `count`."""
    return {
        name: jnp.sum(jnp.where(is_counted, value, 0.0)) / count for name, value in values.items()
    }


def reference_log_probs(
    architecture: Architecture, models: Models, batch: Batch, count: int
) -> jax.Array:
    """Return the log-probability of each segment by the reference among the auxiliary parameters,
    `[batch, count]` in nats, without a gradient.
    """
    graph, _ = abstract_decoder(architecture, models.config.dtype)
    decoder = nnx.merge(graph, models.aux_params)
    return jax.lax.stop_gradient(answers(decoder, batch, count, models.config)[0].log_probs)


SegmentProgram = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]


def segment_program(architecture: Architecture, config: StepConfig, count: int) -> SegmentProgram:
    """Return the jitted `(params, batches) -> (values, tokens)`, each `[steps, batch, count]`.

    The values are summed log-probabilities in nats, or the scores of a reward model; tokens are
    those that are trained.
    """
    graph, _ = abstract_decoder(architecture, config.dtype)

    def score_batch(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        decoder: Decoder = nnx.merge(graph, params)
        if architecture.scores:
            tokens = segment_sums(shift_targets(batch)[1], batch.segments, count)
            return scores(decoder, batch, count, config)[0], tokens
        segments, _ = answers(decoder, batch, count, config)
        return segments.log_probs, segments.tokens

    def run(params: Params, batches: Batch) -> tuple[jax.Array, jax.Array]:
        scored: tuple[jax.Array, jax.Array] = jax.lax.map(partial(score_batch, params), batches)
        return scored

    return jit(run, config.layout)


shared_segment_program = cache(segment_program)
"""Like `segment_program`, but equal programs are made once in a process."""
