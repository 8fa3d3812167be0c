"""A pipeline of three sessions that runs in seconds, and ways to plan, run, read and copy it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tunelang.compiler.graph import Input
from tunelang.compiler.plan import StagePlan
from tunelang.dsl.check import check_file
from tunelang.dsl.diagnostics import render
from tunelang.runtime.data.row_errors import BadRows
from tunelang.runtime.pipeline.execute_plan import execute
from tunelang.runtime.planning.prepare import Prepared, prepare
from tunelang.runtime.store.locks import Holder
from tunelang.runtime.store.run_store import StageFolder, Store

SPEC = """\
param rates  : number = 1e-3
param lessons : steps = 12 steps

run { seed = 3, track = [] }

data prose : text { path = "prose.txt", rows = line }
data sums : jsonl {
  path     = "sums.jsonl"
  prompt   = "{a}+{b}="
  response = "{c}"
  target   = "{c}"
}
data counts : jsonl { path = "counts.jsonl", prompt = "{a}:", response = "{b}", target = "{b}" }
data both = 75% * counts + 25% * sums

tokenizer letters : bytes {}

model tiny : transformer {
  tokenizer = letters
  layers    = 2
  width     = 16
  heads     = 2
  context   = 32
}

reward correct = numeric_match("{completion}", "{target}")
reward short   = matches("{completion}", /^.{0,3}$/)
reward broad   = 0.8 * correct + 0.2 * short

eval accuracy : generate { data = sums, score = correct, max_tokens = 4, limit = 8 }
eval fluency  : perplexity { data = prose }

stage base : pretrain {
  from             = tiny
  data             = prose
  length           = 8 steps
  batch            = 8 sequences
  optimizer        = adamw(lr = 1e-2)
  evals            = [fluency]
  checkpoint_every = 3 steps
  log_every        = 1 step
  mesh             = axes(data = 1)
}

stage baseline : sft {
  from             = base
  data             = sums
  length           = lessons
  batch            = 8 sequences
  optimizer        = adamw(lr = 1e-2, warmup = 10%, decay = cosine)
  evals            = [accuracy, fluency]
  eval_every       = 5 steps
  checkpoint_every = 4 steps
  log_every        = 2 steps
  mesh             = axes(data = 1)
}

stage specialist : grpo {
  from             = baseline
  data             = sums
  reward           = correct
  group            = 4
  batch            = 4 prompts
  length           = 5 steps
  rollout          = sampling(max_tokens = 4)
  optimizer        = adamw(lr = each(rates, 2 * rates))
  evals            = [accuracy]
  keep             = best(accuracy)
  checkpoint_every = 2 steps
  log_every        = 1 step
  mesh             = axes(data = 1)
}

stage generalist : dapo {
  from             = specialist
  data             = both
  reward           = broad
  group            = 4
  batch            = 4 prompts
  minibatches      = 2
  length           = 4 steps
  rollout          = sampling(max_tokens = 4)
  kl               = k3(0.01)
  optimizer        = adamw(lr = rates)
  evals            = [accuracy]
  checkpoint_every = 1 step
  log_every        = 1 step
  mesh             = axes(data = 1)
}
"""


def workspace(folder: Path) -> Path:
    """Write the spec and its data into a folder; returns the path of the spec."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prose.txt").write_text("".join(f"line {n} of the prose\n" for n in range(40)))
    sums = [{"a": a, "b": b, "c": a + b} for a in range(5) for b in range(4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    counts = [{"a": "x" * n, "b": n} for n in range(1, 9)]
    (folder / "counts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in counts))
    spec = folder / "tiny.tune"
    spec.write_text(SPEC)
    return spec


class Recorder:
    """A reporter that records what happens."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: dict[str, int] = {}
        """The last step of each stage."""
        self._node = ""

    def stage(self, planned: StagePlan, steps: int | None) -> None:
        self._node = planned.node

    def turn(self, planned: StagePlan) -> None:
        self._node = planned.node

    def doing(self, what: str) -> None: ...

    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        self.steps[self._node] = step

    def evaluated(self, step: int, values: Mapping[str, float]) -> None: ...

    def finished(self, planned: StagePlan, summary: Mapping[str, Any], again: bool) -> None:
        self.lines.append(f"{planned.node} {'again' if again else 'done'}")

    def selected(self, read: Input, node: str, value: float) -> None:
        self.lines.append(f"{read.stage} -> {node}")

    def bad_rows(self, rows: BadRows) -> None:
        self.lines.append(f"{rows.total} bad rows")

    def waiting(self, planned: StagePlan, holder: Holder | None) -> None:
        self.lines.append(f"waiting for {holder}")


def plan(spec: Path, *sets: str, **choices: Any) -> tuple[Prepared, Store]:
    """Check and plan a spec; `sets` are overrides as of `--set`."""
    checked = check_file(spec, list(sets))
    assert checked.program is not None, render.text(checked.diagnostics)
    store = Store(spec.parent / ".tune")
    return prepare(checked.program, store, **choices), store


def run(spec: Path, *sets: str, **choices: Any) -> Recorder:
    """Plan and run; returns what happened."""
    prepared, store = plan(spec, *sets, **choices)
    recorder = Recorder()
    entry = store.begin_run(str(spec), (), json.loads(prepared.plan.dumps()))
    execute(prepared, store, recorder)
    store.end_run(entry, "done")
    return recorder


def stage_folder(spec: Path, node: str, *sets: str) -> StageFolder:
    """Return the folder of a stage in the store."""
    prepared, store = plan(spec, *sets)
    return store.folder(prepared.plan.by_node[node].digest)


def metrics(spec: Path, node: str, *sets: str) -> list[dict[str, Any]]:
    """Read the rows of metrics of a stage."""
    return list(stage_folder(spec, node, *sets).metrics().rows)


def step_metrics(spec: Path, node: str, *sets: str) -> list[dict[str, Any]]:
    """Read the rows of metrics of the training steps of a stage."""
    return [row for row in metrics(spec, node, *sets) if "loss" in row]


def summary(spec: Path, node: str) -> dict[str, Any]:
    """Read the summary of a finished stage."""
    done = stage_folder(spec, node).done()
    assert done is not None, node
    summary: dict[str, Any] = done["summary"]
    return summary


def params(spec: Path, node: str, *sets: str) -> dict[str, np.ndarray[Any, Any]]:
    """Read the parameters of a finished stage, by name."""
    import orbax.checkpoint as ocp

    folder = stage_folder(spec, node, *sets)
    assert folder.done() is not None, node
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        restored = reader.restore(
            folder.checkpoints / str(folder.steps()[-1]),
            ocp.args.Composite(params=ocp.args.StandardRestore()),
        )
    return {name: np.asarray(value) for name, value in restored.params.items()}


def copy(spec: Path, to: Path) -> Path:
    """Copy a workspace with its store."""
    shutil.copytree(spec.parent, to)
    return to / spec.name


def environment() -> dict[str, str]:
    """Return the environment of a process that runs `tune`."""
    return {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}


def tune(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command `tune` in a process, with further environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "tunelang.runtime", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=timeout,
        env={**environment(), **variables},
    )  # fmt: skip


TIMING = {"time", "steps_per_second", "tokens_per_second", "mfu", "memory", "rollout_seconds"}
"""Metrics that differ from run to run."""


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave `TIMING` out of rows of metrics."""
    return [{name: row[name] for name in row if name not in TIMING} for row in rows]
