"""`tune run`: the plan shown, executed and entered in the store, and the table at the end."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from tunelang.runtime.commands import plan_text
from tunelang.runtime.commands.progress import Progress
from tunelang.runtime.commands.show import table
from tunelang.runtime.errors import Interrupted
from tunelang.runtime.pipeline.execute_plan import execute, refuse_missing_inputs
from tunelang.runtime.planning.prepare import Prepared
from tunelang.runtime.store.run_store import Store

INTERRUPTED = 130


def run(prepared: Prepared, store: Store, spec: Path, command: tuple[str, ...], width: int) -> int:
    """Run a plan; returns the exit code. Raises `StageFailed` and `StoreError`."""
    console = Console(stderr=True, highlight=False, markup=False)
    plan = prepared.plan
    if not any(stage.state.runs for stage in plan.stages):
        print(table(prepared.graph, store, width), end="")
        console.print("everything is up to date")
        return 0
    refuse_missing_inputs(plan)
    console.out(plan_text.show(prepared, width=width), end="\n")
    entry = store.begin_run(str(spec), command, json.loads(plan.dumps()))
    outcome = "failed"
    try:
        with Progress(console) as progress:
            execute(prepared, store, progress)
        outcome = "done"
    except (Interrupted, KeyboardInterrupt):
        outcome = "interrupted"
        console.print("interrupted; everything is saved: run the same command to continue")
        return INTERRUPTED
    finally:
        store.end_run(entry, outcome)
    print(table(prepared.graph, store, width), end="")
    return 0
