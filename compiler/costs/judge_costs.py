"""Memory and seconds of the local models that score the completions of a step."""

from __future__ import annotations

import math
from dataclasses import replace

from tunelang.compiler.costs.model_sizes import key_shards, model_sizes
from tunelang.compiler.costs.rollout_costs import sampling_seconds, sampling_tensor
from tunelang.compiler.costs.stage_costs import RolloutRequest
from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.layout_query import Judge
from tunelang.compiler.layout.stage_layout import StageLayout

VERDICT_TOKENS = 256
"""Tokens of a judge's verdict, at most."""
VERDICT_SLOTS = 64
"""Completions that a judge scores at once on each group of devices that has it."""


def with_judges(
    layout: StageLayout, judges: tuple[Judge, ...], completions: int, devices: Devices
) -> StageLayout:
    """Add to a layout the memory and the seconds of its judges, which work one after another."""
    if not judges:
        return layout
    costs = [_judging(judge, layout, completions, devices) for judge in judges]
    seconds = sum(cost[2] for cost in costs)
    memory = layout.memory | {
        "judges": sum(cost[0] for cost in costs),
        "judging": max(cost[1] for cost in costs),
    }
    times = {**layout.times, "judging": seconds}
    return replace(layout, memory=memory, times=times, seconds=layout.seconds + seconds)


def _judging(
    judge: Judge, layout: StageLayout, completions: int, devices: Devices
) -> tuple[int, int, float]:
    """Return a judge's bytes in a device: always, and while it works; and its seconds in a step."""
    a, chip = judge.architecture, devices.chip
    count = math.prod(layout.mesh.values())
    # The completion that is judged is in the judge's prompt.
    length = layout.length + (VERDICT_TOKENS if judge.speaks else 0)
    length = min(a.context, length)
    sizes = model_sizes(a, judge.dtype_bytes, length)
    tensor = sampling_tensor(a, judge.dtype_bytes, count, chip.memory)
    working = judge.dtype_bytes * sizes.parameters // tensor
    reading = completions * length * sizes.forward_flops / (count * chip.peak * chip.efficiency)
    if not judge.speaks:
        return sizes.stored_bytes // tensor, working, reading
    groups = count // tensor
    local = min(VERDICT_SLOTS, -(-completions // groups))
    request = RolloutRequest(completions, VERDICT_TOKENS, None, None)
    writing = sampling_seconds(a, sizes, length, tensor, local, request, local * groups, devices)
    working += sizes.cache_bytes * length * local // key_shards(a, tensor)
    return sizes.stored_bytes // tensor, working, reading + writing
