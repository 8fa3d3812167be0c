"""Runs a plan: each stage that is not up to date, in order, under its lock."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from typing_extensions import override

from tunelang.compiler.graph import StageNode
from tunelang.compiler.layout.sweep_fusion import Sweep
from tunelang.compiler.models.architecture import plain
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC, FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.training import Dare, Ties
from tunelang.dsl.vocabulary.utility_stages import Evaluate, Export, Merge, Sample
from tunelang.runtime.errors import Interrupted, NotBuiltError, StageFailed
from tunelang.runtime.loading.initial_weights import Origin, loaded
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.weight_merging import merged
from tunelang.runtime.pipeline.run_context import RunReporter, Session, Summary
from tunelang.runtime.pipeline.training_stage import Job, Together
from tunelang.runtime.planning.prepare import Prepared
from tunelang.runtime.sharding import Layout, make_layout
from tunelang.runtime.stages.export import export
from tunelang.runtime.stages.sample import sample
from tunelang.runtime.store.export_manifest import export_folder
from tunelang.runtime.store.locks import Holder
from tunelang.runtime.store.run_store import StageFolder, Store
from tunelang.runtime.training.checkpoints import Checkpoints
from tunelang.runtime.training.metrics import check_trackers
from tunelang.runtime.training.training_loop import DivergedError
from tunelang.runtime.user_functions import bound


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


@dataclass(eq=False)
class NotAlikeError(TuneError):
    """Two models cannot be merged: their names, `first` and `other`."""

    code = "not-alike"
    exit_code = WRONG_SPEC
    first: str
    other: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.not_alike(self.first, self.other)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="others")


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
class _Run(Session):
    """Makes the stages of a plan, one after another."""

    made: set[str] = field(default_factory=set)
    """Nodes that were trained together with one before them."""

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
        shared = Together(rates, sweep.layouts[0], jobs[0].saving(start))
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

    def job(self, planned: StagePlan, folder: StageFolder) -> Job:
        """Return a training stage to be run."""
        node = self.prepared.graph.nodes[planned.node]
        devices = self.prepared.devices[planned.node]
        if not devices.here:
            raise HardwareMissingError(str(devices), f"{len(jax.devices())} × {_kind()}")
        assert isinstance(node.value, Training)
        return Job(self, planned, node, bound(node.value, self.prepared.program.folder), folder)

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
                    raise NotBuiltError(planned.stage, f"the kind `{planned.kind}`")
            self.tell_bad_rows()
            summary["seconds"] = time.time() - begun
        folder.finish(summary)
        return summary

    def export(self, planned: StagePlan, node: StageNode, kind: Export) -> Summary:
        """Write a model to a folder."""
        self.reporter.doing("writing")
        origin = self.origins.of(node, kind.from_)
        model = self.resources.model(origin.model)
        folder = export_folder(self.prepared.program, self.prepared.graph, planned.node)
        layout = make_layout(fsdp=len(self.resources.devices))
        files = export(origin, kind, model, layout, folder, planned.digest)
        return {"model": origin.model, "from": origin.node, "path": str(folder), "files": files}

    def sample(self, node: StageNode, kind: Sample, folder: StageFolder) -> Summary:
        """Sample completions, and write those that are chosen."""
        origin, model, params, layout = self._weights(node, kind.from_)
        seed = self.seed(kind.seed)
        metrics = sample(
            self.resources, kind, model, params, layout, seed, folder.path,
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
            start = Reference.unvalidated(noun="model", name=origin.model)
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

    def _weights(self, node: StageNode, reference: Reference) -> tuple[Origin, Model, Any, Layout]:
        """Return the weights that a reference stands for, adapters merged into them."""
        origin = self.origins.of(node, reference)
        model = self.resources.model(origin.model)
        architecture = replace(plain(model.architecture), scores=origin.scores)
        model = replace(model, architecture=architecture)
        layout = make_layout(fsdp=len(self.resources.devices))
        return origin, model, loaded(origin, model, layout, self.seed(None) % 2**31), layout


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


def _kind() -> str:
    return str(jax.devices()[0].device_kind)
