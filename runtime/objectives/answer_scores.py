"""Objectives over whole answers: preferences, reward models; and the score of every answer.

Answers are the segments of packed sequences. A pair is two segments beside each other, the chosen
one first, so that a micro-batch never parts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.preference_stages import Kto, Preference, RewardModel
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.parameters import abstract_decoder
from tunelang.runtime.objectives.preference_losses import (
    Pairs,
    bradley_terry,
    kto_losses,
    pair_losses,
)
from tunelang.runtime.sharding import jit
from tunelang.runtime.training.accumulate import micro_batches
from tunelang.runtime.training.cross_entropy import token_logprobs
from tunelang.runtime.training.objective import (
    Batch,
    Models,
    Objective,
    balance,
    hidden_states,
    shift_targets,
)
from tunelang.runtime.training.step_config import StepConfig

Metrics = dict[str, jax.Array]


class Answers(NamedTuple):
    """What a model makes of each segment of a batch; arrays are `[batch, segments]` float32."""

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
    found = token_logprobs(
        hidden,
        decoder.head_weight(),
        targets,
        chunk=config.chunk,
        cap=decoder.architecture.logit_cap,
        layout=config.layout,
    )
    log_probs = segment_sums(jnp.where(counted > 0, found, 0.0), batch.segments, count)
    tokens = segment_sums(counted, batch.segments, count)
    return Answers(log_probs, tokens), balance(decoder, batch, routed)


def scores(
    decoder: Decoder,
    batch: Batch,
    count: int,
    config: StepConfig,
    keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the score of each segment at its last token, `[batch, count]`, and the load-balance
    loss.
    """
    hidden, routed = hidden_states(decoder, batch, keys, config)
    following = jnp.roll(batch.segments, -1, axis=1).at[:, -1].set(0)
    last = (batch.segments > 0) & (following != batch.segments)
    found = jnp.where(last, decoder.scores(hidden), 0.0)
    return segment_sums(found, batch.segments, count), balance(decoder, batch, routed)


def _pieces(batch: Batch) -> jax.Array:
    """Count the segments of a batch."""
    return jnp.sum(jnp.max(batch.segments, axis=1)).astype(jnp.float32)


def _paired(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Part `[batch, 2 * pairs]` into the chosen and the rejected."""
    return array[:, 0::2], array[:, 1::2]


def _summed(values: Metrics, there: jax.Array, count: jax.Array) -> Metrics:
    return {name: jnp.sum(jnp.where(there, value, 0.0)) / count for name, value in values.items()}


@dataclass(frozen=True)
class Reference:
    """Where the log-probabilities of the reference come from."""

    live: Architecture | None = None
    """Of the model among those beside the trained one; None where the batch holds them."""

    def of(self, models: Models, batch: Batch, count: int) -> jax.Array:
        """Return them of each segment, `[batch, count]`."""
        if self.live is None:
            found: jax.Array = batch.reference
            return found
        graph, _ = abstract_decoder(self.live, models.config.dtype)
        decoder = nnx.merge(graph, models.aux_params)
        return jax.lax.stop_gradient(answers(decoder, batch, count, models.config)[0].log_probs)


@dataclass(frozen=True)
class PairObjective(Objective):
    """The mean loss of a pair; see `train.Objective`."""

    stage: Preference
    count: int
    """Segments of a sequence."""
    reference: Reference | None

    def whole(self, models: Models, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the pairs, and the trained tokens of chosen answers."""
        del models
        chosen = shift_targets(batch)[1] * (batch.segments % 2)
        pairs = jnp.maximum(_pieces(batch) / 2, 1.0)
        return pairs, jnp.maximum(jnp.sum(chosen), 1.0)

    def loss(
        self,
        models: Models,
        batch: Batch,
        keys: jax.Array | None,
        whole: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, Metrics]:
        """See `train.Objective`."""
        found, balanced = answers(models.decoder, batch, self.count, models.config, keys)
        chosen, rejected = _paired(found.log_probs)
        chosen_tokens, rejected_tokens = _paired(found.tokens)
        there = chosen_tokens > 0
        reference: tuple[jax.Array | None, ...] = (None, None)
        if self.reference is not None:
            reference = _paired(self.reference.of(models, batch, self.count))
        losses, more = pair_losses(
            self.stage, Pairs(chosen, rejected, chosen_tokens, rejected_tokens, *reference)
        )
        pairs, tokens = whole
        loss = jnp.sum(jnp.where(there, losses, 0.0)) / pairs
        loss += jnp.sum(there) / pairs * balanced
        if self.stage.supervised:
            likelihood = -jnp.sum(chosen) / tokens
            loss += self.stage.supervised * likelihood
            more_totals = {"supervised_loss": likelihood}
        else:
            more_totals = {}
        more |= {"chosen_log_prob": chosen, "rejected_log_prob": rejected}
        return loss, _summed(more, there, pairs) | more_totals


@dataclass(frozen=True)
class KtoObjective(Objective):
    """The mean loss of an answer; see `train.Objective`."""

    stage: Kto
    count: int
    reference: Reference

    def whole(self, models: Models, batch: Batch) -> tuple[jax.Array, ...]:
        """Return the answers, how many of them are desirable, and the reference point: the
        divergence over mismatched answers, at least 0 (arXiv:2402.01306, equation 7).
        """
        other = batch.mismatched
        assert other is not None
        parts = models.config.micro_batches

        def gap(part: Batch) -> tuple[jax.Array, jax.Array]:
            found, _ = answers(models.decoder, part, self.count, models.config)
            there = found.tokens > 0
            ratio = found.log_probs - self.reference.of(models, part, self.count)
            return jnp.sum(jnp.where(there, ratio, 0.0)), jnp.sum(there)

        cut = jax.tree.map(lambda array: micro_batches(array, models.config), other)
        sums = jax.lax.map(gap, cut) if parts > 1 else jax.tree.map(jnp.atleast_1d, gap(other))
        kl = jnp.maximum(jnp.sum(sums[0]) / jnp.maximum(jnp.sum(sums[1]), 1), 0.0)
        there = jnp.arange(self.count) < jnp.max(batch.segments, axis=1)[:, None]
        desirable = jnp.sum(jnp.where(there, batch.values, 0.0))
        return _pieces(batch), desirable, jax.lax.stop_gradient(kl)

    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, whole: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, Metrics]:
        """See `train.Objective`."""
        found, balanced = answers(models.decoder, batch, self.count, models.config, keys)
        count, desirable, kl = whole
        there, good = found.tokens > 0, batch.values > 0.5
        losses, more = kto_losses(
            self.stage, found.log_probs, self.reference.of(models, batch, self.count), good, kl
        )
        count = jnp.maximum(count, 1.0)
        loss = jnp.sum(jnp.where(there, losses, 0.0)) / count
        loss += jnp.sum(there) / count * balanced
        high = jnp.sum(jnp.where(there, more["chosen_reward"], 0.0)) / jnp.maximum(desirable, 1.0)
        bad = jnp.maximum(count - desirable, 1.0)
        low = jnp.sum(jnp.where(there, more["rejected_reward"], 0.0)) / bad
        share = jnp.sum(there) / count
        return loss, {
            "chosen_reward": high,
            "rejected_reward": low,
            "margin": high - low,
            "kl": kl * share,
        }


@dataclass(frozen=True)
class ScoreObjective(Objective):
    """The mean Bradley-Terry loss of a pair of scores; see `train.Objective`."""

    stage: RewardModel
    count: int
    margins: bool
    """Whether the batch's values are margins."""

    def whole(self, models: Models, batch: Batch) -> jax.Array:
        """Return the pairs."""
        del models
        return jnp.maximum(_pieces(batch) / 2, 1.0)

    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, whole: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """See `train.Objective`."""
        found, balanced = scores(models.decoder, batch, self.count, models.config, keys)
        there = jnp.arange(self.count // 2) < jnp.max(batch.segments, axis=1)[:, None] // 2
        margin = _paired(batch.values)[0] if self.margins else None
        losses, more = bradley_terry(*_paired(found), margin, self.stage.centring)
        loss = jnp.sum(jnp.where(there, losses, 0.0)) / whole
        loss += jnp.sum(there) / whole * balanced
        return loss, _summed(more, there, whole)


SegmentProgram = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def segment_program(architecture: Architecture, config: StepConfig, count: int) -> SegmentProgram:
    """Return the jitted `(params, batches) -> (values, tokens)`, each `[steps, batch, count]`.

    The values are summed log-probabilities in nats, or the scores of a reward model; tokens are
    those that are trained.
    """
    graph, _ = abstract_decoder(architecture, config.dtype)

    def one(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        decoder: Decoder = nnx.merge(graph, params)
        if architecture.scores:
            tokens = segment_sums(shift_targets(batch)[1], batch.segments, count)
            return scores(decoder, batch, count, config)[0], tokens
        found, _ = answers(decoder, batch, count, config)
        return found.log_probs, found.tokens

    def run(params: Any, batches: Batch) -> tuple[jax.Array, jax.Array]:
        found: tuple[jax.Array, jax.Array] = jax.lax.map(partial(one, params), batches)
        return found

    return jit(run, config.layout)


shared_segment_program = cache(segment_program)
"""`segment_program`; equal programs are shared by everything in the process."""
