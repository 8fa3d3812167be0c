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

import jax
from typing_extensions import override

from tunelang.compiler.graph import StageNode
from tunelang.compiler.models.architecture import plain
from tunelang.compiler.plan import Plan, StagePlan, missing_inputs
from tunelang.compiler.search.sweep_fusion import Sweep
from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.errors import Interrupted, StageFailed
from tunelang.runtime.loading.initial_weights import Origin, load_merged
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.pipeline.fused_sweep import FusedSweep
from tunelang.runtime.pipeline.run_context import RunContext, RunReporter
from tunelang.runtime.pipeline.training_stage import TrainingRun
from tunelang.runtime.pipeline.weight_sources import MissingInputError
from tunelang.runtime.planning.prepare import Prepared
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.stage_kinds import LoadedWeights, Summary, TaskKind, kind_of
from tunelang.runtime.store.export_manifest import export_folder
from tunelang.runtime.store.locks import Holder
from tunelang.runtime.store.run_store import StageFolder, Store
from tunelang.runtime.training.checkpoints import Checkpoints
from tunelang.runtime.training.metrics import check_trackers
from tunelang.runtime.training.training_loop import DivergedError
from tunelang.runtime.user_functions import load_user_functions


@dataclass(eq=False)
class HardwareMissingError(TuneError):
    """The stage names devices that are not here: `wanted` and `available`, in words."""

    code = "devices-missing"
    wanted: str
    available: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.devices_missing(stage, self.wanted, self.available)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="on")


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
            with _attributing_errors(planned):
                run.stage(planned)
            if stopping():
                raise Interrupted


def refuse_missing_inputs(plan: Plan) -> None:
    """Raise `StageFailed` where a stage that is to run reads one that is left out and not done."""
    for node, missing in missing_inputs(plan):
        raise StageFailed(plan.by_node[node].stage, node) from MissingInputError(missing)


@contextmanager
def _attributing_errors(planned: StagePlan) -> Iterator[None]:
    """Re-raise any error as `StageFailed`, naming the stage."""
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
    is_stopping = False

    def note(*_: int | FrameType | None) -> None:
        nonlocal is_stopping
        if is_stopping:
            raise KeyboardInterrupt
        is_stopping = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: is_stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Run(RunContext):
    """Makes the stages of a plan, one after another."""

    made: set[str] = field(default_factory=set)
    """Nodes that were trained together with one before them."""

    def stage(self, planned: StagePlan) -> None:
        """Make one stage up to date, and the branches that are trained together with it."""
        if planned.state.kind == "up to date":
            self.reporter.finished(planned, self.sources.summary(planned.node), True)
            return
        sweep = self.prepared.fused.get(planned.node)
        with ExitStack() as locks:
            stages: list[tuple[StagePlan, StageFolder]] = []
            for node in (planned.node,) if sweep is None else sweep.nodes:
                branch = self.prepared.plan.by_node[node]
                folder = locks.enter_context(self.lock(branch))
                done = folder.done()
                if done is not None and branch.state.reason not in ("forced", "gone"):
                    # Another run was faster.
                    self.reporter.finished(branch, done["summary"], True)
                else:
                    stages.append((branch, folder))
            starts = {_start(*stage) for stage in stages}
            if sweep is not None and len(stages) == len(sweep.nodes) and len(starts) == 1:
                self.train_fused(stages, sweep)
            else:
                for branch, folder in stages:
                    with _attributing_errors(branch):
                        summary = self.work(branch, folder)
                    self.reporter.finished(branch, summary, False)
            if sweep is not None:
                self.made.update(sweep.nodes)

    def lock(self, planned: StagePlan) -> AbstractContextManager[StageFolder]:
        """Lock a stage's folder; reports where that takes waiting."""

        def on_wait(holder: Holder | None) -> None:
            self.reporter.waiting(planned, holder)

        return self.store.hold(planned.digest, wait=None, on_wait=on_wait)

    def train_fused(self, stages: Sequence[tuple[StagePlan, StageFolder]], sweep: Sweep) -> None:
        """Train the branches of a sweep in one program; one that diverges does not end the others.

        Raises `StageFailed` for it when they are done.
        """
        runs = [self.training_run(*stage) for stage in stages]
        start, *_ = [self.begin(*stage) for stage in stages]
        rates = [run.stage.optimizer.lr for run in runs]
        shared = FusedSweep(rates, sweep.layouts[0], runs[0].checkpoint_schedule(start))
        running = {
            branch: replace(run, sweep=shared, branch=branch).run(start)
            for branch, run in enumerate(runs)
        }
        failed: StageFailed | None = None
        started: set[int] = set()
        stopped = False
        try:
            while running:
                for branch, calls in list(running.items()):
                    planned, folder = stages[branch]
                    if branch in started:
                        self.reporter.turn(planned)
                    started.add(branch)
                    try:
                        with _attributing_errors(planned):
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
                    del running[branch]
        finally:
            for calls in running.values():
                calls.close()
        if stopped:
            raise Interrupted
        if failed is not None:
            raise failed

    def training_run(self, planned: StagePlan, folder: StageFolder) -> TrainingRun:
        """Return a training stage to be run."""
        node = self.prepared.graph.nodes[planned.node]
        devices = self.prepared.devices[planned.node]
        if not devices.here:
            raise HardwareMissingError(str(devices), f"{len(jax.devices())} × {_device_kind()}")
        assert isinstance(node.value, Training)
        stage = load_user_functions(node.value, self.prepared.program.folder)
        return TrainingRun(self, planned, node, stage, folder)

    def begin(self, planned: StagePlan, folder: StageFolder) -> int:
        """Make a stage's folder ready; returns the step that the stage goes on from."""
        value = self.prepared.graph.nodes[planned.node].value
        forced = planned.state.reason == "forced"
        start = _start(planned, folder)
        if start:
            folder.resume(start)
        elif forced or not (_keeps_partial_results(value) and folder.stage()):
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
        if isinstance(node.value, Training):
            start = self.begin(planned, folder)
            summary = _exhaust(self.training_run(planned, folder).run(start))
        else:
            self.begin(planned, folder)
            began = time.time()
            self.reporter.stage(planned, None)
            self.reporter.doing("opening")
            summary = {"steps": 0, "metrics": {}, "evals": {}}
            summary |= kind_of(node.value).run(node.value, _Task(self, planned, node, folder))
            self.tell_bad_rows()
            summary["seconds"] = time.time() - began
        folder.finish(summary)
        return summary


class _Task:
    """Gives a stage that does not train what it needs of the run; see `TaskContext`."""

    def __init__(
        self, run: RunContext, planned: StagePlan, node: StageNode, stage_folder: StageFolder
    ) -> None:
        self._run, self._planned, self._stage_folder = run, planned, stage_folder
        self.resources, self.node = run.resources, node
        self.digest, self.folder = planned.digest, stage_folder.path
        self.stopping = run.stopping
        self.output = None
        if node.value.yields == "files":
            prepared = run.prepared
            self.output = export_folder(prepared.program, prepared.graph, planned.node)

    def seed(self, stated: int | None) -> int:
        """Return the stage's seed: the stated one, or one drawn from the run's."""
        return self._run.seed(stated)

    def origin(self, reference: Reference) -> Origin:
        """Resolve a reference to weights."""
        return self._run.sources.resolve(self.node, reference)

    def load(self, reference: Reference) -> LoadedWeights:
        """Load the weights that a reference stands for."""
        origin = self.origin(reference)
        model = self.resources.model(origin.model)
        architecture = replace(plain(model.architecture), scores=origin.scores)
        model = replace(model, architecture=architecture)
        layout = make_layout(fsdp=len(self.resources.devices))
        params = load_merged(origin, model, layout, self.seed(None) % 2**31)
        return LoadedWeights(origin, model, params, layout)

    def measure(
        self,
        evals: Sequence[Reference],
        weights: LoadedWeights,
        known: Mapping[str, Mapping[str, float]],
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """Run the evals that are not `known`; returns results by digest and by name."""
        return self._run.measure(
            self._planned, evals, weights.model, weights.params, weights.layout, known
        )

    def save(self, params: Params) -> None:
        """Write a checkpoint of what the stage yields."""
        checkpoints = Checkpoints(self._stage_folder)
        try:
            checkpoints.finish(0, params)
        finally:
            checkpoints.close()

    def doing(self, what: str) -> None:
        """Tell the user what is being done."""
        self._run.reporter.doing(what)

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Tell the user how far the stage is."""
        self._run.reporter.step(step, steps, values)


def _start(planned: StagePlan, folder: StageFolder) -> int:
    """Return the step that a stage goes on from."""
    steps = folder.steps()
    return steps[-1] if steps and planned.state.reason != "forced" else 0


def _keeps_partial_results(stage: object) -> bool:
    kind = kind_of(stage)
    return isinstance(kind, TaskKind) and kind.keeps_partial_results


def _exhaust(calls: Generator[None, None, Summary]) -> Summary:
    """Run a generator to its end; returns its value."""
    while True:
        try:
            next(calls)
        except StopIteration as done:
            summary: Summary = done.value
            return summary


def _device_kind() -> str:
    return str(jax.devices()[0].device_kind)
