"""A whole pipeline of three sessions that runs in seconds, and ways to run it."""

from __future__ import annotations

import json
import os
import shutil
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
from tunelang.runtime.store.run_store import Store

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


class Heard:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.at: dict[str, int] = {}
        self._node = ""

    def stage(self, planned: StagePlan, steps: int | None) -> None:
        self._node = planned.node

    def turn(self, planned: StagePlan) -> None:
        self._node = planned.node

    def doing(self, what: str) -> None: ...

    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        self.at[self._node] = step

    def evaluated(self, step: int, values: Mapping[str, float]) -> None: ...

    def finished(self, planned: StagePlan, summary: Mapping[str, Any], again: bool) -> None:
        self.lines.append(f"{planned.node} {'again' if again else 'done'}")

    def selected(self, read: Input, node: str, value: float) -> None:
        self.lines.append(f"{read.stage} -> {node}")

    def bad_rows(self, rows: BadRows) -> None:
        self.lines.append(f"{rows.total} bad rows")

    def waiting(self, planned: StagePlan, holder: Holder | None) -> None:
        self.lines.append(f"waiting for {holder}")


def planned(spec: Path, *sets: str, **choices: Any) -> tuple[Prepared, Store]:
    checked = check_file(spec, list(sets))
    assert checked.program is not None, render.text(checked.diagnostics)
    store = Store(spec.parent / ".tune")
    return prepare(checked.program, store, **choices), store


def run(spec: Path, *sets: str, **choices: Any) -> Heard:
    """Plan and run; returns what happened."""
    prepared, store = planned(spec, *sets, **choices)
    heard = Heard()
    entry = store.begin_run(str(spec), (), json.loads(prepared.plan.dumps()))
    execute(prepared, store, heard)
    store.end_run(entry, "done")
    return heard


def params(spec: Path, node: str, *sets: str) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters that a finished stage yielded, by name."""
    import orbax.checkpoint as ocp

    prepared, store = planned(spec, *sets)
    folder = store.folder(prepared.plan.by_node[node].digest)
    assert folder.done() is not None, node
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(
            folder.checkpoints / str(folder.steps()[-1]),
            ocp.args.Composite(params=ocp.args.StandardRestore()),
        )
    return {name: np.asarray(value) for name, value in found.params.items()}


def copy(spec: Path, to: Path) -> Path:
    """Copy a workspace with its store."""
    shutil.copytree(spec.parent, to)
    return to / spec.name


def environment() -> dict[str, str]:
    """What a `tune` of its own should see."""
    return {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
