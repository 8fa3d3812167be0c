"""Runs a plan: each stage that is not up to date, in order, under its lock."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.compiler.architecture import Architecture, plain
from tunelang.compiler.graph import Input, StageNode
from tunelang.compiler.layout import StageLayout
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.rules import references_in
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.data import Sampled
from tunelang.dsl.vocabulary.stages import (
    Distill,
    Evaluate,
    Export,
    Merge,
    Policy,
    Ppo,
    Sample,
    Supervised,
    Training,
)
from tunelang.dsl.vocabulary.training import Continued, Dare, Ties
from tunelang.runtime import train
from tunelang.runtime.answers import learned
from tunelang.runtime.bad_rows import BadRows
from tunelang.runtime.checkpoints import Checkpoints, load_params
from tunelang.runtime.custom import bound
from tunelang.runtime.distilling import compared, forget_teacher
from tunelang.runtime.evaluate import Evaluation, evaluate, named, sampled_everywhere
from tunelang.runtime.export import export
from tunelang.runtime.fused import BranchTrainer, Fused
from tunelang.runtime.judges import Ask
from tunelang.runtime.locks import Holder
from tunelang.runtime.loop import DivergedError, Interrupted, Loop, Reporter, Saving, Trainer
from tunelang.runtime.manifest import export_folder
from tunelang.runtime.merging import merged
from tunelang.runtime.origins import Origin, Origins, loaded, score_head, scoring, starting
from tunelang.runtime.permutation import derive
from tunelang.runtime.policy import policy_trainer
from tunelang.runtime.prepare import Prepared
from tunelang.runtime.recorder import Recorder, check_trackers, open_trackers
from tunelang.runtime.rewards import Reward
from tunelang.runtime.sample import FILES, sample
from tunelang.runtime.scorers import Scorer
from tunelang.runtime.sharding import Layout, make_layout, shardings
from tunelang.runtime.speaker import Speaker
from tunelang.runtime.store import StageFolder, Store
from tunelang.runtime.supervised import SupervisedTrainer, supervised_trainer
from tunelang.runtime.sweeps import Sweep
from tunelang.runtime.workshop import Model, NotBuiltError, Workshop

Json = dict[str, Any]
Summary = Json
"""What a finished stage says of itself; see `_Stage.summary`."""


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


class HardwareMissingError(Exception):
    """The spec asks for devices that are not here: `wanted`, and `there`."""

    def __init__(self, wanted: str, there: str) -> None:
        super().__init__(wanted, there)
        self.wanted = wanted
        self.there = there


class OtherTokenizerError(Exception):
    """What an `attribute` names, `name`, has another tokenizer than the model that is trained."""

    def __init__(self, attribute: str, name: str) -> None:
        super().__init__(attribute, name)
        self.attribute = attribute
        self.name = name


class NotAlikeError(Exception):
    """Two models cannot be merged: their names, `first` and `other`."""

    def __init__(self, first: str, other: str) -> None:
        super().__init__(first, other)
        self.first = first
        self.other = other


class StageFailed(Exception):
    """Something went wrong in a stage: its `stage`, its `node`; the cause is `__cause__`."""

    def __init__(self, stage: str, node: str) -> None:
        super().__init__(stage, node)
        self.stage = stage
        self.node = node


def execute(prepared: Prepared, store: Store, reporter: RunReporter) -> None:
    """Run what is not up to date.

    Raises `StageFailed`, `MissingExtraError`, and `Interrupted` after saving.
    """
    check_trackers(prepared.program.run.track)
    compile_cache(store.root / "cache" / "xla")
    run = _Run(prepared, store, reporter)
    with _signals() as stopping:
        run.stopping = stopping
        for planned in prepared.plan.stages:
            if planned.state.kind in ("left out", "same") or planned.node in run.made:
                continue
            with _blamed(planned):
                run.stage(planned)
            if stopping():
                raise Interrupted


@contextmanager
def _blamed(planned: StagePlan) -> Iterator[None]:
    """Say of what goes wrong which stage it was."""
    try:
        yield
    except (Interrupted, StageFailed, StopIteration):
        raise
    except Exception as error:
        raise StageFailed(planned.stage, planned.node) from error


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
    origins: Origins = field(init=False)
    made: set[str] = field(default_factory=set)
    """Nodes that were trained together with one before them."""
    _told: int = 0
    """Bad rows that the user knows of."""

    def __post_init__(self) -> None:
        self.workshop = Workshop(
            self.prepared.program, self.store.root / "cache", tuple(jax.devices())
        )
        self.origins = Origins(
            self.prepared.plan,
            self.prepared.graph,
            self.store,
            self.workshop,
            self.reporter.selected,
        )
        self.workshop.speaker = self._judge
        self.workshop.sampled = self._sampled
        self.workshop.learned = self._learned

    def _judge(self, reference: Reference) -> Ask:
        return Speaker.of(self.origins.anywhere(reference), self.workshop).judge

    def _sampled(self, kind: Sampled) -> Path:
        return self.origins.folder(kind.from_).path / FILES[kind.rows]

    def _learned(self, reference: Reference) -> Scorer:
        origin = self.origins.anywhere(reference)
        model = self.workshop.model(origin.model)
        model = replace(model, architecture=replace(plain(model.architecture), scores=True))
        layout = sampled_everywhere(self.workshop, model)
        return learned(self.workshop, model, loaded(origin, model, layout, 0), layout)

    def stage(self, planned: StagePlan) -> None:
        """Make one stage up to date, and the branches that are trained together with it."""
        if planned.state.kind == "up to date":
            self.reporter.finished(planned, self.origins.summary(planned.node), True)
            return
        sweep = self.prepared.fused.get(planned.node)
        with ExitStack() as locks:
            held: list[tuple[StagePlan, StageFolder]] = []
            for node in (planned.node,) if sweep is None else sweep.nodes:
                each = self.prepared.plan.by_node[node]
                folder = locks.enter_context(self.hold(each))
                done = folder.done()
                if done is not None and each.state.reason not in ("forced", "gone"):
                    self.reporter.finished(each, done["summary"], True)  # another run was faster
                else:
                    held.append((each, folder))
            starts = {_start(each, folder) for each, folder in held}
            if sweep is not None and len(held) == len(sweep.nodes) and len(starts) == 1:
                self.together(held, sweep)
            else:
                for each, folder in held:
                    with _blamed(each):
                        summary = self.work(each, folder)
                    self.reporter.finished(each, summary, False)
            if sweep is not None:
                self.made.update(sweep.nodes)

    def hold(self, planned: StagePlan) -> AbstractContextManager[StageFolder]:
        """Lock a stage's folder; says so where that takes waiting."""

        def waits(holder: Holder | None) -> None:
            self.reporter.waiting(planned, holder)

        return self.store.hold(planned.digest, wait=None, on_wait=waits)

    def together(self, held: Sequence[tuple[StagePlan, StageFolder]], sweep: Sweep) -> None:
        """Train branches side by side; one that diverges does not end the others.

        Raises `StageFailed` for it when they are done.
        """
        jobs = [self.job(*each) for each in held]
        start, *_ = [self.begin(*each) for each in held]
        rates = [job.stage.optimizer.lr for job in jobs]
        shared = _Together(rates, sweep.layouts[0], jobs[0].saving(start))
        running = {at: replace(job, beside=shared, at=at).run(start) for at, job in enumerate(jobs)}
        failed: StageFailed | None = None
        begun: set[int] = set()
        stopped = False
        try:
            while running:
                for at, calls in list(running.items()):
                    planned, folder = held[at]
                    if at in begun:
                        self.reporter.turn(planned)
                    begun.add(at)
                    try:
                        with _blamed(planned):
                            next(calls)
                        continue
                    except StopIteration as done:
                        folder.finish(done.value)
                        self.reporter.finished(planned, done.value, False)
                    except Interrupted:
                        stopped = True
                    except StageFailed as error:
                        if not isinstance(error.__cause__, DivergedError):
                            raise
                        failed = failed or error
                    del running[at]
        finally:
            for calls in running.values():
                calls.close()
        if stopped:
            raise Interrupted
        if failed is not None:
            raise failed

    def job(self, planned: StagePlan, folder: StageFolder) -> _Job:
        """Return a training stage to be run."""
        node = self.prepared.graph.nodes[planned.node]
        devices = self.prepared.devices[planned.node]
        if not devices.here:
            raise HardwareMissingError(str(devices), f"{len(jax.devices())} × {_kind()}")
        assert isinstance(node.value, Training)
        return _Job(self, planned, node, bound(node.value, self.prepared.program.folder), folder)

    def begin(self, planned: StagePlan, folder: StageFolder) -> int:
        """Make a stage's folder ready; returns the step that the stage goes on from."""
        value = self.prepared.graph.nodes[planned.node].value
        forced = planned.state.reason == "forced"
        start = _start(planned, folder)
        if start:
            folder.resume(start)
        elif forced or not (isinstance(value, Sample) and folder.stage()):
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
        return start

    def work(self, planned: StagePlan, folder: StageFolder) -> Summary:
        """Do a stage from its beginning, or from its last checkpoint."""
        node = self.prepared.graph.nodes[planned.node]
        value = node.value
        if isinstance(value, Training):
            job = self.job(planned, folder)
            summary = _exhausted(job.run(self.begin(planned, folder)))
        else:
            self.begin(planned, folder)
            begun = time.time()
            self.reporter.stage(planned, None)
            self.reporter.doing("opening")
            summary = {"steps": 0, "metrics": {}, "evals": {}}
            match value:
                case Export():
                    summary |= self.export(planned, node, value)
                case Sample():
                    summary |= self.sample(node, value, folder)
                case Merge():
                    summary |= self.merge(planned, node, value, folder)
                case Evaluate():
                    summary |= self.evaluate(planned, node, value)
                case _:
                    raise NotBuiltError(f"stage {planned.stage}", f"the kind `{planned.kind}`")
            self.tell_bad_rows()
            summary["seconds"] = time.time() - begun
        folder.finish(summary)
        return summary

    def export(self, planned: StagePlan, node: StageNode, kind: Export) -> Summary:
        """Write a model to a folder."""
        self.reporter.doing("writing")
        origin = self.origins.of(node, kind.from_)
        model = self.workshop.model(origin.model)
        folder = export_folder(self.prepared.program, self.prepared.graph, planned.node)
        layout = make_layout(fsdp=len(self.workshop.devices))
        files = export(origin, kind, model, layout, folder, planned.digest)
        return {"model": origin.model, "from": origin.node, "path": str(folder), "files": files}

    def sample(self, node: StageNode, kind: Sample, folder: StageFolder) -> Summary:
        """Sample completions, and write those that are chosen."""
        origin, model, params, layout = self._weights(node, kind.from_)
        seed = self.seed(kind.seed)
        metrics = sample(
            self.workshop, kind, model, params, layout, seed, folder.path,
            self.reporter.step, self.stopping,
        )  # fmt: skip
        return {"model": origin.model, "from": origin.node, "metrics": metrics}

    def merge(
        self, planned: StagePlan, node: StageNode, kind: Merge, folder: StageFolder
    ) -> Summary:
        """Make one model of several, and measure it."""
        origin, model, first, layout = self._weights(node, kind.from_)
        others = [self._weights(node, reference) for reference in kind.others]
        for reference, (_, other, *_rest) in zip(kind.others, others, strict=True):
            if other.architecture != model.architecture:
                raise NotAlikeError(kind.from_.name, reference.name)
        base = None
        if isinstance(kind.method, Ties | Dare):
            start = Reference.fixed(noun="model", name=origin.model)
            base = self._weights(node, kind.base or start)[2]
        self.reporter.doing("merging")
        models = [first, *(params for _, _, params, _ in others)]
        params = merged(kind.method, models, base, self.seed(kind.seed))
        evals, metrics = self.measured(planned, kind.evals, model, params, layout, {})
        checkpoints = Checkpoints(folder)
        try:
            checkpoints.finish(0, params)
        finally:
            checkpoints.close()
        return {"model": origin.model, "from": origin.node, "metrics": metrics, "evals": evals}

    def evaluate(self, planned: StagePlan, node: StageNode, kind: Evaluate) -> Summary:
        """Measure several models."""
        metrics: dict[str, float] = {}
        table: dict[str, dict[str, float]] = {}
        for reference in kind.models:
            origin, model, params, layout = self._weights(node, reference)
            _, found = self.measured(planned, kind.evals, model, params, layout, origin.evals)
            table[reference.name] = found
            metrics |= {f"{reference.name}/{name}": value for name, value in found.items()}
        return {"metrics": metrics, "table": table}

    def seed(self, own: int | None) -> int:
        """Return a stage's seed: its own, or one drawn from the run's."""
        return derive(self.prepared.program.run.seed, "stage") if own is None else own

    def _weights(self, node: StageNode, reference: Reference) -> tuple[Origin, Model, Any, Layout]:
        """Return the weights that a reference stands for, adapters merged into them."""
        origin = self.origins.of(node, reference)
        model = self.workshop.model(origin.model)
        architecture = replace(plain(model.architecture), scores=origin.scores)
        model = replace(model, architecture=architecture)
        layout = make_layout(fsdp=len(self.workshop.devices))
        return origin, model, loaded(origin, model, layout, self.seed(None) % 2**31), layout

    def measured(
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
        found: dict[str, float] = {}
        for reference in evals:
            digest = planned.fingerprint.components[f"eval {reference.name}"]
            if digest not in known:
                self.reporter.doing(f"evaluating {reference.name}")
                evaluation = evaluate(self.workshop, reference.name, model, params, layout)
                digests[digest] = dict(evaluation.metrics)
            else:
                digests[digest] = dict(known[digest])
            found |= named(reference, Evaluation(digests[digest]))
        return digests, found

    def tell_bad_rows(self) -> None:
        """Say what rows were dropped since the last time."""
        bad = self.workshop.library.bad
        if bad.total > self._told:
            self.reporter.bad_rows(bad)
            self._told = bad.total


def _start(planned: StagePlan, folder: StageFolder) -> int:
    """Return the step that a stage goes on from."""
    steps = folder.steps()
    return steps[-1] if steps and planned.state.reason != "forced" else 0


def _exhausted(calls: Generator[None, None, Summary]) -> Summary:
    while True:
        try:
            next(calls)
        except StopIteration as done:
            summary: Summary = done.value
            return summary


@dataclass
class _Together:
    """What branches share that are trained side by side."""

    rates: Sequence[float]
    """The learning rate of each."""
    layout: StageLayout
    saving: Saving
    opened: tuple[Fused, Model] | None = None
    """The first of them opens it."""


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
    beside: _Together | None = None
    """With which other branches it is trained, and its place among them."""
    at: int = 0

    @property
    def share(self) -> int:
        """How many branches use the devices."""
        return 1 if self.beside is None else len(self.beside.rates)

    @property
    def planned_layout(self) -> StageLayout:
        """Where and in which parts it runs."""
        if self.beside is not None:
            return self.beside.layout
        return self.run_.prepared.layouts[self.planned.node]

    def saving(self, start: int) -> Saving:
        """Return when it is to be saved."""
        return Saving(start, self.stage.checkpoint_every, self.marks(), self.run_.stopping)

    def run(self, start: int) -> Generator[None, None, Summary]:
        """Train, and wait before each call to be asked for it."""
        run, workshop = self.run_, self.run_.workshop
        begun = time.time()
        run.reporter.stage(self.planned, None)
        run.reporter.doing("opening")
        source = run.origins.of(self.node, self.stage.from_)
        model = workshop.model(source.model)
        layout = make_layout(**self.planned_layout.mesh, devices=workshop.devices)
        seed = run.seed(self.stage.seed)
        if start == 0:
            self.evals = {digest: dict(found) for digest, found in source.evals.items()}
        trainer, model, close = self.trainer(source, model, layout, seed, start)
        try:
            return (yield from self._train(trainer, model, layout, source, start, begun))
        finally:
            close()

    def _train(
        self,
        trainer: Trainer,
        model: Model,
        layout: Layout,
        source: Origin,
        start: int,
        begun: float,
    ) -> Generator[None, None, Summary]:
        run = self.run_
        run.tell_bad_rows()
        run.reporter.stage(self.planned, trainer.steps)
        checkpoints = Checkpoints(self.folder, self.marks())
        progress: Mapping[str, Any] = {"recorder": {"sums": {}, "counts": {}}, "trainer": {}}
        try:
            if 0 < start < trainer.steps:
                state = trainer.state
                params, moments, progress = checkpoints.restore(start, state.params, state.moments)
                restored = state.restored(params, moments, self.updates(start))
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
                    saving=self.saving(start) if self.beside is None else self.beside.saving,
                    peak=chip.peak * layout.mesh.size / self.share,
                )
                metrics = yield from loop.run(start)
                if isinstance(self.stage, Distill):
                    forget_teacher(self.folder.path)
                    metrics |= self._compared(
                        self.stage, recorder, model, trainer.state, layout, trainer.steps
                    )
        finally:
            checkpoints.close()
        return {
            "model": source.model,
            "from": source.node,
            "steps": trainer.steps,
            "seconds": (time.time() - begun) / self.share,
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
        self, source: Origin, model: Model, layout: Layout, seed: int, start: int
    ) -> tuple[Trainer, Model, Callable[[], None]]:
        """Open the stage's data and programs; returns also the model with the adapter that is
        trained, and what to call at the end.
        """
        close: Callable[[], None] = lambda: None  # noqa: E731
        if self.beside is None:
            trainer, model, close = self.opened(source, model, layout, seed)
        else:
            if self.beside.opened is None:
                first, model, _ = self.opened(source, model, layout, seed)
                assert isinstance(first, SupervisedTrainer)
                self.beside.opened = Fused(first, self.beside.rates), model
            fused, model = self.beside.opened
            trainer = BranchTrainer(fused, self.at)
        if start and start == trainer.steps:
            self.folder.forget_evals(start)
            state = trainer.state
            path = self.folder.checkpoints / str(start)
            trainer.state = replace(state, params=load_params(path, state.yielded))
        return trainer, model, close

    def opened(
        self, source: Origin, model: Model, layout: Layout, seed: int
    ) -> tuple[Trainer, Model, Callable[[], None]]:
        """See `trainer`: from the beginning, and of one branch by itself."""
        run, workshop, stage = self.run_, self.run_.workshop, self.stage
        planned = self.planned_layout
        scale = stage.optimizer.lr
        weights = derive(seed, "weights") % 2**31
        architecture, params = starting(
            source, stage.adapter, model, layout, weights, stage.yields == "scores"
        )
        model = replace(model, architecture=architecture)

        def begin(
            optimizer: Any,
            program: train.Program,
            extra: Any = nnx.State({}),  # noqa: B008
        ) -> train.TrainState:
            extra = jax.device_put(extra, shardings(extra, layout))
            whole = train.whole(params, extra)
            return train.state_of(architecture, whole, optimizer, program, scale)

        def reference() -> tuple[Architecture, Any]:
            if isinstance(stage, Distill):
                teacher, weights_of = self._teacher(stage, layout)
                if teacher.renderer.tokenizer.digest != model.renderer.tokenizer.digest:
                    raise OtherTokenizerError("teacher", stage.teacher.name)
                return teacher.architecture, weights_of
            stated = getattr(stage, "reference", None)
            if stated is not None:
                origin = run.origins.of(self.node, stated)
                return plain(model.architecture), loaded(origin, model, layout, weights)
            return beginning()

        def beginning() -> tuple[Architecture, Any]:
            # What an adapter leaves frozen and its beginning are the model that it starts from.
            own, frozen = train.divided(architecture, params)
            return architecture, train.whole(jax.tree.map(jnp.copy, own), frozen)

        def critic() -> tuple[Architecture, Any]:
            assert isinstance(stage, Ppo)
            if stage.critic.trunk == "shared":
                own: tuple[Architecture, Any] = architecture, nnx.State({})
            elif stage.value_model is None:
                own = beginning()
            else:
                origin = run.origins.of(self.node, stage.value_model)
                other = workshop.model(origin.model)
                if other.renderer.tokenizer.digest != model.renderer.tokenizer.digest:
                    raise OtherTokenizerError("value_model", stage.value_model.name)
                continued = isinstance(stage.adapter, Continued)
                adapter = source.adapters[-1][0] if continued else stage.adapter
                own = starting(origin, adapter, other, layout, weights)
            if own[0].scores:
                return own
            # Zeros: what is not learned yet is no opinion.
            return scoring(*own, score_head(own[0], jnp.zeros(own[0].width), layout))

        if isinstance(stage, Supervised):
            trainer: Any = supervised_trainer(
                workshop, stage, model, planned, layout, seed, begin, reference, self.marks(),
                self.folder.path,
            )  # fmt: skip
            close: Callable[[], None] = lambda: None  # noqa: E731
        elif isinstance(stage, Policy):
            reward = Reward(stage.reward, workshop.surroundings(stage.rollout.max_tokens))
            close = reward.close
            try:
                trainer = policy_trainer(
                    workshop, stage, model, planned, layout, seed, begin,
                    reference, critic, reward, self.marks(),
                )  # fmt: skip
            except BaseException:
                close()
                raise
        else:
            raise NotBuiltError(f"stage {self.planned.stage}", f"the kind `{self.planned.kind}`")
        return trainer, model, close

    def _teacher(self, stage: Distill, layout: Layout) -> tuple[Model, Any]:
        run = self.run_
        origin = run.origins.of(self.node, stage.teacher)
        model = run.workshop.model(origin.model)
        model = replace(model, architecture=plain(model.architecture))
        weights = derive(run.seed(stage.seed), "weights") % 2**31
        return model, loaded(origin, model, layout, weights)

    def _compared(
        self,
        stage: Distill,
        recorder: Recorder,
        model: Model,
        state: train.TrainState,
        layout: Layout,
        step: int,
    ) -> dict[str, float]:
        """Measure the teacher as the student was, and say how the two compare."""
        run = self.run_
        run.reporter.doing("comparing with the teacher")
        teacher, params = self._teacher(stage, layout)
        _, known = run.measured(self.planned, stage.evals, teacher, params, layout, {})
        student = model, state.weights
        found = compared(run.workshop, student, (teacher, params), layout, recorder.last, known)
        found |= {f"teacher/{name}": value for name, value in known.items()}
        recorder.evaluated(step, found)
        return found

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
            for shown in evaluation.shown:
                recorder.sample(step, {"eval": reference.name, **shown.row()})
        run.tell_bad_rows()
        return found


def _kind() -> str:
    return str(jax.devices()[0].device_kind)
