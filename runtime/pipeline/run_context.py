"""A run of a plan: what its stages share, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from tunelang.compiler.graph import Input
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.vocabulary.base import Reference
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.data.row_errors import BadRows
from tunelang.runtime.evals.run_evals import EvalResult, evaluate, qualified_metrics
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.pipeline.weight_sources import WeightSources
from tunelang.runtime.planning.prepare import Prepared
from tunelang.runtime.sharding import Layout
from tunelang.runtime.stages.stage_kinds import Summary
from tunelang.runtime.store.locks import Holder
from tunelang.runtime.store.run_store import Store
from tunelang.runtime.training.training_loop import Reporter


class RunReporter(Reporter, Protocol):
    """Who is told how a run goes on."""

    def stage(self, planned: StagePlan, steps: int | None) -> None:
        """A stage begins; later calls are about it."""

    def turn(self, planned: StagePlan) -> None:
        """Later calls are about this stage again, which began before."""

    def finished(self, planned: StagePlan, summary: Summary, again: bool) -> None:
        """A stage is done; `again` if it was done before."""

    def selected(self, read: Input, node: str, value: float) -> None:
        """A sweep was decided."""

    def bad_rows(self, rows: BadRows) -> None:
        """Rows were dropped."""

    def waiting(self, planned: StagePlan, holder: Holder | None) -> None:
        """Another process works on the stage."""


@dataclass
class RunContext:
    """One run of a plan, and what its stages share."""

    prepared: Prepared
    store: Store
    reporter: RunReporter
    stopping: Callable[[], bool] = lambda: False
    resources: Resources = field(init=False)
    sources: WeightSources = field(init=False)
    _told: int = 0
    """Bad rows that the user knows of."""

    def __post_init__(self) -> None:
        program = self.prepared.program
        self.sources = WeightSources(
            self.prepared.plan, self.prepared.graph, self.store, program, self.reporter.selected
        )
        devices = tuple(jax.devices())
        self.resources = Resources(program, self.store.root / "cache", devices, self.sources)

    def seed(self, own: int | None) -> int:
        """Return a stage's seed: its own, or one drawn from the run's."""
        return derive(self.prepared.program.run.seed, "stage") if own is None else own

    def measure(
        self,
        planned: StagePlan,
        evals: Sequence[Reference],
        model: Model,
        params: Any,
        layout: Layout,
        known: Mapping[str, Mapping[str, float]],
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Run evals that are not known; returns what each found by its digest, and by its name."""
        digests: dict[str, dict[str, float]] = {}
        metrics: dict[str, float] = {}
        for reference in evals:
            digest = planned.fingerprint.components[f"eval {reference.name}"]
            if digest not in known:
                self.reporter.doing(f"evaluating {reference.name}")
                evaluation = evaluate(self.resources, reference.name, model, params, layout)
                digests[digest] = dict(evaluation.metrics)
            else:
                digests[digest] = dict(known[digest])
            metrics |= qualified_metrics(reference, EvalResult(digests[digest]))
        return digests, metrics

    def tell_bad_rows(self) -> None:
        """Say what rows were dropped since the last time."""
        bad = self.resources.library.bad
        if bad.total > self._told:
            self.reporter.bad_rows(bad)
            self._told = bad.total
