"""Training a model that scores answers, from pairs of them (Bradley-Terry).

Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from typing_extensions import override

from tunelang.dsl.vocabulary.preference_stages import RewardModel
from tunelang.runtime.evals.score_answers import margin_of
from tunelang.runtime.objectives.answer_scores import (
    Metrics,
    count_segments,
    mean_metrics,
    scores,
    split_pairs,
)
from tunelang.runtime.objectives.preference_losses import bradley_terry
from tunelang.runtime.stages.abstract_programs import AbstractRows
from tunelang.runtime.stages.stage_kinds import TrainingInputs, register
from tunelang.runtime.stages.supervised import (
    BatchExtras,
    ObjectiveSetup,
    OpenedData,
    SupervisedKind,
    abstract_segment_values,
    segment_values,
)
from tunelang.runtime.tokenize.token_cache import ItemValues, no_values
from tunelang.runtime.training.objective import Batch, Models, Objective


@dataclass(frozen=True)
class ScoreObjective(Objective):
    """The mean Bradley-Terry loss of a pair of scores.

    Batches carry the margin of each segment's pair, `[batch, segments]` float32, as their extras
    where the data states margins.
    """

    stage: RewardModel
    segments: int
    """Segments of a sequence, at most."""
    has_margins: bool

    @override
    def normalizers(self, models: Models, batch: Batch) -> jax.Array:
        """Return the number of pairs."""
        del models
        return jnp.maximum(count_segments(batch) / 2, 1.0)

    @override
    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, normalizers: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        scored, balance_loss = scores(models.decoder, batch, self.segments, models.config, keys)
        is_pair = jnp.arange(self.segments // 2) < jnp.max(batch.segments, axis=1)[:, None] // 2
        margin = split_pairs(batch.extras)[0] if self.has_margins else None
        losses, metrics = bradley_terry(*split_pairs(scored), margin, self.stage.centring)
        loss = jnp.sum(jnp.where(is_pair, losses, 0.0)) / normalizers
        loss += jnp.sum(is_pair) / normalizers * balance_loss
        return loss, mean_metrics(metrics, is_pair, normalizers)


@register
class RewardModelKind(SupervisedKind[RewardModel]):
    """Trains a reward model."""

    stages = (RewardModel,)
    segments_per_example = 2

    @override
    def reads(self, stage: RewardModel, roles: set[str]) -> tuple[tuple[str, ...], ItemValues]:
        return ("chosen", "rejected"), margin_of if "margin" in roles else no_values

    @override
    def objective(self, stage: RewardModel, setup: ObjectiveSetup) -> Objective:
        return ScoreObjective(stage, setup.segments, setup.has_values)

    @override
    def extras(
        self, stage: RewardModel, inputs: TrainingInputs, data: OpenedData
    ) -> BatchExtras | None:
        if data.corpus.values is None:
            return None
        lay_out = segment_values(data.corpus.values)
        return lambda _batch, items: lay_out(items)

    @override
    def abstract_extras(
        self, stage: RewardModel, rows: AbstractRows, segments: int, length: int
    ) -> Any:
        return abstract_segment_values(rows, segments)
