"""The reports of a running stage: lines of metrics, completions to read, trackers.

Values of steps between two lines are averaged. The sums so far go into checkpoints, so
that the lines of a resumed run are those of one that was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol, Self, runtime_checkable

from tunelang.dsl.vocabulary.base import Function
from tunelang.dsl.vocabulary.training import TensorBoard, Wandb
from tunelang.runtime.data.examples import Example
from tunelang.runtime.errors import MissingExtraError
from tunelang.runtime.store.run_store import StageFolder
from tunelang.runtime.training.checkpoints import Progress

_LAST = frozenset({"learning_rate", "step"})
"""Metrics of which a line has the last value instead of the mean."""

Values = Mapping[str, float]

SampleRow = dict[str, str | int | float | dict[str, float] | None]
"""A completion as a line of `samples.jsonl`."""


@dataclass(frozen=True)
class SampleRecord:
    """A scored completion, as a line of `samples.jsonl` shows it."""

    example: Example
    text: str
    tokens: int
    reward: float
    parts: Mapping[str, float]

    def row(self) -> SampleRow:
        """Return the completion as a line of `samples.jsonl`."""
        prompt = self.example.prompt
        if prompt is None and self.example.messages:
            prompt = self.example.messages[-1].content
        return {
            "source": self.example.source,
            "prompt": prompt,
            "completion": self.text,
            "target": self.example.target,
            "tokens": self.tokens,
            "reward": self.reward,
            "parts": {n: v for n, v in self.parts.items() if v == v},  # NaN: not prompt
        }


@runtime_checkable
class Tracker(Protocol):
    """A service that takes metrics, such as TensorBoard."""

    def log(self, step: int, values: Values) -> None:
        """Take the metrics of a line."""

    def close(self) -> None:
        """Write the metrics that are not yet written."""


class Recorder:
    """Writes the lines of one stage, whose lock the caller holds."""

    def __init__(
        self, folder: StageFolder, every: int, steps: int, trackers: Sequence[Tracker]
    ) -> None:
        self._metrics = folder.metrics_writer()
        self._samples = folder.samples_writer()
        self._every, self._steps = every, steps
        self._trackers = trackers
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self.last: dict[str, float] = {}
        """The values of the last line of each metric."""

    def step(self, step: int, values: Values, timing: Values) -> dict[str, float] | None:
        """Take the metrics of a step (from 1); returns the line where one was written.

        `timing` are measured values of the line, such as tokens per second: not averaged.
        """
        for name, value in values.items():
            total = self._sums.get(name, 0.0)
            self._sums[name] = value if name in _LAST else total + value
            self._counts[name] = 1 if name in _LAST else self._counts.get(name, 0) + 1
        if step % self._every and step != self._steps:
            return None
        line = {name: total / self._counts[name] for name, total in self._sums.items()}
        line.update(timing)
        self._sums, self._counts = {}, {}
        self._write(step, line)
        return line

    def evaluated(self, step: int, values: Values) -> None:
        """Take the metrics of evals."""
        self._write(step, values)

    def sample(self, step: int, row: SampleRow) -> None:
        """Take a completion to read."""
        self._samples.append({"step": step, **row})

    def progress(self) -> Progress:
        """Return the sums since the last line, for a checkpoint; writes the files out."""
        self._metrics.sync()
        self._samples.sync()
        return {"sums": self._sums, "counts": self._counts}

    def resume(self, progress: Progress) -> None:
        """Go on from the sums of a checkpoint."""
        self._sums = {name: float(value) for name, value in progress["sums"].items()}
        self._counts = {name: int(count) for name, count in progress["counts"].items()}

    def _write(self, step: int, values: Values) -> None:
        self._metrics.append({"step": step, "time": round(time.time(), 3), **values})
        self.last.update(values)
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close all files."""
        self._metrics.close()
        self._samples.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _TensorBoard:
    def __init__(self, folder: StageFolder, step: int) -> None:
        from tensorboardX import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, settings: Wandb, name: str, digest: str) -> None:
        import wandb  # an extra

        self._run = wandb.init(
            project=settings.project, entity=settings.entity, name=name, id=digest, resume="allow"
        )

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(settings: Sequence[Function]) -> None:
    """Raise `MissingExtraError` where the package of a tracker is not installed."""
    if any(isinstance(tracker, Wandb) for tracker in settings) and find_spec("wandb") is None:
        raise MissingExtraError("wandb", "track")


def open_trackers(
    settings: Sequence[Function], folder: StageFolder, name: str, step: int
) -> list[Tracker]:
    """Open the trackers of a run for a stage that goes on from a step."""
    trackers: list[Tracker] = []
    for kind in settings:
        match kind:
            case TensorBoard():
                trackers.append(_TensorBoard(folder, step))
            case Wandb():
                trackers.append(_Wandb(kind, name, folder.path.name))
    return trackers
