"""Renders a plan for a terminal: one line a stage; with `-v`, all details."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunelang.compiler.drawing.draw import picture, tree
from tunelang.compiler.layout.stage_layout import peak
from tunelang.compiler.plan import Json, StagePlan, describe
from tunelang.dsl.messages.human_units import count_text, duration, size_text
from tunelang.runtime.planning.prepare import Prepared

if TYPE_CHECKING:
    from tunelang.runtime.rehearsal.rehearse import Rehearsed


def show(prepared: Prepared, *, verbose: bool = False, width: int = 100) -> str:
    """Return the graph and the stages of a plan, in lines of at most `width` columns."""
    plan = prepared.plan
    lines = tree(picture(prepared.graph), width).rstrip("\n").split("\n")
    lines.append("")
    column = min(max((len(stage.node) for stage in plan.stages), default=0), width // 3)
    for stage in plan.stages:
        name = stage.node if len(stage.node) <= column else stage.node[: column - 1] + "…"
        first, *continued = _wrapped([describe(stage.state), *_facts(stage)], width - column - 2)
        lines.append(f"{name:<{column}}  {first}")
        lines += [f"{'':<{column}}  {line}" for line in continued]
        if verbose:
            lines += [f"{'':<{column}}  {line}" for line in _details(stage, width - column - 2)]
    lines += ["", _summary(prepared)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def report_text(prepared: Prepared, node: str, report: Rehearsed, width: int) -> str:
    """Return the compiler's report on a program of a stage, as text."""
    chip = prepared.devices[node].chip
    facts = [f"{size_text(report.peak)} of {size_text(chip.memory)} in a device"]
    if report.refused:
        facts = [f"does not fit: {report.refused}"]
    elif report.peak > chip.memory:
        facts[0] += ": does not fit"
    facts += [
        f"{count} {kind} of {size_text(size)}" for kind, (count, size) in report.exchanged.items()
    ]
    facts.append(f"compiled in {duration(report.seconds)}")
    facts += report.findings
    line = f"{node} {report.name}  {', '.join(facts)}"
    return textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False) + "\n"


def _summary(prepared: Prepared) -> str:
    plan = prepared.plan
    counts = Counter(stage.state.kind for stage in plan.stages)
    parts = [", ".join(f"{count} {kind}" for kind, count in counts.items()) or "no stages"]
    known = [stage.cost["stage_seconds"] for stage in plan.stages if stage.cost]
    if known:
        some = [seconds for seconds in known if seconds is not None]
        more = "" if len(some) == len(known) else ", and stages whose length their data decides"
        devices = sorted({str(devices) for devices in prepared.devices.values()})
        parts.append(f"{', '.join(devices)}; about {duration(sum(some))}{more}")
        costs = [stage.cost for stage in plan.stages if stage.cost]
        hours = sum(cost["device_hours"] or 0.0 for cost in costs)
        if any(not devices.here for devices in prepared.devices.values()):
            parts.append(f"{hours:,.{1 if hours >= 1 else 3}f} device-hours")
        if any(cost["price"] for cost in costs):
            parts.append(f"price {sum(cost['price'] or 0.0 for cost in costs):,.2f}")
    return "; ".join(parts)


def _facts(stage: StagePlan) -> Iterator[str]:
    """Yield the facts to print after the state: mesh, micro-batches, remat, memory, cost."""
    if stage.layout is None or stage.memory is None or stage.cost is None:
        return
    yield _mesh(stage.layout["mesh"]) or "1 device"
    rows, parts = stage.layout["rows"], stage.layout["micro_batches"]
    yield f"{rows} × {stage.layout['length']} tokens" + (f" in {parts} parts" if parts > 1 else "")
    if stage.layout["branches"] > 1:
        yield f"{stage.layout['branches']} branches in one program"
    if stage.layout["remat"] != "none":
        yield f"remat {stage.layout['remat']}"
    if stage.layout["kernel"] != "xla":
        yield f"{stage.layout['kernel']} attention"
    if stage.layout["offload"]:
        yield f"{' and '.join(stage.layout['offload'])} in the memory of the host"
    yield size_text(peak(stage.memory))
    yield f"{count_text(stage.cost['flops'])}FLOP a step"
    rollout = stage.cost["times"].get("rollout")
    if rollout is not None:
        yield f"rollout {rollout / stage.cost['seconds']:.0%} of the time"
    if stage.cost["stage_seconds"] is not None:
        count = stage.cost["steps"]
        steps = f"{count} step{'s' if count != 1 else ''}"
        about = "" if stage.cost["exact"] else "about "
        yield f"{about}{steps}, about {duration(stage.cost['stage_seconds'])}"


def _details(stage: StagePlan, width: int) -> Iterator[str]:
    """Yield the lines that `-v` adds."""
    yield f"fingerprint {stage.digest}"
    for read in stage.inputs:
        chosen = f", {read.selection}" if read.selection else ""
        yield from _wrapped([f"{', '.join(read.paths)}: {', '.join(read.nodes)}{chosen}"], width)
    if stage.memory is not None:
        parts = [f"{name} {size_text(size)}" for name, size in stage.memory.items()]
        yield from _wrapped(["in each device: " + parts[0], *parts[1:]], width)
    if stage.layout is None or stage.cost is None:
        return
    if stage.layout["slots"] is not None:
        groups = _mesh(stage.layout["decode"]) or "1 device"
        yield f"{stage.layout['slots']} completions at once, on {groups}"
    for line in _reasons(stage.layout, stage.cost):
        yield from _wrapped([line], width)


def _reasons(layout: Json, cost: Json) -> Iterator[str]:
    """Yield lines on why the layout was chosen: the time of a step by cause, other layouts."""
    longest = sorted(cost["times"].items(), key=lambda item: -item[1])
    spent = [f"{name} {duration(seconds)}" for name, seconds in longest]
    several = f" of {layout['branches']} branches" if layout["branches"] > 1 else ""
    yield f"a step{several} of {duration(cost['seconds'])}, bound by {', '.join(spent)}"
    if layout["sweep"] is not None:
        yield _sweep(layout["sweep"], layout["branches"] > 1)
    if layout["unpinned"] is not None:
        best = layout["unpinned"]
        times = cost["seconds"] / layout["branches"] / best["seconds"]
        pinned = ", ".join(f"`{name}`" for name in layout["pinned"])
        yield f"{pinned} pinned by the spec: {times:.2f} × the time of {_short(best)}"
    others = [
        f"{_short(other)}, {other['seconds'] / cost['seconds']:.2f} × the time"
        for other in layout["others"]
    ]
    if others:
        yield "next best: " + "; ".join(others)


def _sweep(sweep: Json, fused: bool) -> str:
    """Compare training branches in one program with one after another."""
    if sweep["share"] is None:
        why = sweep["why"] or "one program of all does not fit"
        return f"{sweep['branches']} branches one after another: {why}"
    chosen = "in one program" if fused else "one after another"
    return (
        f"{sweep['branches']} branches {chosen}: one program of all takes {sweep['share']:.2f} ×"
        " the time of one after another"
    )


def _short(layout: Json) -> str:
    parts = f" in {layout['micro_batches']} parts" if layout["micro_batches"] > 1 else ""
    remat = f" with remat {layout['remat']}" if layout["remat"] != "none" else ""
    return (_mesh(layout["mesh"]) or "1 device") + parts + remat


def _mesh(mesh: dict[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


def _wrapped(parts: list[str], width: int) -> list[str]:
    """Join facts with commas, and break them into lines; later lines are indented."""
    words = ", ".join(parts).split(" ")
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("  " + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
