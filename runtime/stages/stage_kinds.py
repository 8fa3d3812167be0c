"""A kind of stage as one object: what the rest of the runtime has to know about it.

A kind is found by the vocabulary's class of the stage, or the nearest base class that has one. Each
module of this package registers the kinds that it holds, so that a new kind is a class of the
vocabulary and one file here (`docs/adding-a-stage.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from tunelang.compiler.graph import StageNode
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC, FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.stages import Stage, Training
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.loading.initial_weights import Origin, load_merged
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params, merge_params, split_trainable
from tunelang.runtime.sharding import Layout, shardings
from tunelang.runtime.stages.abstract_programs import AbstractProgram
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, initial_state
from tunelang.runtime.training.training_loop import Trainer

TrainingStage = TypeVar("TrainingStage", bound=Training)
TaskStage = TypeVar("TaskStage", bound=Stage)

Summary = dict[str, Any]
"""The report of a finished stage: `model`, `from`, `steps`, `metrics`, `evals`, ..."""


@dataclass(eq=False)
class OtherTokenizerError(TuneError):
    """The model that an `attribute` names, `name`, has another tokenizer than the trained one."""

    code = "other-tokenizer"
    exit_code = WRONG_SPEC
    attribute: str
    name: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.other_tokenizer(self.name)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute=self.attribute)


@dataclass(frozen=True)
class TrainingInputs:
    """A training stage's model, its place on the devices, and what stages share."""

    resources: Resources
    model: Model
    """With the architecture that is trained, adapters included."""
    params: Params
    """Initial parameters of the decoder; the first state takes them over."""
    source: Origin
    """Where `params` come from."""
    planned: StageLayout
    layout: Layout
    seed: int
    marks: frozenset[int]
    """Steps whose parameters other stages start from."""
    folder: Path
    """The stage's folder, for files computed ahead of the first step."""
    origin: Callable[[Reference], Origin]
    """Resolves a reference of the stage to weights."""

    @property
    def weights_seed(self) -> int:
        """The seed of random weights."""
        return derive(self.seed, "weights") % 2**31

    def initial_weights(self) -> Params:
        """Return a second copy of the initial parameters; frozen ones are shared."""
        trained, frozen = split_trainable(self.model.architecture, self.params)
        return merge_params(jax.tree.map(jnp.copy, trained), frozen)

    def load(self, reference: Reference) -> Params:
        """Load the weights that a reference stands for, adapters merged into them, in float32."""
        origin = self.origin(reference)
        model = self.resources.model(origin.model)
        params: Params = load_merged(origin, model, self.layout, self.weights_seed)
        return params

    def same_tokenizer(self, attribute: str, reference: Reference) -> Model:
        """Return the model that an attribute of the stage names.

        Raises `OtherTokenizerError` where its tokenizer is not that of the trained model.
        """
        model = self.resources.model(self.origin(reference).model)
        if model.renderer.tokenizer.digest != self.model.renderer.tokenizer.digest:
            raise OtherTokenizerError(attribute, reference.name)
        return model

    def first_state(
        self,
        optimizer: optax.GradientTransformation,
        config: StepConfig,
        learning_rate: float,
        objective_params: Params | None = None,
    ) -> TrainState:
        """Return the first state of training, which takes the initial parameters over.

        `optimizer` is built for a learning rate of 1.
        """
        params = self.params
        if objective_params:
            places = shardings(objective_params, self.layout)
            params = merge_params(params, jax.device_put(objective_params, places))
        a = self.model.architecture
        return initial_state(a, params, optimizer, config, learning_rate)


class TrainingKind(Generic[TrainingStage]):
    """A kind of stage that trains."""

    stages: tuple[type[Stage], ...] = ()

    def open(self, stage: TrainingStage, inputs: TrainingInputs) -> Trainer:
        """Open the data and compile the programs of a stage."""
        raise NotImplementedError

    def abstract_programs(
        self, stage: TrainingStage, shapes: Shapes, planned: StageLayout, layout: Layout
    ) -> Iterator[AbstractProgram]:
        """Yield the programs that a run of the stage would compile, to be lowered."""
        raise NotImplementedError

    def finish(
        self,
        stage: TrainingStage,
        inputs: TrainingInputs,
        params: Params,
        metrics: Mapping[str, float],
        measure: Callable[[Model, Params], Mapping[str, float]],
    ) -> dict[str, float]:
        """Return metrics of the trained `params` that are known at the end only.

        `metrics` are the last values of all others; `measure` runs the stage's evals on a model.
        """
        del stage, inputs, params, metrics, measure
        return {}


@dataclass(frozen=True)
class LoadedWeights:
    """The weights that a reference stands for, in float32, adapters merged into them."""

    origin: Origin
    model: Model
    params: Params
    layout: Layout


class TaskContext(Protocol):
    """The run, as a stage that does not train sees it."""

    resources: Resources
    node: StageNode
    digest: str
    """The fingerprint of the stage."""
    folder: Path
    """The stage's folder, for its results."""
    output: Path | None
    """The folder that the stage names to write to."""
    stopping: Callable[[], bool]
    """Whether the user asked to stop."""

    def seed(self, stated: int | None) -> int:
        """Return the stage's seed: the stated one, or one drawn from the run's."""

    def origin(self, reference: Reference) -> Origin:
        """Resolve a reference to weights."""

    def load(self, reference: Reference) -> LoadedWeights:
        """Load the weights that a reference stands for."""

    def measure(
        self,
        evals: Sequence[Reference],
        weights: LoadedWeights,
        known: Mapping[str, Mapping[str, float]],
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Run the evals that are not `known`; returns results by digest and by name."""

    def save(self, params: Params) -> None:
        """Write a checkpoint of what the stage yields."""

    def doing(self, what: str) -> None:
        """Tell the user what is being done."""

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Tell the user how far the stage is."""


class TaskKind(Generic[TaskStage]):
    """A kind of stage that samples, merges, measures or writes models, and trains nothing."""

    stages: tuple[type[Stage], ...] = ()
    keeps_partial_results = False
    """Whether an interrupted stage goes on from the files in its folder."""

    def run(self, stage: TaskStage, context: TaskContext) -> Summary:
        """Do what the stage asks for; returns its summary."""
        raise NotImplementedError

    def abstract_programs(
        self, stage: TaskStage, shapes: Shapes, layout: Layout
    ) -> Iterator[AbstractProgram]:
        """Yield the programs that a run of the stage would compile, evals apart."""
        del stage, shapes, layout
        return iter(())

    def resident_models(self, stage: TaskStage) -> int:
        """Return how many models of the size of the first are on the devices during evals,
        besides the one that is measured.
        """
        del stage
        return 0


_KINDS: dict[type[Stage], TrainingKind[Any] | TaskKind[Any]] = {}

Kind = TypeVar("Kind", bound=TrainingKind[Any] | TaskKind[Any])


def register(kind: type[Kind]) -> type[Kind]:
    """Enter a kind into the registry, under each of its classes of the vocabulary."""
    for stage in kind.stages:
        _KINDS[stage] = kind()
    return kind


@cache
def _import_kinds() -> None:
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def kind_of(stage: object) -> Any:
    """Return the kind of a stage: of its class, or of the nearest base class that has one.

    Raises `LookupError` for a stage that the runtime cannot run.
    """
    _import_kinds()
    for base in type(stage).__mro__:
        if base in _KINDS:
            return _KINDS[base]
    raise LookupError(type(stage).__name__)
