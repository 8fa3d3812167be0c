"""`tune show`: prints the results of stages that are in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunelang.compiler.file_digests import Contents
from tunelang.compiler.fingerprint import fingerprints
from tunelang.compiler.graph import StageGraph, build, named
from tunelang.dsl.messages.human_units import count_text, duration, number, size_text
from tunelang.dsl.program import Program
from tunelang.runtime.store.run_store import StageFolder, Store

_HEADLINES = ("loss", "perplexity", "reward", "length", "tokens_per_second", "mfu", "memory")


def show(program: Program, store: Store, stage: str | None, samples: int, width: int) -> str:
    """Return the table of all stages; for one stage, its metrics and last completions too.

    Raises `UnknownStage`, `ContentError` and `StoreError`.
    """
    graph = build(program)
    if stage is None:
        return table(graph, store, width)
    digests = _digests(graph, store)
    parts: list[str] = []
    for node in named(graph, stage):
        folder = store.folder(digests[node])
        parts += [f"{node}  ({digests[node]})", *_stage(folder, samples, width), ""]
    return "\n".join(parts)


def table(graph: StageGraph, store: Store, width: int) -> str:
    """Return a table of stages by evaluations, each before and after the stage."""
    digests = _digests(graph, store)
    rows: list[tuple[str, str, str, dict[str, str]]] = []
    names: dict[str, None] = {}
    for node in graph.nodes:
        folder = store.folder(digests[node])
        done = folder.done()
        if done is None:
            steps = folder.steps()
            state = f"at step {steps[-1]}" if steps else "not run"
            rows.append((node, state, "", {}))
            continue
        summary = done["summary"]
        first, last = _evals(folder)
        cells = {}
        for name, value in last.items():
            names[name] = None
            before = f"{number(first[name])} → " if name in first else ""
            cells[name] = f"{before}{number(value)}"
        outcome = "written" if "path" in summary else str(summary["steps"])
        rows.append((node, outcome, duration(summary["seconds"]), cells))
    head = ["stage", "steps", "time", *names]
    body = [
        [node, steps, took, *(cells.get(name, "") for name in names)]
        for node, steps, took, cells in rows
    ]
    return "".join(f"{line}\n" for line in _columns([head, *body], width))


def _digests(graph: StageGraph, store: Store) -> dict[str, str]:
    contents = Contents.load(store.contents)
    digests = {
        node: fingerprint.digest for node, fingerprint in fingerprints(graph, contents).items()
    }
    contents.save()
    return digests


def _evals(folder: StageFolder) -> tuple[dict[str, float], dict[str, float]]:
    """Return the first metric of each eval, before the first step and at the end."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for row in folder.metrics().rows:
        heads: dict[str, float] = {}
        for key, value in row.items():
            name, dot, _ = key.partition(".")
            if dot and not key.endswith(".reward"):
                heads.setdefault(name, value)
        last.update(heads)
        if row.get("step") == 0:
            first.update(heads)
    return first, last


def _columns(rows: list[list[str]], width: int) -> Iterator[str]:
    sizes = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:<{size}}" for cell, size in zip(row, sizes, strict=True)]
        line = "  ".join(cells).rstrip()
        yield line if len(line) <= width else line[: width - 1] + "…"


def _stage(folder: StageFolder, samples: int, width: int) -> Iterator[str]:
    """Yield the lines about one stage."""
    metrics = folder.metrics()
    if metrics.damaged:
        yield f"  {metrics.damaged} lines of metrics.jsonl are damaged and left out"
    rows = [row for row in metrics.rows if "loss" in row or "reward" in row]
    if rows:
        names = [name for name in _HEADLINES if any(name in row for row in rows)]
        step = max(1, len(rows) // 12)
        picked = [*rows[::step], *([rows[-1]] if (len(rows) - 1) % step else [])]
        head = ["step", *names]
        body = [[str(row.get("step")), *(_cell(row, name) for name in names)] for row in picked]
        yield from (f"  {line}" for line in _columns([head, *body], width - 2))
    for sample in folder.samples().rows[-samples:] if samples else ():
        yield ""
        yield from _sample(sample, width)


def _cell(row: Mapping[str, object], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, int | float):
        return ""
    if name == "memory":
        return size_text(value)
    return count_text(value) if name == "tokens_per_second" else number(value)


def _sample(sample: Mapping[str, Any], width: int) -> Iterator[str]:
    parts = "  ".join(f"{name} {number(value)}" for name, value in sample["parts"].items())
    which = f"eval {sample['eval']}, " if "eval" in sample else ""
    yield f"  {which}step {sample['step']}, {sample['source']}: reward {number(sample['reward'])}"
    if parts:
        yield f"    {parts}"
    for mark, key in ((">", "prompt"), ("<", "completion"), ("=", "target")):
        text = sample.get(key)
        if text is not None:
            flat = " ".join(str(text).split())
            line = f"    {mark} {flat}"
            yield line if len(line) <= width else line[: width - 1] + "…"
