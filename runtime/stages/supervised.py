"""Training on given sequences: plain text and answers. Kinds with other losses build on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray
from typing_extensions import override

from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import train_flops
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.compiler.search.sweep_fusion import at_unit_rate
from tunelang.dsl.vocabulary.optimizer_kinds import Optimizer
from tunelang.dsl.vocabulary.supervised_stages import Likelihood, Supervised
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.models.parameters import uses_dropout
from tunelang.runtime.sharding import Layout
from tunelang.runtime.stages.abstract_programs import (
    SCHEDULE_STEPS,
    SHORTEST_EXAMPLE,
    AbstractProgram,
    AbstractRows,
    abstract_params,
    step_config,
    train_program,
)
from tunelang.runtime.stages.stage_kinds import TrainingInputs, TrainingKind, register
from tunelang.runtime.tokenize import packing
from tunelang.runtime.tokenize.token_cache import Corpus, ItemValues, no_values, tokenise
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.objective import Batch, LikelihoodObjective, Objective
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, abstract_state, stack_state
from tunelang.runtime.training.train_step import StateProgram, StepMetrics, train_step
from tunelang.runtime.training.training_loop import Row
from tunelang.runtime.user_functions import UserFunction

SHORT_STEP = 2e10
"""FLOPs of a call that is worth starting: shorter steps are made several in a call."""
MOST_STEPS = 32
"""Steps of a call, at most."""
_ROUND = 16
"""Sequences that are not packed are padded to a multiple of so many tokens."""

Items = NDArray[np.int64]
"""The numbers of the items in each sequence of a batch, `[sequences, most]`; -1 for none."""
BatchExtras = Callable[[Batch, Items], Any]
"""Returns what the objective adds to a batch: `Batch.extras`."""


class OwnAnswers(Protocol):
    """Replaces the answers of some batches by the model's own."""

    def is_due(self, step: int) -> bool:
        """Whether the answers of a step are the model's own."""

    def replace(self, params: Any, batch: Batch, step: int) -> Batch:
        """Return a batch of numpy arrays with new answers."""


@dataclass
class SupervisedTrainer:
    """Trains on the batches of a packing table."""

    state: TrainState
    steps: int
    token_flops: float
    """FLOPs of a token, forward and backward."""
    steps_per_call: int
    stops: tuple[int, ...]
    """Calls end at multiples of these, and at `marks`."""
    marks: frozenset[int]
    corpus: Corpus
    table: packing.Table
    program: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    reports_perplexity: bool
    """Whether the loss is of a token, in nats."""
    extras: BatchExtras | None = None
    own_answers: OwnAnswers | None = None

    @property
    def overlaps(self) -> bool:
        """Whether a call may start before the last one's metrics arrive: not where the parameters
        of a step sample its answers.
        """
        return self.own_answers is None

    def call_end(self, step: int) -> int:
        """Return the step at which the call that begins at `step` ends."""
        ends = [(step // every + 1) * every for every in (self.steps_per_call, *self.stops)]
        return min([self.steps, *ends, *(mark for mark in self.marks if mark > step)])

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """Make the steps from `step` to `until`; returns how to wait for their metrics."""
        metrics, tokens = self.make_steps(step, until)
        return lambda: self.metric_rows(metrics, tokens)

    def make_steps(self, step: int, until: int) -> tuple[StepMetrics, list[float]]:
        """Make the steps from `step` to `until`; returns their metrics, and the tokens of each."""
        batches = [self._batch(number) for number in range(step, until)]
        self.state, metrics = self.program(
            self.state, jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        )
        return metrics, [float((batch.segments > 0).sum()) for batch in batches]

    def metric_rows(self, metrics: StepMetrics, tokens: Sequence[float]) -> list[Row]:
        """Return the metrics `[steps]` as a row for each step, which read so many `tokens`."""
        columns: dict[str, Any] = dict(vars(metrics))
        columns |= columns.pop("more")
        values = {name: np.asarray(column).tolist() for name, column in columns.items()}
        trained = values.pop("tokens")
        rows = []
        for index, count in enumerate(tokens):
            row = {name: column[index] for name, column in values.items()}
            if self.reports_perplexity:
                row["perplexity"] = math.exp(min(row["loss"], 700.0))
            flops = count * self.token_flops
            rows.append(row | {"tokens": count, "flops": flops, "trained_tokens": trained[index]})
        return rows

    def _batch(self, step: int) -> Batch:
        packed = packing.batch_of(self.table, self.corpus, step)
        batch = Batch(packed.tokens, packed.mask, packed.segments, packed.positions)
        if self.own_answers is not None and self.own_answers.is_due(step):
            return self.own_answers.replace(self.state.decoder_params, batch, step)
        if self.extras is None:
            return batch
        items = packing.items_of(self.table, self.corpus, step)
        return replace(batch, extras=self.extras(batch, items))

    def samples(self) -> Sequence[SampleRecord]:
        """Return no completions: nothing is sampled."""
        return ()

    def progress(self) -> dict[str, Any]:
        """Return nothing to save besides the state: the order of data is a function of the step."""
        return {}

    def resume(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        del progress
        self.state = state

    def updates(self, step: int) -> int:
        """Return the updates of the first `step` steps."""
        return step

    def close(self) -> None:
        """Release nothing: no processes were started."""


@dataclass(frozen=True)
class Auxiliary:
    """The second model of a supervised stage: a reference or a teacher."""

    architecture: Architecture
    live: bool
    """Whether each step runs it; else it runs once over all items, ahead of the first step."""


@dataclass(frozen=True)
class ObjectiveSetup:
    """The models and the data that an objective is built for."""

    segments: int
    """Segments of a sequence, at most."""
    architecture: Architecture
    """The trained model's."""
    auxiliary: Auxiliary | None
    has_values: bool
    """Whether the data gives each segment a number."""


@dataclass(frozen=True)
class OpenedData:
    """The data of a supervised stage, read and packed."""

    corpus: Corpus
    table: packing.Table
    config: StepConfig
    auxiliary: Auxiliary | None
    aux_params: Callable[[], Any]
    """Loads the parameters of the auxiliary model."""


SupervisedStage = TypeVar("SupervisedStage", bound=Supervised)


class SupervisedKind(TrainingKind[SupervisedStage]):
    """Trains on given sequences. A kind with another loss overrides what differs."""

    segments_per_example = 1
    """Answers of an example, each a segment of its own."""

    # What kinds override.

    def reads(self, stage: SupervisedStage, roles: set[str]) -> tuple[tuple[str, ...], ItemValues]:
        """Return the roles of the answers that the stage reads, and what gives them values."""
        del stage, roles
        return ("response",), no_values

    def longest(self, stage: SupervisedStage, context: int, longest: int) -> int:
        """Return the tokens of a sequence, where the data's longest item has `longest`."""
        del stage, context
        return longest

    def auxiliary(
        self, stage: SupervisedStage, own: Architecture, teacher: Architecture | None
    ) -> Auxiliary | None:
        """Return the second model that the objective reads, if it does."""
        del stage, own, teacher
        return None

    def teacher_architecture(
        self, stage: SupervisedStage, inputs: TrainingInputs
    ) -> Architecture | None:
        """Return the architecture of the teacher, for a stage that has one."""
        del stage, inputs
        return None

    def load_auxiliary(self, stage: SupervisedStage, inputs: TrainingInputs) -> Any:
        """Load the parameters of the auxiliary model."""
        raise NotImplementedError

    def objective(self, stage: SupervisedStage, setup: ObjectiveSetup) -> Objective:
        """Return the loss that the stage minimizes."""
        raise NotImplementedError

    def extras(
        self, stage: SupervisedStage, inputs: TrainingInputs, data: OpenedData
    ) -> BatchExtras | None:
        """Return what adds the objective's own arrays to batches."""
        del stage, inputs, data
        return None

    def abstract_extras(
        self, stage: SupervisedStage, rows: AbstractRows, segments: int, length: int
    ) -> Any:
        """Return the extras of a batch as shapes and shardings."""
        del stage, rows, segments, length
        return None

    def own_answers(
        self, stage: SupervisedStage, inputs: TrainingInputs, data: OpenedData
    ) -> OwnAnswers | None:
        """Return what replaces answers by the model's own."""
        del stage, inputs, data
        return None

    def programs_ahead(
        self, stage: SupervisedStage, architecture: Architecture, config: StepConfig,
        segments: int, batch: Batch,
    ) -> Iterator[AbstractProgram]:  # fmt: skip
        """Yield the programs that run before the first step."""
        del stage, architecture, config, segments, batch
        return iter(())

    # What they share.

    @override
    def open(self, stage: SupervisedStage, inputs: TrainingInputs) -> SupervisedTrainer:
        a, layout, planned = inputs.model.architecture, inputs.layout, inputs.planned
        corpus = self._corpus(stage, inputs)
        longest = self.longest(stage, a.context, _longest(corpus, stage.packing))
        table = packing.plan(
            corpus,
            stage.length,
            batch=packing.sequences_of(stage.batch, longest),
            packed=stage.packing,
            longest=longest,
        )
        # A kernel planned for the whole context may not take the length of the data.
        kernel = "xla" if planned.kernel == "splash" and longest % 128 else planned.kernel
        config = StepConfig(
            layout=layout,
            dtype=inputs.model.dtype,
            micro_batches=math.gcd(planned.micro_batches, table.batch // layout.batch_shards),
            remat=planned.remat,
            kernel=kernel,
            chunk=CHUNK,
            seed=derive(inputs.seed, "dropout") % 2**31 if uses_dropout(a) else 0,
            offloaded="optimizer" in planned.offload,
            branches=planned.branches,
        )
        auxiliary = self.auxiliary(stage, a, self.teacher_architecture(stage, inputs))
        data = OpenedData(
            corpus, table, config, auxiliary, lambda: self.load_auxiliary(stage, inputs)
        )
        aux_params = data.aux_params() if auxiliary is not None and auxiliary.live else None
        extras = self.extras(stage, inputs, data)
        own_answers = self.own_answers(stage, inputs, data)
        setup = ObjectiveSetup(
            table.most * corpus.segments_per_item, a, auxiliary, corpus.values is not None
        )
        # Built for a rate of 1, which the state's scale makes the stage's own: the branches of a
        # sweep over rates share the program.
        optimizer = at_unit_rate(stage.optimizer)
        unit = stage.model_copy(update={"optimizer": optimizer, "seed": None})
        objective = self.objective(unit, setup)
        transformation, program = inputs.resources.cached(
            ("train", a, config, optimizer, table.steps, repr(objective)),
            lambda: compile_step(a, optimizer, table.steps, config, objective),
        )
        state = inputs.first_state(
            transformation, config, stage.optimizer.lr, objective.initial_params()
        )
        token_flops = train_flops(a, longest)
        step_flops = token_flops * table.batch * longest
        steps_per_call = max(1, min(MOST_STEPS, int(SHORT_STEP / step_flops)))
        stops = (stage.evals and stage.eval_every, stage.checkpoint_every)
        return SupervisedTrainer(
            state=replace(state, aux_params=aux_params),
            steps=table.steps,
            token_flops=token_flops,
            steps_per_call=steps_per_call if own_answers is None else 1,
            stops=tuple(every for every in stops if every),
            marks=inputs.marks,
            corpus=corpus,
            table=table,
            program=program,
            reports_perplexity=objective == LikelihoodObjective(),
            extras=extras,
            own_answers=own_answers,
        )

    def _corpus(self, stage: SupervisedStage, inputs: TrainingInputs) -> Corpus:
        renderer = inputs.model.renderer
        stream = inputs.resources.stream(
            stage.data, seed=derive(inputs.seed, "data"), renderer=renderer
        )
        roles = set.intersection(*(set(part.roles.templates) for part in stream.parts))
        answers, values_of = self.reads(stage, roles)
        return tokenise(
            stream,
            renderer,
            context=inputs.model.architecture.context,
            cache=inputs.resources.cache,
            answers=answers,
            values_of=values_of,
        )

    @override
    def abstract_programs(
        self, stage: SupervisedStage, shapes: Shapes, planned: StageLayout, layout: Layout
    ) -> Iterator[AbstractProgram]:
        a = replace(shapes.architecture, scores=stage.yields == "scores")
        config = step_config(shapes, planned, layout)
        segments = self.segments_per_example
        if stage.packing:
            segments *= max(1, planned.length // (segments * SHORTEST_EXAMPLE))
        auxiliary = self.auxiliary(stage, a, shapes.teacher)
        objective = self.objective(stage, ObjectiveSetup(segments, a, auxiliary, True))
        optimizer, step = compile_step(
            a, at_unit_rate(stage.optimizer), SCHEDULE_STEPS, config, objective
        )
        state = abstract_state(a, optimizer, config, objective.initial_params)
        if config.branches > 1:
            state = stack_state(state, config.branches)
        if auxiliary is not None and auxiliary.live:
            state = replace(state, aux_params=abstract_params(auxiliary.architecture, config))
        rows = AbstractRows(layout, planned.rows)
        extras = self.abstract_extras(stage, rows, segments, planned.length)
        batch = rows.batch(planned.length, extras)
        yield train_program(step, state, batch, config, a)
        yield from self.programs_ahead(stage, a, config, segments, batch)


@register
class LikelihoodKind(SupervisedKind[Likelihood]):
    """Trains on the likelihood of text or of answers, or on a loss of the user's own."""

    stages = (Likelihood,)

    @override
    def objective(self, stage: Likelihood, setup: ObjectiveSetup) -> Objective:
        assert stage.loss is None or isinstance(stage.loss, UserFunction)
        return LikelihoodObjective(stage.loss)


def segment_values(values: NDArray[np.float32]) -> Callable[[Items], NDArray[np.float32]]:
    """Return what lays out the values of items `[items, segments]` for the segments of sequences:
    `[sequences, segments]`, 0 where there is none.
    """

    def lay_out(items: Items) -> NDArray[np.float32]:
        by_item = np.where(items[..., None] < 0, 0.0, values[items])
        return by_item.reshape(len(items), -1).astype(np.float32)

    return lay_out


def abstract_segment_values(rows: AbstractRows, segments: int) -> jax.ShapeDtypeStruct:
    """Return a number for each segment of a batch, as a shape and its sharding."""
    return rows.array(segments, dtype=jnp.float32)


def compile_step(
    a: Architecture, optimizer: Optimizer, steps: int, config: StepConfig, objective: Objective
) -> tuple[optax.GradientTransformation, StateProgram]:
    """Return the transformation and the step of a stage whose optimizer has a peak rate of 1."""
    transformation = build_optimizer(optimizer, steps, offloaded=config.offloaded)
    schedule = learning_rate(optimizer, steps)
    return transformation, train_step(a, transformation, schedule, config, objective)


def _longest(corpus: Corpus, packed: bool) -> int:
    """Return the tokens of a sequence: the context where examples share it, else what the longest
    item takes.
    """
    most = max(int(part.lengths.max()) for part in corpus.parts)
    rounded = min(corpus.longest, -(-most // _ROUND) * _ROUND)
    return max(corpus.context, rounded) if packed else rounded
