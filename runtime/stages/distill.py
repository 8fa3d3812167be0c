"""Distillation: a student learns to predict what a teacher does, on given answers or its own.

Sources: Hinton et al. 2015, arXiv:1503.02531; generalised knowledge distillation, arXiv:2306.13649.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from typing_extensions import override

from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.dsl.vocabulary.supervised_stages import Distill
from tunelang.dsl.vocabulary.training import JensenShannon, Sampling
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt
from tunelang.runtime.generation.slot_queue import power_of_two
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import OBJECTIVE_PARAMS, Params, abstract_decoder
from tunelang.runtime.models.primitives import parameter
from tunelang.runtime.objectives.distill_losses import (
    Divergence,
    Kind,
    Parts,
    TopK,
    attention_transfer,
    divergence,
    feature_transfer,
    layer_map,
)
from tunelang.runtime.sharding import Layout
from tunelang.runtime.stages.abstract_programs import AbstractRows
from tunelang.runtime.stages.stage_kinds import TrainingInputs, register
from tunelang.runtime.stages.supervised import (
    Auxiliary,
    BatchExtras,
    ObjectiveSetup,
    OpenedData,
    SupervisedKind,
)
from tunelang.runtime.stages.teacher_cache import (
    CHUNK,
    TeacherTokens,
    TokenChoice,
    build_teacher_cache,
    likeliest_tokens,
    remove_teacher_cache,
)
from tunelang.runtime.training.cross_entropy import LogitInputs
from tunelang.runtime.training.objective import (
    Batch,
    Models,
    Objective,
    balance,
    hidden_states,
    shift_targets,
)

_ANSWER_ROOM = 16
"""Tokens of a prompt that a sequence has room for, at least, beside an answer of the student."""
_TIMED_TOKENS = 32
_TIMED_SLOTS = 8


@dataclass(frozen=True)
class _Forward:
    """One forward pass of student and teacher."""

    hidden: jax.Array
    """`[batch, length, width]`: the student's, behind the last layer."""
    teacher_hidden: jax.Array
    routed: Any
    maps: Any = None
    teacher_maps: Any = None
    states: Any = None
    teacher_states: Any = None


@dataclass(frozen=True)
class DistillObjective(Objective):
    """The mean loss of a token: a divergence from the teacher, and the transfer of attention maps
    and hidden states.

    Batches carry `TeacherTokens` as their extras where the teacher ran ahead.
    """

    stage: Distill
    student: Architecture
    teacher: Architecture

    @override
    def initial_params(self) -> nnx.State[Any, Any]:
        """Return the projection of each layer, `[layers, student width, teacher width]`."""
        if self.stage.features is None:
            return nnx.State({})
        layers, width, wide = self.student.layers, self.student.width, self.teacher.width
        if width == wide:
            value = jnp.broadcast_to(jnp.eye(width), (layers, width, width))
        else:
            key = jax.random.key(0)
            value = jax.random.normal(key, (layers, width, wide)) * width**-0.5
        leaf = parameter(value, "layers", "embed", None)
        return nnx.from_flat_state([((OBJECTIVE_PARAMS, "projection"), leaf)])

    @override
    def normalizers(self, models: Models, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the number of trained tokens, and of all tokens."""
        del models
        tokens = jnp.sum(batch.segments > 0).astype(jnp.float32)
        trained = jnp.sum(shift_targets(batch)[1])
        return jnp.maximum(trained, 1.0), jnp.maximum(tokens, 1.0)

    @override
    def loss(
        self,
        models: Models,
        batch: Batch,
        keys: jax.Array | None,
        normalizers: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        stage, student = self.stage, models.decoder
        trained, tokens = normalizers
        teacher: Any = None
        if models.aux_params is not None:
            graph, _ = abstract_decoder(self.teacher, models.config.dtype)
            teacher = nnx.merge(graph, jax.lax.stop_gradient(models.aux_params))
        forward = self._forward(models, teacher, batch, keys)
        total, parts = self._divergence(models, teacher, batch, forward)
        loss = total / trained
        metrics = {
            "divergence": parts.divergence / trained,
            "cross_entropy": parts.cross_entropy / trained,
        }
        if stage.attention is not None:
            metrics["attention_loss"] = self._attention_loss(batch, forward) / (
                tokens * self.student.layers
            )
            loss += stage.attention.weight * metrics["attention_loss"]
        if stage.features is not None:
            count = tokens
            if stage.features.pooling != "token":
                count = jnp.float32(batch.tokens.shape[0] * models.config.micro_batches)
            metrics["feature_loss"] = self._feature_loss(models, batch, forward) / (
                count * self.student.layers
            )
            loss += stage.features.weight * metrics["feature_loss"]
        counted = jnp.sum(shift_targets(batch)[1])
        loss += counted / trained * balance(student, batch, forward.routed)
        return loss, metrics

    def _forward(
        self, models: Models, teacher: Any, batch: Batch, keys: jax.Array | None
    ) -> _Forward:
        config = models.config
        if self.stage.attention is not None or self.stage.features is not None:
            inputs = batch.tokens, batch.segments, batch.positions
            traced = partial(Decoder.run_with_maps, layout=config.layout, remat=config.remat)
            hidden, routed, maps, states = traced(models.decoder, *inputs, keys)
            teacher_hidden, _, teacher_maps, teacher_states = traced(teacher, *inputs)
            return _Forward(
                hidden, teacher_hidden, routed, maps, teacher_maps, states, teacher_states
            )
        hidden, routed = hidden_states(models.decoder, batch, keys, config)
        teacher_hidden = hidden  # not read, where the batch holds the teacher's tokens
        if batch.extras is None:
            teacher_hidden = hidden_states(teacher, batch, None, config)[0]
        return _Forward(hidden, teacher_hidden, routed)

    def _divergence(
        self, models: Models, teacher: Any, batch: Batch, forward: _Forward
    ) -> tuple[jax.Array, Parts]:
        """Return the sum over the trained tokens, and its parts."""
        stage, layout = self.stage, models.config.layout
        targets, counted = shift_targets(batch)
        kind = stage.divergence
        word: Kind = kind.word  # type: ignore[assignment]
        beta = kind.share if isinstance(kind, JensenShannon) else 0.5
        minimized = Divergence(word, beta, stage.temperature, stage.hard)
        # Tables may be padded to different sizes; the tokens are the same.
        common = min(self.student.vocabulary, self.teacher.vocabulary)
        distribution: LogitInputs | TopK
        if batch.extras is not None:
            distribution = TopK(batch.extras.ids, batch.extras.log_probs)
        elif stage.top_k is not None:
            choice = _token_choice(stage, common)
            distribution = likeliest_tokens(forward.teacher_hidden, teacher, choice, layout)
        else:
            head = teacher.head_weight()[:common]
            distribution = LogitInputs(forward.teacher_hidden, head, self.teacher.logit_cap)
        decoder = models.decoder
        head = decoder.head_weight()[:common]
        inputs = LogitInputs(forward.hidden, head, decoder.architecture.logit_cap)
        return divergence(
            inputs, distribution, targets, counted, minimized, chunk=CHUNK, layout=layout
        )

    def _attention_loss(self, batch: Batch, forward: _Forward) -> jax.Array:
        """Return the sum over tokens and the student's layers."""
        assert self.stage.attention is not None
        layers = self._layers(self.stage.attention.layers)
        same = batch.segments[:, :, None] == batch.segments[:, None, :]
        seen = same & (batch.segments > 0)[:, :, None]
        seen &= jnp.tril(jnp.ones(seen.shape[1:], bool))
        return attention_transfer(
            forward.maps[:, :, None], forward.teacher_maps[layers][:, :, None], seen,
            distance=self.stage.attention.distance,  # type: ignore[arg-type]
        )  # fmt: skip

    def _feature_loss(self, models: Models, batch: Batch, forward: _Forward) -> jax.Array:
        """Return the sum over the student's layers, and over tokens or sequences."""
        features = self.stage.features
        assert features is not None
        params: Any = models.extra[OBJECTIVE_PARAMS]
        projections = params["projection"].get_value()
        losses = [
            feature_transfer(
                forward.states[layer], forward.teacher_states[teacher_layer], projections[layer],
                batch.segments > 0,
                pooling=features.pooling,  # type: ignore[arg-type]
                distance=features.distance,  # type: ignore[arg-type]
            )
            for layer, teacher_layer in enumerate(self._layers(features.layers).tolist())
        ]  # fmt: skip
        return sum(losses, jnp.zeros(()))

    def _layers(self, stated: tuple[int, ...] | None) -> NDArray[np.int64]:
        """Return the teacher's layer that each layer of the student is matched with."""
        return np.array(layer_map(self.student.layers, self.teacher.layers, stated))


@register
class DistillKind(SupervisedKind[Distill]):
    """Trains a student on a teacher's distributions."""

    stages = (Distill,)

    @override
    def longest(self, stage: Distill, context: int, longest: int) -> int:
        if not stage.on_policy:
            return longest
        return min(context, max(longest, stage.rollout.max_tokens + _ANSWER_ROOM))

    @override
    def teacher_architecture(self, stage: Distill, inputs: TrainingInputs) -> Architecture:
        return _teacher(stage, inputs).architecture

    @override
    def auxiliary(
        self, stage: Distill, own: Architecture, teacher: Architecture | None
    ) -> Auxiliary:
        assert teacher is not None
        return Auxiliary(teacher, stage.teacher_log_probs == "live")

    @override
    def load_auxiliary(self, stage: Distill, inputs: TrainingInputs) -> Params:
        return inputs.load(stage.teacher)

    @override
    def objective(self, stage: Distill, setup: ObjectiveSetup) -> Objective:
        assert setup.auxiliary is not None
        return DistillObjective(stage, setup.architecture, setup.auxiliary.architecture)

    @override
    def extras(
        self, stage: Distill, inputs: TrainingInputs, data: OpenedData
    ) -> BatchExtras | None:
        if data.auxiliary is None or data.auxiliary.live:
            return None
        teacher = data.auxiliary.architecture
        common = min(inputs.model.architecture.vocabulary, teacher.vocabulary)
        cache = build_teacher_cache(
            _token_choice(stage, common), data.corpus, teacher, data.aux_params(), data.config,
            inputs.folder,
        )  # fmt: skip
        return lambda _batch, items: cache.batch(items, data.table.length)

    @override
    def abstract_extras(
        self, stage: Distill, rows: AbstractRows, segments: int, length: int
    ) -> TeacherTokens | None:
        if stage.teacher_log_probs == "live":
            return None
        k = stage.top_k or 1
        return TeacherTokens(rows.array(length, k), rows.array(length, k, dtype=jnp.float32))

    @override
    def own_answers(
        self, stage: Distill, inputs: TrainingInputs, data: OpenedData
    ) -> StudentAnswers | None:
        if not stage.on_policy:
            return None
        sampler = Sampler.open(
            inputs.model, inputs.layout, stage.rollout,
            slots=power_of_two(data.table.batch), longest=data.table.length,
        )  # fmt: skip
        return StudentAnswers(stage, sampler, derive(inputs.seed, "student"))

    @override
    def finish(
        self,
        stage: Distill,
        inputs: TrainingInputs,
        params: Params,
        metrics: Mapping[str, float],
        measure: Callable[[Model, Params], Mapping[str, float]],
    ) -> dict[str, float]:
        """Compare the student with the teacher, measured by the same evals."""
        remove_teacher_cache(inputs.folder)
        teacher, teacher_params = _teacher(stage, inputs), inputs.load(stage.teacher)
        known = measure(teacher, teacher_params)
        shares = compare_to_teacher(
            (inputs.model, params), (teacher, teacher_params), inputs.layout,
            metrics, known,
        )  # fmt: skip
        return shares | {f"teacher/{name}": value for name, value in known.items()}


def _token_choice(stage: Distill, vocabulary: int) -> TokenChoice:
    assert stage.top_k is not None
    return TokenChoice(min(stage.top_k, vocabulary), stage.temperature, vocabulary)


def _teacher(stage: Distill, inputs: TrainingInputs) -> Model:
    """Return the teacher without adapters; raises `OtherTokenizerError`."""
    model = inputs.same_tokenizer("teacher", stage.teacher)
    return replace(model, architecture=plain(model.architecture))


@dataclass(frozen=True)
class StudentAnswers:
    """Samples the student's answers to the prompts of a batch (GKD, arXiv:2306.13649)."""

    stage: Distill
    sampler: Sampler
    seed: int

    def is_due(self, step: int) -> bool:
        """Whether the answers of a step are the student's own."""
        return derive(self.seed, "whose", step) % 10_000 < self.stage.on_policy * 10_000

    def replace(self, params: Params, batch: Batch, step: int) -> Batch:
        """Return a batch of numpy arrays, one example a sequence, with new answers."""
        begins = [int(np.argmax(row)) for row in batch.trained]
        prompts = [
            Prompt(row[:begin].tolist(), at)
            for at, (row, begin) in enumerate(zip(batch.tokens, begins, strict=True))
        ]
        episodes = self.sampler.sample(params, prompts, group=1, seed=self.seed, step=step)
        length = batch.tokens.shape[1]
        tokens = np.full_like(batch.tokens, episodes.pad)
        trained = np.zeros_like(batch.trained)
        segments = np.zeros_like(batch.segments)
        for row, (begin, episode) in enumerate(zip(begins, episodes, strict=True)):
            ids = [*episode.prompt, *episode.tokens][:length]
            tokens[row, : len(ids)] = ids
            trained[row, begin : len(ids)] = True
            segments[row, : len(ids)] = 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        return replace(
            batch, tokens=tokens, trained=trained, segments=segments, positions=positions
        )


def compare_to_teacher(
    student: tuple[Model, Any],
    teacher: tuple[Model, Any],
    layout: Layout,
    metrics: Mapping[str, float],
    teacher_metrics: Mapping[str, float],
) -> dict[str, float]:
    """Return ratios of student to teacher: each metric, the parameters, the decoding speed."""
    sizes = [parameter_count(model.architecture) for model, _ in (student, teacher)]
    rates = [_decode_rate(*each, layout) for each in (student, teacher)]
    shares = {
        f"retention.{name}": metrics[name] / value
        for name, value in teacher_metrics.items()
        if name in metrics and value
    }
    first = {"retention": next(iter(shares.values()))} if shares else {}
    return {
        **first,
        **shares,
        "size_ratio": sizes[0] / sizes[1],
        "decode_speed_ratio": rates[0] / rates[1],
    }


def _decode_rate(model: Model, params: Any, layout: Layout) -> float:
    """Measure tokens/s of greedy decoding."""
    tokens = min(_TIMED_TOKENS, model.architecture.context // 2)
    sampling = Sampling.unvalidated(max_tokens=tokens, temperature=0.0)
    sampler = Sampler.open(model, layout, sampling, slots=_TIMED_SLOTS, longest=8)
    sampler = replace(sampler, stop_ids=())
    prompts = [Prompt([1, 2, 3, 4 + at], at) for at in range(_TIMED_SLOTS)]

    def run() -> float:
        begun = time.perf_counter()
        sampler.sample(params, prompts, group=1, seed=0)
        return time.perf_counter() - begun

    run()
    return _TIMED_SLOTS * tokens / min(run() for _ in range(3))
