"""What a stage starts from: weights of a model or of a stage, and the adapters on top of them.

A stage that trains an adapter keeps only that. What it yields is the weights that it started from,
with their adapters and its own; so a chain of such stages is followed down to the one that trained
all weights, or to the declared model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from tunelang.compiler.graph import Input, StageGraph, StageNode, models_of, named
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.compiler.plan import Plan
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.training import Adapter, Continued, Lora
from tunelang.runtime.models import pretrained
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.parameters import abstract_decoder, merge_params, split_trainable
from tunelang.runtime.pipeline.resources import Model, Resources
from tunelang.runtime.sharding import Layout, shardings
from tunelang.runtime.store.run_store import StageFolder, Store
from tunelang.runtime.training.checkpoints import load_params
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state


class MissingInputError(Exception):
    """A stage would read one that is left out of the run and not done: `stage`, `missing`."""

    def __init__(self, stage: str, missing: str) -> None:
        super().__init__(stage, missing)
        self.stage = stage
        self.missing = missing


class NoMetricError(Exception):
    """No branch of a sweep has the metric that decides it: `stage`, `metric`, `known`."""

    def __init__(self, stage: str, metric: str, known: tuple[str, ...]) -> None:
        super().__init__(stage, metric, known)
        self.stage = stage
        self.metric = metric
        self.known = known


class NoCheckpointError(Exception):
    """A stage is to start from a step that another one did not keep: `stage`, `step`, `kept`."""

    def __init__(self, stage: str, step: int, kept: tuple[int, ...]) -> None:
        super().__init__(stage, step, kept)
        self.stage = stage
        self.step = step
        self.kept = kept


@dataclass(frozen=True)
class Origin:
    """Weights to start from."""

    model: str
    """The declared model."""
    path: Path | None
    """The checkpoint of all weights; None for the declared model's own."""
    adapters: tuple[tuple[Lora, Path], ...] = ()
    """On top of them, each with its checkpoint."""
    scores: bool = False
    """Whether they are of a reward model."""
    node: str | None = None
    """The stage; None for the declared model."""
    evals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Digest of an eval -> what it found for these weights."""


@dataclass
class Origins:
    """Finds what references to models and stages stand for, in one plan and its store."""

    plan: Plan
    graph: StageGraph
    store: Store
    resources: Resources
    selected: Callable[[Input, str, float], None] = lambda *_: None
    """Told of each sweep that is decided, once: what reads it, the winner, its metric."""
    _told: set[tuple[str, str]] = field(default_factory=set)

    def summary(self, node: str) -> dict[str, Any]:
        """Return what a finished stage said of itself; raises `MissingInputError`."""
        held = self.store.folder(self.plan.by_node[node].digest).done()
        if held is None:
            raise MissingInputError("", node)
        found: dict[str, Any] = held["summary"]
        return found

    def of(self, node: StageNode, reference: Reference) -> Origin:
        """Return the weights that a reference to a model or a stage stands for, as it is in a node.

        Raises `MissingInputError`, `NoMetricError`, `NoCheckpointError`.
        """
        if reference.noun == "model":
            return Origin(reference.name, None)
        read = next(each for each in node.inputs if each.stage == reference.name)
        name = self.winner(read)
        summary = self.summary(name)
        step = int(summary["steps"]) if reference.step is None else reference.step
        found = self.at(name, step)
        return found if reference.step is not None else replace(found, evals=summary["evals"])

    def at(self, name: str, step: int) -> Origin:
        """Return the weights of a node after a step, which need not be its last.

        Raises what `of` raises.
        """
        node = self.graph.nodes[name]
        folder = self.store.folder(self.plan.by_node[name].digest)
        if step not in folder.steps():
            raise NoCheckpointError(node.stage, step, folder.steps())
        path = folder.checkpoints / str(step)
        value: Any = node.value
        scores = value.yields == "scores"
        if getattr(value, "adapter", None) is None:
            done = folder.done()
            model = done["summary"]["model"] if done else models_of(self.graph, name)[0]
            return Origin(model, path, scores=scores, node=name)
        below = self.of(node, value.from_)
        adapters = below.adapters
        if isinstance(value.adapter, Continued):
            adapters, lora = adapters[:-1], adapters[-1][0]
        else:
            lora = value.adapter
        return Origin(below.model, below.path, (*adapters, (lora, path)), scores, name)

    def latest(self, stage: str) -> Origin:
        """Return what a stage yielded, or, of one that is not done, its last checkpoint.

        Of a sweep the first branch that is done is taken, unless `stage` names one. Raises
        `UnknownStage`, `MissingInputError` and what `of` raises.
        """
        found: tuple[str, int] | None = None
        for node in named(self.graph, stage):
            folder = self.store.folder(self.plan.by_node[node].digest)
            done, steps = folder.done(), folder.steps()
            if steps and (done is not None or found is None):
                found = node, steps[-1]
                if done is not None:
                    break
        if found is None:
            raise MissingInputError(stage, stage)
        return self.at(*found)

    def anywhere(self, reference: Reference) -> Origin:
        """Return what a reference stands for that is not of a node, but of a reward.

        Raises what `of` raises.
        """
        readers = (
            node
            for node in self.graph.nodes.values()
            if reference.noun == "model" or any(e.stage == reference.name for e in node.inputs)
        )
        return self.of(next(readers), reference)

    def folder(self, reference: Reference) -> StageFolder:
        """Return the folder of a finished stage; raises `MissingInputError`, `NoMetricError`."""
        read = next(
            each
            for node in self.graph.nodes.values()
            for each in node.inputs
            if each.stage == reference.name
        )
        name = self.winner(read)
        folder = self.store.folder(self.plan.by_node[name].digest)
        if folder.done() is None:
            raise MissingInputError("", name)
        return folder

    def winner(self, read: Input) -> str:
        """Return the node that an input stands for; raises `NoMetricError`."""
        if read.selection is None:
            return read.nodes[0]
        metric = read.selection.metric
        found: list[tuple[float, str, str]] = []
        known: dict[str, None] = {}
        for node in read.nodes:
            metrics = self.summary(node)["metrics"]
            known.update(dict.fromkeys(metrics))
            value = metric_of(self.resources, metrics, metric)
            if value is not None and value == value:
                found.append((value, self.plan.by_node[node].digest, node))
        if not found:
            raise NoMetricError(read.stage, metric, tuple(known))
        sign = -1.0 if read.selection.direction == "best" else 1.0
        value, _, node = min(found, key=lambda each: (sign * each[0], each[1]))
        if (read.stage, node) not in self._told:
            self._told.add((read.stage, node))
            self.selected(read, node, value)
        return node


def metric_of(resources: Resources, metrics: Mapping[str, float], name: str) -> float | None:
    """Return a metric by the name that a spec uses: an eval's bare name is its first metric."""
    if name in metrics:
        return metrics[name]
    declared = resources.program.declarations.get(name)
    if declared is not None and declared.noun == "eval":
        return metrics.get(f"{name}.{next(iter(declared.value.metrics))}")
    return None


# Loading.


def starting(
    origin: Origin,
    adapter: Adapter | None,
    model: Model,
    layout: Layout,
    seed: int,
    scores: bool = False,
) -> tuple[Architecture, Any]:
    """Return the architecture that a stage trains, and its parameters at the beginning.

    `seed` is of random weights; with `scores` the head yields a number. Raises `NoTargetError`,
    `BadWeightsError`, `CheckpointError`.
    """
    loras = tuple(lora for lora, _ in origin.adapters)
    base = _base(origin, model)
    if adapter is None:
        architecture, params = base, loaded(origin, model, layout, seed)
    elif isinstance(adapter, Continued):
        architecture = adapted(base, loras, model.storage)
        params = _loaded(origin, architecture, model, layout)
    else:
        assert isinstance(adapter, Lora)
        architecture = adapted(base, (*loras, adapter), model.storage)
        params = _loaded(origin, architecture, model, layout)
        params = _begun(params, architecture, layout, model.dtype, seed)
    if not scores or origin.scores:
        return architecture, params
    drawn = architecture.width**-0.5 * jax.random.normal(
        jax.random.key(seed), (architecture.width,)
    )
    return scoring(architecture, params, score_head(architecture, drawn, layout))


def score_head(architecture: Architecture, weight: jax.Array, layout: Layout) -> Any:
    """Return a head of one number as parameters; `weight` is `[width]` float32."""
    _, abstract = abstract_decoder(replace(architecture, scores=True), weight.dtype)
    place = shardings(abstract, layout)["score"].get_value()
    head = abstract["score"].replace(jax.device_put(weight, place))
    return nnx.from_flat_state([(("score",), head)])


def scoring(architecture: Architecture, params: Any, head: Any) -> tuple[Architecture, Any]:
    """Put a head of one number in place of the one that gives logits."""
    return replace(architecture, scores=True), merge_params(_headless(params), head)


def _headless(params: Any) -> Any:
    """Return the parameters without an output head."""
    return nnx.split_state(params, lambda path, _: path[0] == "head", ...)[1]


def _base(origin: Origin, model: Model) -> Architecture:
    return replace(plain(model.architecture), scores=origin.scores)


def loaded(origin: Origin, model: Model, layout: Layout, seed: int) -> Any:
    """Return weights in float32, their adapters merged into them.

    `seed` is of a model's random weights. Raises `BadWeightsError`, `CheckpointError`.
    """
    base = _base(origin, model)
    if origin.path is None and model.folder is None:
        config = StepConfig(layout=layout, dtype=model.dtype)
        return random_state(base, optax.identity(), config, seed).params
    loras = tuple(lora for lora, _ in origin.adapters)
    storage = model.storage if model.storage in ("nf4", "int8") else "f32"
    architecture = adapted(base, loras, storage)
    params = _loaded(origin, architecture, model, layout)
    return merged(params, architecture, layout, model.dtype)


def shaped_adapter(lora: Lora, model: Model, layout: Layout) -> Any:
    """Return the shapes of the first adapter on a model, to load it; raises `NoTargetError`."""
    architecture = adapted(plain(model.architecture), (lora,), model.storage)
    _, abstract = abstract_decoder(architecture, model.dtype)
    return _shaped(split_trainable(architecture, abstract)[0], layout)


def merged(params: Any, architecture: Architecture, layout: Layout, dtype: Any) -> Any:
    """Return the parameters without adapters of the same function, float32; `params` is used up."""
    if not architecture.adapters:
        return params
    graph, _ = abstract_decoder(architecture, dtype)
    _, abstract = abstract_decoder(plain(architecture), dtype)
    make = jax.jit(
        lambda params: nnx.split(nnx.merge(graph, params).merged())[1],
        out_shardings=shardings(abstract, layout),
    )
    return make(params)


def _loaded(origin: Origin, architecture: Architecture, model: Model, layout: Layout) -> Any:
    """Return the base as the architecture keeps it, with the adapters that the origin has."""
    storage = architecture.storage
    # Where an adapter was trained, the score was beside it.
    plain_base = replace(plain(architecture), scores=origin.scores and not origin.adapters)
    if origin.path is None:
        assert model.folder is not None
        base = pretrained.load(model.folder, plain_base, layout, storage, model.dtype)
    else:
        shapes = _shaped(abstract_decoder(plain_base, model.dtype)[1], layout)
        base = pretrained.kept(load_params(origin.path, shapes), layout, storage, model.dtype)
    if architecture.scores:
        base = _headless(base)
    parts = [base]
    for place, (_, path) in enumerate(origin.adapters):
        top = replace(
            architecture,
            adapters=architecture.adapters[: place + 1],
            scores=origin.scores and place == len(origin.adapters) - 1,
        )
        _, abstract = abstract_decoder(top, model.dtype)
        parts.append(load_params(path, _shaped(split_trainable(top, abstract)[0], layout)))
    return merge_params(*parts)


def _begun(params: Any, architecture: Architecture, layout: Layout, dtype: Any, seed: int) -> Any:
    """Add the last adapter of an architecture to the parameters below it."""
    _, abstract = abstract_decoder(architecture, dtype)
    own = split_trainable(architecture, abstract)[0]

    def make(params: Any, seed: Any) -> Any:
        decoder = Decoder(architecture, nnx.Rngs(jax.random.key(seed)), dtype)
        nnx.update(decoder, params)
        decoder.measure()
        return split_trainable(architecture, nnx.state(decoder, nnx.Param))[0]

    added = jax.jit(make, out_shardings=shardings(own, layout))(params, np.uint32(seed % 2**32))
    return merge_params(params, added)


def _shaped(abstract: Any, layout: Layout) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, layout),
    )
