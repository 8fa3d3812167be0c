"""Distillation as a stage: what the student matches of its teacher, and whose answers it is on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.dsl.vocabulary.supervised_stages import Distill
from tunelang.dsl.vocabulary.training import JensenShannon, Sampling
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.evals.score_answers import epoch
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt
from tunelang.runtime.generation.slot_queue import power_of_two
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import OBJECTIVE_PARAMS, abstract_decoder
from tunelang.runtime.models.primitives import parameter
from tunelang.runtime.objectives.distill_losses import (
    attention_transfer,
    divergence,
    feature_transfer,
    layer_map,
    top_k,
    top_k_divergence,
)
from tunelang.runtime.sharding import Layout, jit
from tunelang.runtime.tokenize.token_cache import Corpus
from tunelang.runtime.training.objective import (
    Batch,
    Models,
    Objective,
    balance,
    hidden_states,
    shift_targets,
)
from tunelang.runtime.training.step_config import StepConfig

CHUNK = 64
"""Tokens of a sequence whose logits are in memory at once, of both models."""
_TIMED_TOKENS = 32
_TIMED_SLOTS = 8


@dataclass(frozen=True)
class DistillObjective(Objective):
    """The mean loss of a token; see `train.Objective`."""

    stage: Distill
    student: Architecture
    teacher: Architecture

    def extra(self) -> nnx.State[Any, Any]:
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

    def whole(self, models: Models, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the trained tokens, and the tokens that there are."""
        del models
        there = jnp.sum(batch.segments > 0).astype(jnp.float32)
        return jnp.maximum(jnp.sum(shift_targets(batch)[1]), 1.0), jnp.maximum(there, 1.0)

    def loss(
        self,
        models: Models,
        batch: Batch,
        keys: jax.Array | None,
        whole: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `train.Objective`."""
        stage, program, student = self.stage, models.config, models.decoder
        targets, counted = shift_targets(batch)
        tokens, there = whole
        transfers = stage.attention is not None or stage.features is not None
        teacher: Any = None
        if models.aux_params is not None:
            graph, _ = abstract_decoder(self.teacher, program.dtype)
            teacher = nnx.merge(graph, jax.lax.stop_gradient(models.aux_params))
        if transfers:
            given = batch.tokens, batch.segments, batch.positions
            traced = partial(Decoder.run_with_maps, layout=program.layout, remat=program.remat)
            hidden, routed, maps, states = traced(student, *given, keys)
            known, _, teacher_maps, teacher_states = traced(teacher, *given)
        else:
            hidden, routed = hidden_states(student, batch, keys, program)
            known = hidden  # not read, where the batch holds the teacher's tokens
            if batch.teacher is None:
                known = hidden_states(teacher, batch, None, program)[0]
        kind = stage.divergence
        settings: dict[str, Any] = {
            "kind": kind.word,
            "beta": kind.share if isinstance(kind, JensenShannon) else 0.5,
            "temperature": stage.temperature,
            "hard": stage.hard,
            "chunk": CHUNK,
            "student_cap": student.architecture.logit_cap,
            "layout": program.layout,
        }
        # Tables may be padded to other sizes; the tokens are the same.
        common = min(self.student.vocabulary, self.teacher.vocabulary)
        head = student.head_weight()[:common]
        if batch.teacher is not None:
            ids, log_probs = batch.teacher
            total, parts = top_k_divergence(
                hidden, head, ids, log_probs, targets, counted, **settings
            )
        elif stage.top_k is not None:
            ids, log_probs = _likeliest(known, teacher, stage, common, program.layout)
            total, parts = top_k_divergence(
                hidden, head, ids, log_probs, targets, counted, **settings
            )
        else:
            total, parts = divergence(
                hidden, head, known, teacher.head_weight()[:common], targets, counted,
                teacher_cap=self.teacher.logit_cap, **settings,
            )  # fmt: skip
        loss = total / tokens
        more = {
            "divergence": parts.divergence / tokens,
            "cross_entropy": parts.cross_entropy / tokens,
        }
        if stage.attention is not None:
            layers = self._layers(stage.attention.layers)
            same = batch.segments[:, :, None] == batch.segments[:, None, :]
            seen = same & (batch.segments > 0)[:, :, None]
            seen &= jnp.tril(jnp.ones(seen.shape[1:], bool))
            found = attention_transfer(
                maps[:, :, None], teacher_maps[layers][:, :, None], seen,
                distance=stage.attention.distance,  # type: ignore[arg-type]
            )  # fmt: skip
            more["attention_loss"] = found / (there * self.student.layers)
            loss += stage.attention.weight * more["attention_loss"]
        if stage.features is not None:
            layers = self._layers(stage.features.layers)
            projections: Any = models.extra[OBJECTIVE_PARAMS]
            projections = projections["projection"].get_value()
            features = [
                feature_transfer(
                    states[at], teacher_states[layer], projections[at], batch.segments > 0,
                    pooling=stage.features.pooling,  # type: ignore[arg-type]
                    distance=stage.features.distance,  # type: ignore[arg-type]
                )
                for at, layer in enumerate(layers.tolist())
            ]  # fmt: skip
            count = there
            if stage.features.pooling != "token":
                count = jnp.float32(batch.tokens.shape[0] * program.micro_batches)
            more["feature_loss"] = sum(features, jnp.zeros(())) / (count * self.student.layers)
            loss += stage.features.weight * more["feature_loss"]
        loss += jnp.sum(counted) / tokens * balance(student, batch, routed)
        return loss, more

    def _layers(self, given: tuple[int, ...] | None) -> NDArray[np.int64]:
        return np.array(layer_map(self.student.layers, self.teacher.layers, given))


def _likeliest(hidden: Any, teacher: Any, stage: Distill, common: int, layout: Layout) -> Any:
    assert stage.top_k is not None
    return top_k(
        hidden,
        teacher.head_weight()[:common],
        k=min(stage.top_k, common),
        temperature=stage.temperature,
        chunk=CHUNK,
        cap=teacher.architecture.logit_cap,
        layout=layout,
    )


# The teacher's likeliest tokens, stored ahead.


@dataclass(frozen=True)
class Stored:
    """The teacher's likeliest tokens at each token of a corpus's items, in files."""

    ids: NDArray[np.int32]
    """`[tokens, k]`."""
    log_probs: NDArray[np.float16]
    offsets: NDArray[np.int64]
    """Where the tokens of each item begin, `[items + 1]`."""

    def of(self, items: NDArray[np.int64], length: int) -> tuple[Any, Any]:
        """Return them for sequences of items, `[sequences, length, k]` each."""
        k = self.ids.shape[1]
        ids = np.zeros((len(items), length, k), np.int32)
        ids[:] = np.arange(k)  # padding: any tokens that differ
        log_probs = np.full((len(items), length, k), -np.log(2.0 * k), np.float32)
        for row, own in enumerate(items):
            at = 0
            for item in own[own >= 0]:
                first, last = self.offsets[item], self.offsets[item + 1]
                end = at + int(last - first)
                ids[row, at:end] = self.ids[first:last]
                log_probs[row, at:end] = self.log_probs[first:last]
                at = end
        return ids, log_probs


def forget_teacher(folder: Path) -> None:
    """Remove what was stored, which is large."""
    for path in folder.glob("teacher.*"):
        path.unlink()


def store_teacher(
    stage: Distill,
    corpus: Corpus,
    architecture: Architecture,
    params: Any,
    vocabulary: int,
    config: StepConfig,
    folder: Path,
) -> Stored:
    """Run the teacher over all items once; what was stored before is taken as it is."""
    assert stage.top_k is not None
    k = min(stage.top_k, vocabulary, architecture.vocabulary)
    lengths = np.concatenate([part.lengths for part in corpus.parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shape = int(offsets[-1]), k
    done = folder / "teacher.done"
    mode: Any = "r" if done.exists() else "w+"
    ids = np.memmap(folder / "teacher.ids", np.int32, mode, shape=shape)
    log_probs = np.memmap(folder / "teacher.log_probs", np.float16, mode, shape=shape)
    if not done.exists():
        graph, _ = abstract_decoder(architecture, config.dtype)

        def one(params: Any, batch: Batch) -> Any:
            decoder = nnx.merge(graph, params)
            hidden, _ = hidden_states(decoder, batch, None, config)
            common = min(vocabulary, architecture.vocabulary)
            return _likeliest(hidden, decoder, stage, common, config.layout)

        run = jit(one, config.layout)
        batches, items = epoch(corpus, None, config.layout)
        for step in range(len(items)):
            found = jax.device_get(run(params, jax.tree.map(lambda a, s=step: a[s], batches)))
            for row, own in enumerate(items[step]):
                at = 0
                for item in own[own >= 0]:
                    first, last = offsets[item], offsets[item + 1]
                    end = at + int(last - first)
                    ids[first:last] = found[0][row, at:end]
                    log_probs[first:last] = found[1][row, at:end]
                    at = end
        ids.flush()
        log_probs.flush()
        done.touch()
    return Stored(ids, log_probs, offsets)


# The student's own answers.


@dataclass(frozen=True)
class OwnAnswers:
    """Samples answers of the student to the prompts of a batch (GKD)."""

    stage: Distill
    sampler: Sampler
    seed: int

    def drawn(self, step: int) -> bool:
        """Whether the answers of a step are the student's own."""
        return derive(self.seed, "whose", step) % 10_000 < self.stage.on_policy * 10_000

    def of(self, params: Any, batch: Batch, step: int) -> Batch:
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


def own_answers(
    stage: Distill, model: Model, batch: int, longest: int, layout: Layout, seed: int
) -> OwnAnswers:
    """Open the sampler of the student."""
    slots = power_of_two(batch)
    sampler = Sampler.open(model, layout, stage.rollout, slots=slots, longest=longest)
    return OwnAnswers(stage, sampler, derive(seed, "student"))


# The report.


def compared(
    student: tuple[Model, Any],
    teacher: tuple[Model, Any],
    layout: Layout,
    found: Mapping[str, float],
    known: Mapping[str, float],
) -> dict[str, float]:
    """Return what a distilled student is beside its teacher: its share of each of the teacher's
    metrics, of its parameters, and of its decoding speed.
    """
    sizes = [parameter_count(model.architecture) for model, _ in (student, teacher)]
    rates = [_decode_rate(*each, layout) for each in (student, teacher)]
    shares = {
        f"retention.{name}": found[name] / value
        for name, value in known.items()
        if name in found and value
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
