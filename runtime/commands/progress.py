"""Shows the progress of a run: one live line on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from tunelang.compiler.graph import Input
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.messages import run_failures
from tunelang.dsl.messages.human_units import count_text, duration, number
from tunelang.runtime.data.row_errors import BadRows
from tunelang.runtime.pipeline.run_context import RunReporter
from tunelang.runtime.stages.stage_kinds import Summary
from tunelang.runtime.store.locks import Holder

_PIPE_SECONDS = 10.0
"""Seconds between lines if the output is no terminal."""
_SHOWN = ("loss", "reward", "kl", "entropy", "length")
_BAR = 20


@dataclass
class _Shown:
    """Lines shown of a stage so far."""

    node: str
    first: tuple[int, float] | None = None
    """The first step, and its time."""
    printed: float = field(default_factory=time.monotonic)
    """Time of the last line."""
    evals: dict[str, float] = field(default_factory=dict)


class Progress(RunReporter):
    """Reports a run on a terminal; the context manager shows the live line."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, markup=False)
        self._live: Live | None = None
        self._now = _Shown("")
        self._began: dict[str, _Shown] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    # What happens.

    @override
    def stage(self, planned: StagePlan, steps: int | None) -> None:
        del steps
        self._now = self._began[planned.node] = _Shown(planned.node)

    @override
    def turn(self, planned: StagePlan) -> None:
        self._now = self._began[planned.node]

    @override
    def doing(self, what: str) -> None:
        self._line(what)

    @override
    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        shown = self._now
        if shown.first is None:
            shown.first = step, now
        first, since = shown.first
        left = ""
        if step > first and step < steps:
            left = f"{duration((now - since) / (step - first) * (steps - step))} left"
        text = f"{step}/{steps}  {_values(values)}"
        if self._live is None:
            if now - shown.printed < _PIPE_SECONDS and step < steps:
                return
            shown.printed = now
            self.console.print(f"{shown.node}  {text}  {left}".rstrip(), soft_wrap=True)
            return
        done = round(_BAR * step / max(steps, 1))
        bar = "━" * done + "╌" * (_BAR - done)
        self._line(f"{bar} {text}  {left}")

    @override
    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        first: dict[str, tuple[str, float]] = {}
        for name, value in values.items():
            first.setdefault(name.split(".")[0], (name, value))
        for name, value in first.values():
            before = self._now.evals.get(name)
            change = "" if before is None else f" (was {number(before)})"
            self._say(f"{self._now.node}  step {step}: {name} {number(value)}{change}")
            self._now.evals[name] = value

    @override
    def finished(self, planned: StagePlan, summary: Summary, again: bool) -> None:
        if again:
            self._say(f"{planned.node}  up to date")
            return
        took = duration(summary["seconds"])
        self._say(f"{planned.node}  {_outcome(summary)} in {took}")
        if "table" in summary:
            self.console.print(_compare_models(summary["table"]))

    @override
    def selected(self, read: Input, node: str, value: float) -> None:
        self._say(f"{read.stage}  {read.selection}: the winner is {node}, {number(value)}")

    @override
    def bad_rows(self, rows: BadRows) -> None:
        self._say(run_failures.dropped_rows(rows.total))
        for shown in rows.shown:
            self._say(f"  {shown.source}, {shown.row}: {shown.cause}")

    @override
    def waiting(self, planned: StagePlan, holder: Holder | None) -> None:
        self._say(f"{planned.node}  waiting for {holder or 'another process'}, which works on it")

    # How it is shown.

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def _line(self, text: str) -> None:
        if self._live is None:
            return
        table = Table.grid(padding=(0, 1))
        table.add_column(max_width=max(12, self.console.width // 3))
        table.add_column()
        table.add_row(
            Text(self._now.node, style="bold", overflow="ellipsis", no_wrap=True),
            Text(text, overflow="ellipsis", no_wrap=True),
        )
        self._live.update(table)


def _outcome(summary: Summary) -> str:
    """Describe the result of a stage."""
    metrics = summary["metrics"]
    if "path" in summary:
        return f"written to {summary['path']}"
    if "table" in summary:
        return f"{len(summary['table'])} models measured"
    if "solved" in metrics:
        rows, share = int(metrics["rows"]), number(metrics["solved"])
        return f"{rows:,} rows kept, of {share} of the prompts,"
    return f"done, {summary['steps']} steps" if summary["steps"] else "done"


_UNSHOWN = ("_low", "_high", ".length", ".truncated")


def _compare_models(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of several models; scores have half of their 95% confidence interval."""
    names = dict.fromkeys(name for values in scores.values() for name in values)
    shown = [name for name in names if not name.endswith(_UNSHOWN)]

    def cell(model: str, name: str) -> str:
        values = scores[model]
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        text = number(values[name]) if name in values else ""
        return text if low is None or high is None else f"{text} ±{number((high - low) / 2)}"

    rows = [["", *scores], *([name, *(cell(model, name) for model in scores)] for name in shown)]
    if len(shown) < len(scores):  # as few columns as there can be
        rows = [list(row) for row in zip(*rows, strict=True)]
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for index, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if index else "left", no_wrap=not index)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _values(values: Mapping[str, float]) -> str:
    parts = [f"{name} {number(values[name])}" for name in _SHOWN if name in values]
    if "tokens_per_second" in values:
        parts.append(f"{count_text(values['tokens_per_second'])} tokens/s")
    return "  ".join(parts)
