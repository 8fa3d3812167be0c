"""Runs a plan: each stage that is not up to date, in order, under its lock."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
import optax

from tunelang.compiler.graph import Input, StageNode
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.rules import references_in
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.stages import Policy, Supervised, Training
from tunelang.runtime import train, weights
from tunelang.runtime.bad_rows import BadRows
from tunelang.runtime.checkpoints import Checkpoints, load_params
from tunelang.runtime.evaluate import Evaluation, evaluate, named
from tunelang.runtime.locks import Holder
from tunelang.runtime.loop import Interrupted, Loop, Reporter, Trainer
from tunelang.runtime.permutation import derive
from tunelang.runtime.policy import policy_trainer
from tunelang.runtime.prepare import Prepared
from tunelang.runtime.recorder import Recorder, open_trackers
from tunelang.runtime.rewards import Reward
from tunelang.runtime.sharding import Layout, make_layout, shardings
from tunelang.runtime.store import StageFolder, Store
from tunelang.runtime.supervised import supervised_trainer
from tunelang.runtime.workshop import Model, NotBuiltError, Workshop

Json = dict[str, Any]
Summary = Json
"""What a finished stage says of itself; see `_Stage.summary`."""


class RunReporter(Reporter, Protocol):
    """Who is told how a run goes on."""

    def stage(self, planned: StagePlan, steps: int | None) -> None:
        """A stage begins; later calls are about it."""

    def finished(self, planned: StagePlan, summary: Summary, again: bool) -> None:
        """A stage is done; `again` if it was done before."""

    def selected(self, read: Input, node: str, value: float) -> None:
        """A sweep was decided."""

    def bad_rows(self, rows: BadRows) -> None:
        """Rows were dropped."""

    def waiting(self, planned: StagePlan, holder: Holder | None) -> None:
        """Another process works on the stage."""


class HardwareMissingError(Exception):
    """The spec asks for devices that are not here: `wanted`, and `there`."""

    def __init__(self, wanted: str, there: str) -> None:
        super().__init__(wanted, there)
        self.wanted = wanted
        self.there = there


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


class StageFailed(Exception):
    """Something went wrong in a stage: its `stage`, its `node`; the cause is `__cause__`."""

    def __init__(self, stage: str, node: str) -> None:
        super().__init__(stage, node)
        self.stage = stage
        self.node = node


def execute(prepared: Prepared, store: Store, reporter: RunReporter) -> None:
    """Run what is not up to date. Raises `StageFailed`, and `Interrupted` after saving."""
    compile_cache(store.root / "cache" / "xla")
    run = _Run(prepared, store, reporter)
    with _signals() as stopping:
        run.stopping = stopping
        for planned in prepared.plan.stages:
            if planned.state.kind in ("left out", "same"):
                continue
            try:
                run.stage(planned)
            except Interrupted:
                raise
            except Exception as error:
                raise StageFailed(planned.stage, planned.node) from error
            if stopping():
                raise Interrupted


def compile_cache(path: Path) -> None:
    """Keep compiled programs between processes, unless the user has a place of their own."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM; the second ends the process as usual."""
    asked = False

    def note(*_: int | FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    """One run of a plan."""

    prepared: Prepared
    store: Store
    reporter: RunReporter
    stopping: Callable[[], bool] = lambda: False
    workshop: Workshop = field(init=False)
    _told: int = 0
    """Bad rows that the user knows of."""
    _selected: set[tuple[str, str]] = field(default_factory=set)
    """Winners that the user knows of."""

    def __post_init__(self) -> None:
        self.workshop = Workshop(
            self.prepared.program, self.store.root / "cache", tuple(jax.devices())
        )

    def stage(self, planned: StagePlan) -> None:
        """Make one stage up to date."""
        forced = planned.state.reason == "forced"

        def waits(holder: Holder | None) -> None:
            self.reporter.waiting(planned, holder)

        if planned.state.kind == "up to date":
            self.reporter.finished(planned, self.summary(planned.node), True)
            return
        with self.store.hold(planned.digest, wait=None, on_wait=waits) as folder:
            held = folder.done()
            if held is not None and not forced:  # another run was faster
                self.reporter.finished(planned, held["summary"], True)
                return
            summary = self.work(planned, folder)
        self.reporter.finished(planned, summary, False)

    def summary(self, node: str) -> Summary:
        """Return what a finished stage said of itself; raises `MissingInputError`."""
        held = self.store.folder(self.prepared.plan.by_node[node].digest).done()
        if held is None:
            raise MissingInputError("", node)
        found: Summary = held["summary"]
        return found

    def work(self, planned: StagePlan, folder: StageFolder) -> Summary:
        """Do a stage from its beginning, or from its last checkpoint."""
        node = self.prepared.graph.nodes[planned.node]
        value = node.value
        if not isinstance(value, Training):
            raise NotBuiltError(f"stage {planned.stage}", f"the kind `{planned.kind}`")
        devices = self.prepared.devices[planned.node]
        if not devices.here:
            raise HardwareMissingError(str(devices), f"{len(jax.devices())} × {_kind()}")
        steps = folder.steps()
        start = steps[-1] if steps and planned.state.reason != "forced" else 0
        if start:
            folder.resume(start)
        else:
            folder.begin(
                {
                    "node": planned.node,
                    "kind": planned.kind,
                    "resolved": planned.resolved,
                    "fingerprint": {
                        "digest": planned.digest,
                        "components": planned.fingerprint.components,
                    },
                }
            )
        job = _Job(self, planned, node, value, folder)
        summary = job.run(start)
        folder.finish(summary)
        return summary

    def tell_bad_rows(self) -> None:
        """Say what rows were dropped since the last time."""
        bad = self.workshop.library.bad
        if bad.total > self._told:
            self.reporter.bad_rows(bad)
            self._told = bad.total

    # What a stage reads.

    def source(self, node: StageNode, reference: Reference) -> Source:
        """Return the weights that a reference to a model or a stage stands for, as it is in a node.

        Raises `MissingInputError`, `NoMetricError`, `NoCheckpointError`.
        """
        if reference.noun == "model":
            return Source(reference.name, None, None, {})
        read = next(each for each in node.inputs if each.stage == reference.name)
        name = self.winner(read)
        summary = self.summary(name)
        folder = self.store.folder(self.prepared.plan.by_node[name].digest)
        step = int(summary["steps"]) if reference.step is None else reference.step
        if step not in folder.steps():
            raise NoCheckpointError(reference.name, step, folder.steps())
        evals = summary["evals"] if reference.step is None else {}
        return Source(summary["model"], folder.checkpoints / str(step), name, evals)

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
            value = metric_of(self.workshop, metrics, metric)
            if value is not None and value == value:
                found.append((value, self.prepared.plan.by_node[node].digest, node))
        if not found:
            raise NoMetricError(read.stage, metric, tuple(known))
        sign = -1.0 if read.selection.direction == "best" else 1.0
        value, _, node = min(found, key=lambda each: (sign * each[0], each[1]))
        if (read.stage, node) not in self._selected:
            self._selected.add((read.stage, node))
            self.reporter.selected(read, node, value)
        return node


@dataclass(frozen=True)
class Source:
    """Weights to start from."""

    model: str
    """The declared model."""
    path: Path | None
    """The checkpoint; None for the declared model itself."""
    node: str | None
    evals: Mapping[str, Mapping[str, float]]
    """Digest of an eval -> what it found for these weights."""


def metric_of(workshop: Workshop, metrics: Mapping[str, float], name: str) -> float | None:
    """Return a metric by the name that a spec uses: an eval's bare name is its first metric."""
    if name in metrics:
        return metrics[name]
    declared = workshop.program.declarations.get(name)
    if declared is not None and declared.noun == "eval":
        return metrics.get(f"{name}.{next(iter(declared.value.metrics))}")
    return None


@dataclass
class _Job:
    """One training stage in one of its branches."""

    run_: _Run
    planned: StagePlan
    node: StageNode
    stage: Training
    folder: StageFolder
    evals: dict[str, dict[str, float]] = field(default_factory=dict)
    """What the evals found last, by digest."""

    def run(self, start: int) -> Summary:
        run, workshop = self.run_, self.run_.workshop
        begun = time.time()
        run.reporter.stage(self.planned, None)
        run.reporter.doing("opening")
        source = run.source(self.node, self.stage.from_)
        model = workshop.model(source.model)
        planned = run.prepared.layouts[self.planned.node]
        layout = make_layout(**planned.mesh, devices=workshop.devices)
        seed = self.stage.seed
        if seed is None:
            seed = derive(run.prepared.program.run.seed, "stage")
        if start == 0:
            self.evals = {digest: dict(found) for digest, found in source.evals.items()}
        trainer, close = self.trainer(source, model, layout, seed, start)
        try:
            return self._train(trainer, model, layout, source, start, begun)
        finally:
            close()

    def _train(
        self,
        trainer: Trainer,
        model: Model,
        layout: Layout,
        source: Source,
        start: int,
        begun: float,
    ) -> Summary:
        run = self.run_
        run.tell_bad_rows()
        run.reporter.stage(self.planned, trainer.steps)
        marks = self.marks()
        checkpoints = Checkpoints(self.folder, marks)
        progress: Mapping[str, Any] = {"recorder": {"sums": {}, "counts": {}}, "trainer": {}}
        try:
            if 0 < start < trainer.steps:
                state = trainer.state
                params, moments, progress = checkpoints.restore(
                    start, state.params, state.optimizer
                )
                count = self.updates(start)
                where = state.step.sharding
                step = jax.device_put(np.int32(count), where)
                restored = train.TrainState(params, moments, step, state.scale)
                trainer.resume(restored, progress["trainer"])
            trackers = open_trackers(
                run.prepared.program.run.track, self.folder, self.planned.node, start
            )
            with Recorder(self.folder, self.stage.log_every, trainer.steps, trackers) as recorder:
                recorder.resume(progress["recorder"])
                chip = run.prepared.devices[self.planned.node].chip
                loop = Loop(
                    stage=self.stage,
                    trainer=trainer,
                    recorder=recorder,
                    checkpoints=checkpoints,
                    reporter=run.reporter,
                    evaluate=lambda params, step: self.evaluate(
                        recorder, model, params, layout, step
                    ),
                    stopping=run.stopping,
                    peak=chip.peak * layout.mesh.size,
                    save_at=marks,
                )
                metrics = loop.run(start)
        finally:
            checkpoints.close()
        return {
            "model": source.model,
            "from": source.node,
            "steps": trainer.steps,
            "seconds": time.time() - begun,
            "metrics": metrics,
            "evals": self.evals,
        }

    def updates(self, step: int) -> int:
        """Return the updates of so many steps."""
        if isinstance(self.stage, Policy):
            return step * self.stage.minibatches * self.stage.passes
        return step

    def marks(self) -> frozenset[int]:
        """Return the steps of this stage that the spec refers to: `baseline.step(500)`."""
        found = set()
        for node in self.run_.prepared.graph.nodes.values():
            for _, reference in references_in(node.value, ""):
                step = getattr(reference, "step", None)
                if step is not None and reference.name == self.planned.stage:
                    found.add(int(step))
        return frozenset(found)

    def trainer(
        self, source: Source, model: Model, layout: Layout, seed: int, start: int
    ) -> tuple[Trainer, Callable[[], None]]:
        """Open the stage's data and programs; returns also what to call at the end."""
        run, workshop, stage = self.run_, self.run_.workshop, self.stage
        planned = run.prepared.layouts[self.planned.node]
        scale = stage.optimizer.lr
        # At the last step there is nothing to train: only its evals may be missing.
        path = source.path

        def begin(optimizer: Any, program: train.Program) -> train.TrainState:
            if path is None and model.folder is None:
                return train.init_state(
                    model.architecture, optimizer, program, derive(seed, "weights") % 2**31, scale
                )
            params = self.load(path, model, layout)
            return train.state_of(params, optimizer, program, scale)

        if isinstance(stage, Supervised):
            trainer: Any = supervised_trainer(
                workshop, stage, model, planned, layout, seed, begin, self.marks()
            )
            close: Callable[[], None] = lambda: None  # noqa: E731
        elif isinstance(stage, Policy):
            reward = Reward(stage.reward, workshop.surroundings(stage.rollout.max_tokens))
            close = reward.close
            try:
                trainer = policy_trainer(
                    workshop, stage, model, planned, layout, seed, begin,
                    lambda: self.reference(model, layout, seed), reward, self.marks(),
                )  # fmt: skip
            except BaseException:
                close()
                raise
        else:
            raise NotBuiltError(f"stage {self.planned.stage}", f"the kind `{self.planned.kind}`")
        if start and start == trainer.steps:
            self.folder.forget_evals(start)
            params = self.load(self.folder.checkpoints / str(start), model, layout)
            state = trainer.state
            trainer.state = train.TrainState(params, state.optimizer, state.step, state.scale)
        return trainer, close

    def load(self, path: Path | None, model: Model, layout: Layout) -> Any:
        """Return the parameters of a checkpoint, or without one the model's own, placed."""
        if path is None:
            assert model.folder is not None
            return weights.load(model.folder, model.architecture, layout)
        _, abstract = train.abstract_decoder(model.architecture, model.dtype)
        places = shardings(abstract, layout)
        shaped = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            places,
        )
        return load_params(path, shaped)

    def reference(self, model: Model, layout: Layout, seed: int) -> Any:
        """Return the parameters of the reference model of a policy stage."""
        assert isinstance(self.stage, Policy)
        source = self.run_.source(self.node, self.stage.reference or self.stage.from_)
        if source.path is None and model.folder is None:
            program = train.Program(layout=layout, dtype=model.dtype)
            state = train.init_state(
                model.architecture, optax.identity(), program, derive(seed, "weights") % 2**31
            )
            return state.params
        return self.load(source.path, model, layout)

    def evaluate(
        self, recorder: Recorder, model: Model, params: Any, layout: Layout, step: int
    ) -> dict[str, float]:
        """Run the stage's evals; what is known of the weights that it starts from is not run
        again.
        """
        run = self.run_
        found: dict[str, float] = {}
        for reference in self.stage.evals:
            digest = self.planned.fingerprint.components[f"eval {reference.name}"]
            if step == 0 and digest in self.evals:
                found |= named(reference, Evaluation(self.evals[digest]))
                continue
            run.reporter.doing(f"evaluating {reference.name}")
            evaluation = evaluate(run.workshop, reference.name, model, params, layout)
            self.evals[digest] = dict(evaluation.metrics)
            found |= named(reference, evaluation)
            for sample in evaluation.shown:
                recorder.sample(step, {"eval": reference.name, **sample.row()})
        run.tell_bad_rows()
        return found


def _kind() -> str:
    return str(jax.devices()[0].device_kind)
