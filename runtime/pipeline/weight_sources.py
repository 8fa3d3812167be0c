"""Resolves references to models and stages to weights, in a plan and its store.

A chain of stages that train adapters is followed down to the one that trained all weights, or to
the declared model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from tunelang.compiler.graph import Input, StageGraph, StageNode, models_of, named
from tunelang.compiler.plan import Plan
from tunelang.dsl.diagnostics.tune_error import FailureText, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.data import Sampled
from tunelang.dsl.vocabulary.training import Continued
from tunelang.runtime.loading.initial_weights import Origin
from tunelang.runtime.stages.sample import FILES
from tunelang.runtime.store.run_store import Store


@dataclass(eq=False)
class MissingInputError(TuneError):
    """A stage reads one that is not done and that this run leaves out: `missing`."""

    code = "missing-input"
    missing: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.missing_input(self.missing, stage)


@dataclass(eq=False)
class NoMetricError(TuneError):
    """No branch of a sweep has the metric that decides it; `known` are those that there are."""

    code = "no-metric"
    stage: str
    metric: str
    known: tuple[str, ...]

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_metric(self.stage, self.metric, self.known)


@dataclass(eq=False)
class NoCheckpointError(TuneError):
    """A stage starts from a step whose checkpoint another stage did not keep."""

    code = "no-checkpoint"
    stage: str
    step: int

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_checkpoint(self.stage, self.step)


@dataclass
class WeightSources:
    """Finds what references to models and stages stand for, in one plan and its store."""

    plan: Plan
    graph: StageGraph
    store: Store
    program: Program
    selected: Callable[[Input, str, float], None] = lambda *_: None
    """Told of each sweep that is decided, once: what reads it, the winner, its metric."""
    _told: set[tuple[str, str]] = field(default_factory=set)

    def summary(self, node: str) -> dict[str, Any]:
        """Return what a finished stage said of itself; raises `MissingInputError`."""
        done = self.store.folder(self.plan.by_node[node].digest).done()
        if done is None:
            raise MissingInputError(node)
        summary: dict[str, Any] = done["summary"]
        return summary

    def resolve(self, node: StageNode, reference: Reference) -> Origin:
        """Return the weights that a reference to a model or a stage stands for, as it is in a node.

        Raises `MissingInputError`, `NoMetricError`, `NoCheckpointError`.
        """
        if reference.noun == "model":
            return Origin(reference.name, None)
        return self._yielded(
            next(read for read in node.inputs if read.stage == reference.name), reference
        )

    def _yielded(self, read: Input, reference: Reference) -> Origin:
        name = self.winner(read)
        summary = self.summary(name)
        step = int(summary["steps"]) if reference.step is None else reference.step
        origin = self.at_step(name, step)
        return origin if reference.step is not None else replace(origin, evals=summary["evals"])

    def at_step(self, name: str, step: int) -> Origin:
        """Return the weights of a node after a step, which need not be its last.

        Raises what `resolve` raises.
        """
        node = self.graph.nodes[name]
        folder = self.store.folder(self.plan.by_node[name].digest)
        if step not in folder.steps():
            raise NoCheckpointError(node.stage, step)
        path = folder.checkpoints / str(step)
        value: Any = node.value
        scores = value.yields == "scores"
        if getattr(value, "adapter", None) is None:
            done = folder.done()
            model = done["summary"]["model"] if done else models_of(self.graph, name)[0]
            return Origin(model, path, scores=scores, node=name)
        below = self.resolve(node, value.from_)
        adapters = below.adapters
        if isinstance(value.adapter, Continued):
            adapters, lora = adapters[:-1], adapters[-1][0]
        else:
            lora = value.adapter
        return Origin(below.model, below.path, (*adapters, (lora, path)), scores, name)

    def latest(self, stage: str) -> Origin:
        """Return what a stage yielded, or, of one that is not done, its last checkpoint.

        Of a sweep the first branch that is done is taken, unless `stage` names one. Raises
        `UnknownStage`, `MissingInputError` and what `resolve` raises.
        """
        newest: tuple[str, int] | None = None
        for node in named(self.graph, stage):
            folder = self.store.folder(self.plan.by_node[node].digest)
            done, steps = folder.done(), folder.steps()
            if steps and (done is not None or newest is None):
                newest = node, steps[-1]
                if done is not None:
                    break
        if newest is None:
            raise MissingInputError(stage)
        return self.at_step(*newest)

    def weights(self, reference: Reference) -> Origin:
        """Return the weights that a reward means by a model or a stage.

        Of a sweep that keeps all its branches, they are the first one's. Raises what `resolve`
        raises.
        """
        if reference.noun == "model":
            return Origin(reference.name, None)
        return self._yielded(self._input(reference), reference)

    def sampled_rows(self, kind: Sampled) -> Path:
        """Return the file that a finished `sample` stage wrote.

        Raises `MissingInputError` and `NoMetricError`.
        """
        name = self.winner(self._input(kind.from_))
        folder = self.store.folder(self.plan.by_node[name].digest)
        if folder.done() is None:
            raise MissingInputError(name)
        return folder.path / FILES[kind.rows]

    def _input(self, reference: Reference) -> Input:
        """Return how a stage is read by what is no stage itself."""
        name = reference.name
        return Input(name, (), self.graph.by_stage[name], self.graph.selections.get(name))

    def winner(self, read: Input) -> str:
        """Return the node that an input stands for; raises `NoMetricError`."""
        if read.selection is None:
            return read.nodes[0]
        metric = read.selection.metric
        candidates: list[tuple[float, str, str]] = []
        known: dict[str, None] = {}
        for node in read.nodes:
            metrics = self.summary(node)["metrics"]
            known.update(dict.fromkeys(metrics))
            value = metric_of(self.program, metrics, metric)
            if value is not None and value == value:
                candidates.append((value, self.plan.by_node[node].digest, node))
        if not candidates:
            raise NoMetricError(read.stage, metric, tuple(known))
        sign = -1.0 if read.selection.direction == "best" else 1.0
        value, _, node = min(candidates, key=lambda entry: (sign * entry[0], entry[1]))
        if (read.stage, node) not in self._told:
            self._told.add((read.stage, node))
            self.selected(read, node, value)
        return node


def metric_of(program: Program, metrics: Mapping[str, float], name: str) -> float | None:
    """Return a metric by the name that a spec uses: an eval's bare name is its first metric."""
    if name in metrics:
        return metrics[name]
    declared = program.declarations.get(name)
    if declared is not None and declared.noun == "eval":
        return metrics.get(f"{name}.{next(iter(declared.value.metrics))}")
    return None
