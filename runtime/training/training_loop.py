"""The loop that every training stage shares: steps, lines, evaluations, checkpoints, interruption.

A stage makes its steps in calls of a compiled program, each of one or more steps. Where calls begin
and end follows from the spec alone, so that a resumed run makes the very calls that the
uninterrupted one makes. Checkpoints are written between calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.errors import Interrupted
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.training.checkpoints import Checkpoints, Progress
from tunelang.runtime.training.metrics import Recorder, SampleRecord
from tunelang.runtime.training.train_state import TrainState

CHECKPOINT_SECONDS = 300.0
"""Time between checkpoints where the spec states no steps."""

Row = dict[str, float]


@dataclass(eq=False)
class DivergedError(TuneError):
    """A metric without which training is pointless is not a finite number at a step."""

    code = "diverged"
    metric: str
    step: int

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.diverged(self.metric, self.step)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="optimizer")


@runtime_checkable
class Trainer(Protocol):
    """A training algorithm as the shared loop drives it."""

    steps: int
    """Steps of the stage."""
    state: TrainState

    @property
    def overlaps(self) -> bool:
        """Whether a call may start before the metrics of the last one have arrived."""

    def call_end(self, step: int) -> int:
        """Return the step at which the compiled call that starts at `step` ends."""

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """Make the steps from `step` to `until`; returns how to wait for their metrics.

        Rows hold the `tokens` that the step worked on, and its `flops` over all devices; both
        become rates.
        """

    def samples(self) -> Sequence[SampleRecord]:
        """Return completions of the last step, to read."""

    def progress(self) -> Progress:
        """Return the facts that resuming needs besides the state."""

    def resume(self, state: TrainState, progress: Progress) -> None:
        """Go on from a checkpoint."""

    def updates(self, step: int) -> int:
        """Return the updates that the first `step` steps make."""

    def close(self) -> None:
        """Release what the trainer holds besides memory, such as processes."""


@runtime_checkable
class Reporter(Protocol):
    """Shows a person how a stage goes on."""

    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Report that some steps are made; `values` are those of the last line."""

    def doing(self, activity: str) -> None:
        """Report that something else than a step begins: `evaluating accuracy`."""

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Report the results of evals."""


@dataclass
class CheckpointSchedule:
    """Decides at which steps to checkpoint and when to stop.

    Branches of a fused sweep share one, so that all get the same answer at a step.
    """

    start: int
    every: int | None
    """Steps between checkpoints, as the spec states them."""
    marks: frozenset[int]
    """Steps whose parameters other stages start from: calls end there."""
    stopping: Callable[[], bool]
    """Whether the user asked to stop."""
    _due: tuple[int, bool] = (-1, False)
    _stops: tuple[int, bool] = (-1, False)

    def __post_init__(self) -> None:
        self._saved = self.start, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save at a step."""
        if self._due[0] != step:
            self._due = step, self.stopping() or self._is_due(step)
            if self._due[1]:
                self._saved = step, time.monotonic()
        return self._due[1]

    def stops(self, step: int) -> bool:
        """Whether to stop at a step, when it is saved."""
        if self._stops[0] != step:
            self._stops = step, self.stopping()
        return self._stops[1]

    def _is_due(self, step: int) -> bool:
        saved, seconds = self._saved
        if step in self.marks:
            return True
        if self.every is None:
            return time.monotonic() - seconds > CHECKPOINT_SECONDS
        return step // self.every > saved // self.every


@dataclass
class Loop:
    """One stage while it is trained."""

    stage: Training
    trainer: Trainer
    recorder: Recorder
    checkpoints: Checkpoints
    reporter: Reporter
    evaluate: Callable[[Params, int], Mapping[str, float]]
    """Parameters and step to the metrics of the stage's evals."""
    schedule: CheckpointSchedule
    peak: float
    """FLOP/s of all devices of the stage; for a branch of a fused sweep, its share."""
    _pending: list[tuple[int, Callable[[], Sequence[Row]]]] = field(default_factory=list)
    _mark: float = 0.0
    _mark_step: int = 0
    _tokens: float = 0.0
    _flops: float = 0.0

    def run(self, start: int) -> Generator[None, None, dict[str, float]]:
        """Train from step `start` to the end, yielding before each call; returns the last value of
        every metric.

        Raises `Interrupted` after saving, `DivergedError`, and `CheckpointError`.
        """
        trainer, steps = self.trainer, self.trainer.steps
        if start == 0:
            self._evaluate(0)
        step = start
        self._restart_clock(step)
        if step < steps:
            self.reporter.doing("compiling")
        while step < steps:
            yield  # the other branches of a fused sweep are at the same step now
            until = trainer.call_end(step)
            wait = trainer.advance(step, until)
            if trainer.overlaps:
                self._collect()  # the metrics of the last call, while the devices make this one
            self._pending.append((step, wait))
            if not trainer.overlaps:
                self._collect()
            step = until
            if step < steps and self._is_eval(step):
                self._collect()
                self._evaluate(step)
            if step < steps and self.schedule.due(step):
                self._collect()
                self._save(step)
                if self.schedule.stops(step):
                    self.checkpoints.wait()
                    raise Interrupted
        self._collect()
        self._evaluate(steps)
        self.reporter.doing("saving")
        self.checkpoints.finish(steps, trainer.state.trained_params)
        return dict(self.recorder.last)

    def _collect(self) -> None:
        """Wait for the metrics of the calls that were started, and record them."""
        for first, wait in self._pending:
            rows = wait()
            last = first + len(rows)
            for step, row in enumerate(rows, first + 1):
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(row.get(name, 0.0)):
                        raise DivergedError(name, step)
                self._tokens += row["tokens"]
                self._flops += row.pop("flops")
                timing = self._timing(step) if step == last else {}
                line = self.recorder.step(step, row, timing)
                if line is not None:
                    for sample in self.trainer.samples() if step == last else ():
                        self.recorder.sample(step, sample.row())
                if step == last:
                    self.reporter.step(step, self.trainer.steps, line or {**row, **timing})
        self._pending.clear()

    def _timing(self, step: int) -> dict[str, float]:
        """Return the rates since the clock was started."""
        seconds = time.monotonic() - self._mark
        steps = step - self._mark_step
        if not steps or seconds <= 0:
            return {}
        rates = {"steps_per_second": steps / seconds, "tokens_per_second": self._tokens / seconds}
        rates["mfu"] = self._flops / seconds / self.peak
        rates["memory"] = float(memory_in_use())
        if seconds > 10:
            self._restart_clock(step)
        return rates

    def _restart_clock(self, step: int) -> None:
        self._mark, self._mark_step = time.monotonic(), step
        self._tokens = self._flops = 0.0

    def _is_eval(self, step: int) -> bool:
        every = self.stage.eval_every
        return bool(self.stage.evals) and every is not None and step % every == 0

    def _save(self, step: int) -> None:
        progress = {"trainer": self.trainer.progress(), "recorder": self.recorder.progress()}
        state = self.trainer.state
        self.checkpoints.save(step, state.params, state.moments, progress)

    def _evaluate(self, step: int) -> None:
        if not self.stage.evals:
            return
        values = self.evaluate(self.trainer.state.decoder_params, step)
        self.recorder.evaluated(step, values)
        self.reporter.evaluated(step, values)
        self._restart_clock(step)


def memory_in_use() -> int:
    """Return the peak bytes in use on a device; on a CPU, of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
