"""Training on given sequences: plain text, answers, pairs of answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.layout.sweep_fusion import at_unit_rate
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import train_flops
from tunelang.dsl.vocabulary.preference_stages import Compared, Kto, Preference, RewardModel
from tunelang.dsl.vocabulary.supervised_stages import Distill, Likelihood, Supervised
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.data.stream import Stream
from tunelang.runtime.evals.score_answers import label_of, margin_of, score_answers
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import uses_dropout
from tunelang.runtime.objectives.answer_scores import (
    KtoObjective,
    PairObjective,
    Reference,
    ScoreObjective,
)
from tunelang.runtime.sharding import Layout
from tunelang.runtime.stages.distill import (
    DistillObjective,
    OwnAnswers,
    Stored,
    own_answers,
    store_teacher,
)
from tunelang.runtime.store.atomic_files import written_whole
from tunelang.runtime.tokenize import packing
from tunelang.runtime.tokenize.token_cache import Corpus, Valued, tokenise, unvalued
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.objective import Batch, LikelihoodObjective, Objective
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState
from tunelang.runtime.training.train_step import StateProgram, StepMetrics, train_step
from tunelang.runtime.training.training_loop import Row
from tunelang.runtime.user_functions import Custom

SHORT_STEP = 2e10
"""FLOPs of a call that is worth starting: shorter steps are made several in a call."""
MOST_STEPS = 32
"""Steps of a call."""
_ROUND = 16
"""Sequences that are not packed are padded to a multiple of so many tokens."""


@dataclass
class SupervisedTrainer:
    """See `loop.Trainer`."""

    state: TrainState
    steps: int
    token_flops: float
    """What has to be computed for a token."""
    call: int
    """Steps of a call."""
    ends: tuple[int, ...]
    """Multiples of these, and `marks`, are where calls end."""
    marks: frozenset[int]
    corpus: Corpus
    table: packing.Table
    program: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    perplexity: bool
    """Whether the loss is of a token, in nats."""
    values: NDArray[np.float32] | None = None
    """`[items, pieces]`: labels or margins."""
    reference: NDArray[np.float32] | None = None
    """`[items, pieces]`: log-probabilities of the reference, in nats."""
    rotated: bool = False
    """Whether batches also hold mismatched answers."""
    teacher: Stored | None = None
    own: OwnAnswers | None = None
    ahead: bool = True

    def until(self, step: int) -> int:
        """See `loop.Trainer`."""
        ends = [(step // every + 1) * every for every in (self.call, *self.ends)]
        return min([self.steps, *ends, *(mark for mark in self.marks if mark > step)])

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """See `loop.Trainer`."""
        metrics, seen = self.make(step, until)
        return lambda: self.rows(metrics, seen)

    def make(self, step: int, until: int) -> tuple[StepMetrics, list[float]]:
        """Make the steps from `step` to `until`; returns their metrics, and the tokens of each."""
        batches = [self._batch(each) for each in range(step, until)]
        self.state, metrics = self.program(
            self.state, jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        )
        return metrics, [float((batch.segments > 0).sum()) for batch in batches]

    def rows(self, metrics: StepMetrics, seen: Sequence[float]) -> list[Row]:
        """Return the metrics `[steps]` of each step, whose tokens are `seen`."""
        held = dict(vars(metrics))
        more = held.pop("more")
        found = {name: np.asarray(values).tolist() for name, values in {**held, **more}.items()}
        trained = found.pop("tokens")
        rows = []
        for at, tokens in enumerate(seen):
            row = {name: values[at] for name, values in found.items()}
            if self.perplexity:
                row["perplexity"] = math.exp(min(row["loss"], 700.0))
            flops = tokens * self.token_flops
            rows.append(row | {"tokens": tokens, "flops": flops, "trained_tokens": trained[at]})
        return rows

    def _batch(self, step: int) -> Batch:
        found = packing.batch_of(self.table, self.corpus, step)
        batch = Batch(found.tokens, found.mask, found.segments, found.positions)
        if self.own is not None and self.own.drawn(step):
            return self.own.of(self.state.decoder_params, batch, step)
        if all(e is None for e in (self.values, self.reference, self.teacher)) and not self.rotated:
            return batch
        items = packing.items_of(self.table, self.corpus, step)

        def of(array: NDArray[np.float32]) -> NDArray[np.float32]:
            held = np.where(items[..., None] < 0, 0.0, array[items])
            return held.reshape(len(items), -1).astype(np.float32)

        if self.values is not None:
            batch = replace(batch, values=of(self.values))
        if self.reference is not None:
            batch = replace(batch, reference=of(self.reference))
        if self.teacher is not None:
            batch = replace(batch, teacher=self.teacher.of(items, self.table.length))
        if self.rotated:
            batch = replace(
                batch, mismatched=mismatched(batch, self.corpus.pad, self.corpus.pieces)
            )
        return batch

    def samples(self) -> Sequence[SampleRecord]:
        """See `loop.Trainer`."""
        return ()

    def progress(self) -> dict[str, Any]:
        """See `loop.Trainer`: the order of data is a function of the step."""
        return {}

    def resume(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """See `loop.Trainer`."""
        del progress
        self.state = state


def supervised_trainer(
    resources: Resources,
    stage: Supervised,
    model: Model,
    planned: StageLayout,
    layout: Layout,
    seed: int,
    begin: Callable[[Any, StepConfig, Any], TrainState],
    reference: Callable[[], tuple[Architecture, Any]],
    marks: frozenset[int],
    kept: Path,
) -> SupervisedTrainer:
    """Open the data and compile the program of a stage.

    `begin` makes the first state from the optimizer, the program and what the objective trains
    beside the decoder; `reference` the architecture and the parameters of the reference, or of the
    teacher. `kept` is a folder for what is computed ahead.
    Raises what opening data raises.
    """
    a = model.architecture
    stream = resources.stream(stage.data, seed=derive(seed, "data"), renderer=model.renderer)
    answers, valued = _read(stage, stream)
    corpus = tokenise(
        stream,
        model.renderer,
        context=a.context,
        cache=resources.cache,
        answers=answers,
        valued=valued,
    )
    longest = _longest(corpus, stage.packing)
    if isinstance(stage, Distill) and stage.on_policy:
        longest = min(a.context, max(longest, stage.rollout.max_tokens + _ROUND))
    table = packing.plan(
        corpus,
        stage.length,
        batch=packing.sequences_of(stage.batch, longest),
        packed=stage.packing,
        longest=longest,
    )
    # One that was planned for the whole context may not have the length of the data.
    kernel = "xla" if planned.kernel == "splash" and longest % 128 else planned.kernel
    config = StepConfig(
        layout=layout,
        dtype=model.dtype,
        micro_batches=math.gcd(planned.micro_batches, table.batch // layout.batch_shards),
        remat=planned.remat,
        kernel=kernel,
        chunk=CHUNK,
        seed=derive(seed, "dropout") % 2**31 if uses_dropout(a) else 0,
        offloaded="optimizer" in planned.offload,
        branches=planned.branches,
    )
    count = table.most * corpus.pieces
    aux_params: Any = None
    stored: NDArray[np.float32] | None = None
    live: Architecture | None = None
    if isinstance(stage, Compared) and stage.needs_reference:
        if isinstance(stage, Preference) and stage.reference_log_probs == "ahead":
            stored = _ahead(corpus, model, reference, layout, kept)
        else:
            live, aux_params = reference()
    teacher: Stored | None = None
    own: OwnAnswers | None = None
    if isinstance(stage, Distill):
        live, aux_params = reference()
        if stage.teacher_log_probs == "ahead":
            teacher = store_teacher(stage, corpus, live, aux_params, a.vocabulary, config, kept)
            aux_params = None
        if stage.on_policy:
            own = own_answers(stage, model, table.batch, longest, layout, seed)
    # Built for a rate of 1, which the state's scale makes the stage's own: a sweep over rates
    # shares the program.
    unit = at_unit_rate(stage.optimizer)
    plain = stage.model_copy(update={"optimizer": unit, "seed": None})
    objective = objective_of(plain, count, a, live, corpus.values is not None)
    optimizer, make = resources.cached(
        ("train", a, config, unit, table.steps, repr(objective)),
        lambda: compiled(a, unit, table.steps, config, objective),
    )
    state = replace(begin(optimizer, config, objective.extra()), aux_params=aux_params)
    token_flops = train_flops(a, longest)
    call = max(1, min(MOST_STEPS, int(SHORT_STEP / (token_flops * table.batch * longest))))
    if own is not None:
        call = 1  # the parameters that sample are those of the step
    ends = tuple(n for n in (stage.evals and stage.eval_every, stage.checkpoint_every) if n)
    return SupervisedTrainer(
        state, table.steps, token_flops, call, ends, marks, corpus, table, make,
        objective == LikelihoodObjective(), corpus.values, stored, isinstance(stage, Kto),
        teacher, own, own is None,
    )  # fmt: skip


def _read(stage: Supervised, stream: Stream) -> tuple[tuple[str, ...], Valued]:
    """Return the roles of the answers that the stage reads, and what gives them values."""
    roles = set.intersection(*(set(part.roles.templates) for part in stream.parts))
    match stage:
        case Kto() if "label" in roles:
            return ("response",), label_of
        case Kto():
            return ("chosen", "rejected"), lambda _: (1.0, 0.0)
        case RewardModel() if "margin" in roles:
            return ("chosen", "rejected"), margin_of
        case RewardModel() | Preference():
            return ("chosen", "rejected"), unvalued
    return ("response",), unvalued


def objective_of(
    stage: Supervised, count: int, own: Architecture, live: Architecture | None, valued: bool
) -> Objective:
    """Return what a stage makes smaller, for sequences of at most `count` segments.

    `live` is the reference or the teacher where it runs beside the model; `valued` says whether
    the data states margins.
    """
    match stage:
        case Distill():
            assert live is not None
            return DistillObjective(stage, own, live)
        case Preference():
            reference = Reference(live) if stage.needs_reference else None
            return PairObjective(stage, count, reference)
        case Kto():
            return KtoObjective(stage, count, Reference(live))
        case RewardModel():
            return ScoreObjective(stage, count, valued)
        case Likelihood():
            assert stage.loss is None or isinstance(stage.loss, Custom)
            return LikelihoodObjective(stage.loss)
    return LikelihoodObjective()


def _ahead(
    corpus: Corpus,
    model: Model,
    reference: Callable[[], tuple[Architecture, Any]],
    layout: Layout,
    kept: Path,
) -> NDArray[np.float32]:
    """Return the reference's log-probability of every answer, `[items, pieces]`, in nats."""
    path = kept / "reference.npy"
    if path.exists():
        held: NDArray[np.float32] = np.load(path)
        return held
    architecture, params = reference()
    found = score_answers(corpus, replace(model, architecture=architecture), params, layout)
    with written_whole(path) as whole, whole.open("wb") as file:
        np.save(file, found.values)
    return found.values


def compiled(
    a: Architecture,
    unit: Any,
    steps: int,
    config: StepConfig,
    objective: Objective,
) -> tuple[Any, StateProgram]:
    """Return the optimizer and the program of a stage whose optimizer has the rate `unit`."""
    optimizer = build_optimizer(unit, steps, offloaded=config.offloaded)
    schedule = learning_rate(unit, steps)
    return optimizer, train_step(a, optimizer, schedule, config, objective)


def _longest(corpus: Corpus, packed: bool) -> int:
    """Return the tokens of a sequence: the context, where examples share it, or what all of them
    fit into.
    """
    most = max(int(part.lengths.max()) for part in corpus.parts)
    rounded = min(corpus.longest, -(-most // _ROUND) * _ROUND)
    return max(corpus.context, rounded) if packed else rounded


def mismatched(batch: Batch, pad: int, pieces: int) -> Batch:
    """Return the prompts of a batch of numpy arrays with answers to other prompts.

    Within a sequence each segment gets the answer of the next item, of `pieces` segments, so that
    all of them still fit; the only item of a sequence gets that of the next sequence, cut to the
    room that there is.
    """
    rows, length = batch.tokens.shape
    tokens = np.full_like(batch.tokens, pad)
    trained = np.zeros_like(batch.trained)
    segments = np.zeros_like(batch.segments)
    positions = np.zeros_like(batch.positions)
    cut = [_segments(batch, row) for row in range(rows)]
    for row, own in enumerate(cut):
        alone = len(own) == pieces
        others = cut[(row + 1) % rows][:pieces] if alone else own[pieces:] + own[:pieces]
        at = 0
        for number, ((prompt, _), (_, answer)) in enumerate(zip(own, others, strict=True), 1):
            whole = np.concatenate([prompt, answer])[: length - at]
            end = at + len(whole)
            tokens[row, at:end] = whole
            trained[row, at + len(prompt) : end] = True
            segments[row, at:end] = number
            positions[row, at:end] = np.arange(len(whole))
            at = end
    return Batch(tokens, trained, segments, positions)


def _segments(batch: Batch, row: int) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return prompt and answer of each segment of a sequence; the answer begins where training
    does.
    """
    found = []
    for number in range(1, int(batch.segments[row].max()) + 1):
        own = batch.segments[row] == number
        ids, trained = batch.tokens[row][own], batch.trained[row][own]
        begin = int(np.argmax(trained))
        found.append((ids[:begin], ids[begin:]))
    return found
