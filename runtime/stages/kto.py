"""Learning from answers that are each good or bad (Kahneman-Tversky optimisation).

Source: Ethayarajh et al. 2024, arXiv:2402.01306.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from typing_extensions import override

from tunelang.dsl.vocabulary.preference_stages import Kto
from tunelang.runtime.evals.score_answers import label_of
from tunelang.runtime.objectives.answer_scores import (
    Metrics,
    answers,
    count_segments,
    reference_log_probs,
)
from tunelang.runtime.objectives.preference_losses import Answers
from tunelang.runtime.stages.abstract_programs import AbstractRows
from tunelang.runtime.stages.preference import ComparedKind
from tunelang.runtime.stages.stage_kinds import TrainingInputs, register
from tunelang.runtime.stages.supervised import (
    Auxiliary,
    BatchExtras,
    ObjectiveSetup,
    OpenedData,
    abstract_segment_values,
    segment_values,
)
from tunelang.runtime.tokenize.token_cache import ItemValues
from tunelang.runtime.training.accumulate import micro_batches
from tunelang.runtime.training.objective import AnyArray, Batch, Models, Objective


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KtoExtras:
    """The arrays that KTO adds to a batch."""

    labels: AnyArray
    """`[batch, segments]` float32: 1 for a desirable answer, else 0."""
    mismatched: Batch
    """The batch's prompts with answers to other prompts."""


@dataclass(frozen=True)
class KtoObjective(Objective):
    """The mean loss of an answer."""

    stage: Kto
    segments: int
    """Segments of a sequence, at most."""
    reference: Auxiliary

    def _log_ratio(self, models: Models, batch: Batch, log_probs: jax.Array) -> jax.Array:
        architecture = self.reference.architecture
        return log_probs - reference_log_probs(architecture, models, batch, self.segments)

    @override
    def normalizers(self, models: Models, batch: Batch) -> tuple[jax.Array, ...]:
        """Return the answers, the desirable ones, and the reference point: the divergence over
        mismatched answers, at least 0 (equation 7).
        """
        extras: KtoExtras = batch.extras

        def divergence(part: Batch) -> tuple[jax.Array, jax.Array]:
            scored, _ = answers(models.decoder, part, self.segments, models.config)
            is_answer = scored.tokens > 0
            ratio = self._log_ratio(models, part, scored.log_probs)
            return jnp.sum(jnp.where(is_answer, ratio, 0.0)), jnp.sum(is_answer)

        if models.config.micro_batches > 1:
            parts = jax.tree.map(
                lambda array: micro_batches(array, models.config), extras.mismatched
            )
            ratios, counts = jax.tree.map(jnp.sum, jax.lax.map(divergence, parts))
        else:
            ratios, counts = divergence(extras.mismatched)
        kl = jnp.maximum(ratios / jnp.maximum(counts, 1), 0.0)
        is_answer = jnp.arange(self.segments) < jnp.max(batch.segments, axis=1)[:, None]
        desirable = jnp.sum(jnp.where(is_answer, extras.labels, 0.0))
        return count_segments(batch), desirable, jax.lax.stop_gradient(kl)

    @override
    def loss(
        self,
        models: Models,
        batch: Batch,
        keys: jax.Array | None,
        normalizers: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, Metrics]:
        scored, balance_loss = answers(models.decoder, batch, self.segments, models.config, keys)
        count, desirable, kl = normalizers
        is_answer, is_desirable = scored.tokens > 0, batch.extras.labels > 0.5
        architecture = self.reference.architecture
        reference = reference_log_probs(architecture, models, batch, self.segments)
        losses, rewards = kto_losses(self.stage, scored.log_probs, reference, is_desirable, kl)
        count = jnp.maximum(count, 1.0)

        def total(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(is_answer, values, 0.0))

        loss = total(losses) / count
        share = jnp.sum(is_answer) / count
        loss += share * balance_loss
        chosen = total(rewards["chosen_reward"]) / jnp.maximum(desirable, 1.0)
        rejected = total(rewards["rejected_reward"]) / jnp.maximum(count - desirable, 1.0)
        return loss, {
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            "kl": kl * share,
        }


@register
class KtoKind(ComparedKind[Kto]):
    """Trains on answers that are labelled, or that come in pairs."""

    stages = (Kto,)

    @override
    def reads(self, stage: Kto, roles: set[str]) -> tuple[tuple[str, ...], ItemValues]:
        if "label" in roles:
            return ("response",), label_of
        return ("chosen", "rejected"), lambda _: (1.0, 0.0)

    @override
    def objective(self, stage: Kto, setup: ObjectiveSetup) -> Objective:
        assert setup.auxiliary is not None
        return KtoObjective(stage, setup.segments, setup.auxiliary)

    @override
    def extras(self, stage: Kto, inputs: TrainingInputs, data: OpenedData) -> BatchExtras:
        corpus = data.corpus
        assert corpus.values is not None
        labels = segment_values(corpus.values)
        return lambda batch, items: KtoExtras(
            labels(items), mismatch(batch, corpus.pad, corpus.segments_per_item)
        )

    @override
    def abstract_extras(self, stage: Kto, rows: AbstractRows, segments: int, length: int) -> Any:
        return KtoExtras(abstract_segment_values(rows, segments), rows.batch(length))


def kto_losses(
    stage: Kto,
    log_prob: Answers,
    reference: Answers,
    desirable: Bool[Array, "*answers"],
    kl: Float[Array, ""],
) -> tuple[Answers, dict[str, Array]]:
    """Compute the loss of each answer, and its reward.

    The loss is `weight * (1 - sigmoid(s (r - beta kl)))` with `r = beta log(pi / pi_ref)`, `s` 1
    for a desirable answer and -1 for another.

    Args:
      stage: `beta`, and the weights of desirable and other answers.
      log_prob: Summed over the tokens of each answer, in nats, `[answers]`.
      reference: The same by the reference; carries no gradient.
      desirable: Whether an answer is good, `[answers]`.
      kl: Divergence from the reference, in nats, at least 0; carries no gradient.

    Returns:
      Losses `[answers]`, and the metrics `chosen_reward` of the desirable answers and
      `rejected_reward` of the others, each 0 on the rest: sums to divide by the number of either.

    References:
      KTO, arXiv:2402.01306, section 4.

    """
    reward = stage.beta * (log_prob - lax.stop_gradient(reference))
    above = reward - stage.beta * lax.stop_gradient(kl)
    weight = jnp.where(desirable, stage.desirable, stage.undesirable)
    loss = weight * jax.nn.sigmoid(jnp.where(desirable, -above, above))
    reward = lax.stop_gradient(reward)
    return loss, {
        "chosen_reward": jnp.where(desirable, reward, 0.0),
        "rejected_reward": jnp.where(desirable, 0.0, reward),
    }


def mismatch(batch: Batch, pad: int, per_item: int) -> Batch:
    """Return the prompts of a batch of numpy arrays with answers to other prompts.

    Within a sequence each segment gets the answer of the next item, of `per_item` segments, so that
    all of them still fit; the only item of a sequence gets that of the next sequence, cut to the
    remaining room.
    """
    rows, length = batch.tokens.shape
    tokens = np.full_like(batch.tokens, pad)
    trained = np.zeros_like(batch.trained)
    segments = np.zeros_like(batch.segments)
    positions = np.zeros_like(batch.positions)
    examples = [_split_segments(batch, row) for row in range(rows)]
    for row, own in enumerate(examples):
        is_alone = len(own) == per_item
        others = (
            examples[(row + 1) % rows][:per_item] if is_alone else own[per_item:] + own[:per_item]
        )
        start = 0
        for number, ((prompt, _), (_, answer)) in enumerate(zip(own, others, strict=True), 1):
            ids = np.concatenate([prompt, answer])[: length - start]
            end = start + len(ids)
            tokens[row, start:end] = ids
            trained[row, start + len(prompt) : end] = True
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(len(ids))
            start = end
    return Batch(tokens, trained, segments, positions)


def _split_segments(batch: Batch, row: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return prompt and answer of each segment of a sequence; an answer begins at the first trained
    token.
    """
    parts = []
    for number in range(1, int(batch.segments[row].max()) + 1):
        in_segment = batch.segments[row] == number
        ids, trained = batch.tokens[row][in_segment], batch.trained[row][in_segment]
        begin = int(np.argmax(trained))
        parts.append((ids[:begin], ids[begin:]))
    return parts
