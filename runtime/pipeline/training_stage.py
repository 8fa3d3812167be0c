"""Runs a training stage: opens its weights, data and programs, and drives the training loop."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tunelang.compiler.graph import StageNode
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.references import references_in
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.evals.run_evals import EvalResult, evaluate, qualified_metrics
from tunelang.runtime.loading.initial_weights import Origin, initial_params
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.pipeline.fused_sweep import BranchTrainer, FusedSweep, FusedTrainer
from tunelang.runtime.pipeline.run_context import RunContext
from tunelang.runtime.sharding import Layout, make_layout
from tunelang.runtime.stages.stage_kinds import Summary, TrainingInputs, TrainingKind, kind_of
from tunelang.runtime.stages.supervised import SupervisedTrainer
from tunelang.runtime.store.run_store import StageFolder
from tunelang.runtime.training.checkpoints import Checkpoints, load_params
from tunelang.runtime.training.metrics import Recorder, open_trackers
from tunelang.runtime.training.training_loop import CheckpointSchedule, Loop, Trainer


@dataclass
class TrainingRun:
    """One training stage in one of its branches."""

    context: RunContext
    planned: StagePlan
    node: StageNode
    stage: Training
    folder: StageFolder
    evals: dict[str, dict[str, float]] = field(default_factory=dict)
    """The last results of the evals, by digest."""
    sweep: FusedSweep | None = None
    """The branches that are trained in the same program; `branch` is the index among them."""
    branch: int = 0

    @property
    def branches(self) -> int:
        """How many branches share the devices."""
        return 1 if self.sweep is None else len(self.sweep.rates)

    @property
    def layout(self) -> StageLayout:
        """The planned layout."""
        if self.sweep is not None:
            return self.sweep.layout
        return self.context.prepared.layouts[self.planned.node]

    @property
    def kind(self) -> TrainingKind[Any]:
        """The kind of the stage."""
        kind: TrainingKind[Any] = kind_of(self.stage)
        return kind

    def checkpoint_schedule(self, start: int) -> CheckpointSchedule:
        """Return when to save, from step `start` on."""
        return CheckpointSchedule(
            start, self.stage.checkpoint_every, self.marks(), self.context.stopping
        )

    def marks(self) -> frozenset[int]:
        """Return the steps of this stage that the spec refers to: `baseline.step(500)`."""
        steps = set()
        for node in self.context.prepared.graph.nodes.values():
            for _, reference in references_in(node.value, ""):
                step = getattr(reference, "step", None)
                if step is not None and reference.name == self.planned.stage:
                    steps.add(int(step))
        return frozenset(steps)

    def run(self, start: int) -> Generator[None, None, Summary]:
        """Train from step `start`, yielding before each call of the program."""
        context, began = self.context, time.time()
        context.reporter.stage(self.planned, None)
        context.reporter.doing("opening")
        source = context.sources.resolve(self.node, self.stage.from_)
        if start == 0:
            self.evals = {digest: dict(values) for digest, values in source.evals.items()}
        layout = make_layout(**self.layout.mesh, devices=context.resources.devices)
        trainer, inputs = self._open(source, layout, start)
        try:
            context.tell_bad_rows()
            context.reporter.stage(self.planned, trainer.steps)
            metrics = yield from self._train(trainer, inputs, start)
        finally:
            trainer.close()
        return {
            "model": source.model,
            "from": source.node,
            "steps": trainer.steps,
            "seconds": (time.time() - began) / self.branches,
            "metrics": metrics,
            "evals": self.evals,
        }

    def _inputs(self, source: Origin, layout: Layout) -> TrainingInputs:
        """Load what the stage starts from."""
        context, stage = self.context, self.stage
        seed = context.seed(stage.seed)
        model = context.resources.model(source.model)
        architecture, params = initial_params(
            source, stage.adapter, model, layout, derive(seed, "weights") % 2**31,
            stage.yields == "scores",
        )  # fmt: skip
        return TrainingInputs(
            resources=context.resources,
            model=replace(model, architecture=architecture),
            params=params,
            source=source,
            planned=self.layout,
            layout=layout,
            seed=seed,
            marks=self.marks(),
            folder=self.folder.path,
            origin=partial(context.sources.resolve, self.node),
        )

    def _open(self, source: Origin, layout: Layout, start: int) -> tuple[Trainer, TrainingInputs]:
        """Open the stage's data and programs; of a fused sweep the first branch opens them."""
        if self.sweep is None:
            inputs = self._inputs(source, layout)
            trainer: Trainer = self.kind.open(self.stage, inputs)
        else:
            if self.sweep.opened is None:
                inputs = self._inputs(source, layout)
                first = self.kind.open(self.stage, inputs)
                assert isinstance(first, SupervisedTrainer)
                self.sweep.opened = FusedTrainer(first, self.sweep.rates), inputs
            fused, inputs = self.sweep.opened
            trainer = BranchTrainer(fused, self.branch)
        if start and start == trainer.steps:
            # Trained to the end, and interrupted before it was entered as done.
            self.folder.forget_evals(start)
            path = self.folder.checkpoints / str(start)
            params = load_params(path, trainer.state.trained_params)
            trainer.state = replace(trainer.state, params=params)
        return trainer, inputs

    def _train(
        self, trainer: Trainer, inputs: TrainingInputs, start: int
    ) -> Generator[None, None, dict[str, float]]:
        """Drive the loop; returns the last value of every metric."""
        context, model, layout = self.context, inputs.model, inputs.layout
        checkpoints = Checkpoints(self.folder, self.marks())
        progress: Mapping[str, Any] = {"recorder": {"sums": {}, "counts": {}}, "trainer": {}}
        try:
            if 0 < start < trainer.steps:
                state = trainer.state
                params, moments, progress = checkpoints.restore(start, state.params, state.moments)
                restored = state.restored(params, moments, trainer.updates(start))
                trainer.resume(restored, progress["trainer"])
            trackers = open_trackers(
                context.prepared.program.run.track, self.folder, self.planned.node, start
            )
            with Recorder(self.folder, self.stage.log_every, trainer.steps, trackers) as recorder:
                recorder.resume(progress["recorder"])
                chip = context.prepared.devices[self.planned.node].chip
                schedule = None if self.sweep is None else self.sweep.schedule
                loop = Loop(
                    stage=self.stage,
                    trainer=trainer,
                    recorder=recorder,
                    checkpoints=checkpoints,
                    reporter=context.reporter,
                    evaluate=lambda params, step: self._evaluate(
                        recorder, model, params, layout, step
                    ),
                    schedule=schedule or self.checkpoint_schedule(start),
                    peak=chip.peak * layout.mesh.size / self.branches,
                )
                metrics = yield from loop.run(start)
                return metrics | self._finish(inputs, trainer, recorder)
        finally:
            checkpoints.close()

    def _finish(
        self, inputs: TrainingInputs, trainer: Trainer, recorder: Recorder
    ) -> dict[str, float]:
        """Record the metrics that are known at the end only."""
        context = self.context

        def measure(model: Model, params: Params) -> Mapping[str, float]:
            return context.measure(
                self.planned, self.stage.evals, model, params, inputs.layout, {}
            )[1]

        params = trainer.state.decoder_params
        metrics = self.kind.finish(self.stage, inputs, params, recorder.last, measure)
        if metrics:
            recorder.evaluated(trainer.steps, metrics)
        return metrics

    def _evaluate(
        self, recorder: Recorder, model: Model, params: Params, layout: Layout, step: int
    ) -> dict[str, float]:
        """Run the stage's evals; at step 0, results known of the initial weights are taken."""
        context = self.context
        metrics: dict[str, float] = {}
        for reference in self.stage.evals:
            digest = self.planned.fingerprint.components[f"eval {reference.name}"]
            if step == 0 and digest in self.evals:
                metrics |= qualified_metrics(reference, EvalResult(self.evals[digest]))
                continue
            context.reporter.doing(f"evaluating {reference.name}")
            evaluation = evaluate(context.resources, reference.name, model, params, layout)
            self.evals[digest] = dict(evaluation.metrics)
            metrics |= qualified_metrics(reference, evaluation)
            for record in evaluation.shown:
                recorder.sample(step, {"eval": reference.name, **record.row()})
        context.tell_bad_rows()
        return metrics
