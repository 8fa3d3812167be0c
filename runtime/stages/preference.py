"""Learning from pairs of answers, one better than the other (DPO and its relatives)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.dsl.vocabulary.preference_stages import Compared, Preference
from tunelang.runtime.evals.score_answers import score_answers
from tunelang.runtime.objectives.answer_scores import (
    Metrics,
    answers,
    count_segments,
    mean_metrics,
    reference_log_probs,
    segment_program,
    split_pairs,
)
from tunelang.runtime.objectives.preference_losses import Pairs, pair_losses
from tunelang.runtime.stages.abstract_programs import (
    AbstractProgram,
    AbstractRows,
    abstract_params,
)
from tunelang.runtime.stages.stage_kinds import TrainingInputs, register
from tunelang.runtime.stages.supervised import (
    Auxiliary,
    BatchExtras,
    ObjectiveSetup,
    OpenedData,
    SupervisedKind,
    abstract_segment_values,
    segment_values,
)
from tunelang.runtime.store.atomic_files import replacing
from tunelang.runtime.tokenize.token_cache import ItemValues, no_values
from tunelang.runtime.training.objective import Batch, Models, Objective, shift_targets
from tunelang.runtime.training.step_config import StepConfig


@dataclass(frozen=True)
class PairObjective(Objective):
    """The mean loss of a pair. Answers are segments, the chosen one of a pair first.

    Batches carry the reference's log-probability of each segment, `[batch, segments]` float32 in
    nats, as their extras where the reference ran ahead.
    """

    stage: Preference
    segments: int
    """Segments of a sequence, at most."""
    reference: Auxiliary | None

    @override
    def normalizers(self, models: Models, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the number of pairs, and of the trained tokens of chosen answers."""
        del models
        chosen = shift_targets(batch)[1] * (batch.segments % 2)
        pairs = jnp.maximum(count_segments(batch) / 2, 1.0)
        return pairs, jnp.maximum(jnp.sum(chosen), 1.0)

    @override
    def loss(
        self,
        models: Models,
        batch: Batch,
        keys: jax.Array | None,
        normalizers: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, Metrics]:
        scored, balance_loss = answers(models.decoder, batch, self.segments, models.config, keys)
        chosen, rejected = split_pairs(scored.log_probs)
        chosen_tokens, rejected_tokens = split_pairs(scored.tokens)
        is_pair = chosen_tokens > 0
        reference: tuple[jax.Array | None, ...] = (None, None)
        if self.reference is not None and self.reference.live:
            architecture = self.reference.architecture
            reference = split_pairs(reference_log_probs(architecture, models, batch, self.segments))
        elif self.reference is not None:
            reference = split_pairs(batch.extras)
        losses, metrics = pair_losses(
            self.stage, Pairs(chosen, rejected, chosen_tokens, rejected_tokens, *reference)
        )
        pairs, tokens = normalizers
        loss = jnp.sum(jnp.where(is_pair, losses, 0.0)) / pairs
        loss += jnp.sum(is_pair) / pairs * balance_loss
        metrics |= {"chosen_log_prob": chosen, "rejected_log_prob": rejected}
        means = mean_metrics(metrics, is_pair, pairs)
        if self.stage.supervised:
            likelihood = -jnp.sum(chosen) / tokens
            loss += self.stage.supervised * likelihood
            means["supervised_loss"] = likelihood
        return loss, means


ComparedStage = TypeVar("ComparedStage", bound=Compared)


class ComparedKind(SupervisedKind[ComparedStage]):
    """Learns which answers are better, by how their probabilities move from a reference."""

    segments_per_example = 2

    def is_live(self, stage: ComparedStage) -> bool:
        """Whether each step runs the reference."""
        del stage
        return True

    @override
    def auxiliary(
        self, stage: ComparedStage, own: Architecture, teacher: Architecture | None
    ) -> Auxiliary | None:
        if not stage.needs_reference:
            return None
        return Auxiliary(own if stage.reference is None else plain(own), self.is_live(stage))

    @override
    def load_auxiliary(self, stage: ComparedStage, inputs: TrainingInputs) -> Any:
        if stage.reference is None:
            return inputs.initial_weights()
        return inputs.load(stage.reference)


@register
class PreferenceKind(ComparedKind[Preference]):
    """Trains on pairs of answers."""

    stages = (Preference,)

    @override
    def is_live(self, stage: Preference) -> bool:
        return stage.reference_log_probs == "live"

    @override
    def reads(self, stage: Preference, roles: set[str]) -> tuple[tuple[str, ...], ItemValues]:
        return ("chosen", "rejected"), no_values

    @override
    def objective(self, stage: Preference, setup: ObjectiveSetup) -> Objective:
        return PairObjective(stage, setup.segments, setup.auxiliary)

    @override
    def extras(
        self, stage: Preference, inputs: TrainingInputs, data: OpenedData
    ) -> BatchExtras | None:
        if data.auxiliary is None or data.auxiliary.live:
            return None
        lay_out = segment_values(_score_ahead(inputs, data))
        return lambda _batch, items: lay_out(items)

    @override
    def abstract_extras(
        self, stage: Preference, rows: AbstractRows, segments: int, length: int
    ) -> Any:
        if not stage.needs_reference or self.is_live(stage):
            return None
        return abstract_segment_values(rows, segments)

    @override
    def programs_ahead(
        self, stage: Preference, architecture: Architecture, config: StepConfig,
        segments: int, batch: Batch,
    ) -> Iterator[AbstractProgram]:  # fmt: skip
        if not stage.needs_reference or self.is_live(stage):
            return
        score: Any = segment_program(plain(architecture), config, segments)
        params = abstract_params(plain(architecture), config)
        yield AbstractProgram("reference", lambda: score.lower(params, batch))


def _score_ahead(inputs: TrainingInputs, data: OpenedData) -> NDArray[np.float32]:
    """Return the reference's log-probability of every answer, `[items, segments]`, in nats.

    They are kept in the stage's folder, so that a resumed stage reads them again.
    """
    path: Path = inputs.folder / "reference.npy"
    if path.exists():
        stored: NDArray[np.float32] = np.load(path)
        return stored
    assert data.auxiliary is not None
    model = replace(inputs.model, architecture=data.auxiliary.architecture)
    scored = score_answers(data.corpus, model, data.aux_params(), inputs.layout)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, scored.values)
    return scored.values
