"""Memory and time of local judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.compiler.layout.queries import LLAMA, lay_out, policy
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.layout_query import (
    Judge,
)
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.models.presets import PRESETS


@pytest.mark.parametrize("speaks", [True, False])
def test_judges_add_memory_and_time(folder: Path, speaks: bool) -> None:
    devices, small = Devices(CHIPS["v5p"], 8, False), replace(LLAMA, layers=4)
    alone = lay_out(policy(folder), LLAMA, 2, devices)
    judged = lay_out(policy(folder), LLAMA, 2, devices, judges=(Judge(small, 2, speaks),))
    assert judged.memory["judges"] == 4 * parameter_count(small)
    assert judged.seconds == pytest.approx(alone.seconds + judged.times["judging"])
    both = (Judge(small, 2, speaks), Judge(small, 2, True))
    more = lay_out(policy(folder), LLAMA, 2, devices, judges=both)
    assert more.memory["judges"] == 2 * judged.memory["judges"]


@pytest.mark.parametrize("speaks", [True, False])
def test_judge_is_split_over_all_devices(folder: Path, speaks: bool) -> None:
    large = Judge(PRESETS["llama-3.1-8b"], 2, speaks)
    few, many = (
        lay_out(policy(folder), LLAMA, 2, Devices(CHIPS["v5p"], count, False), judges=(large,))
        for count in (4, 8)
    )
    # In two parts, since whole it would take more than a quarter of a device.
    assert few.memory["judges"] == many.memory["judges"]
    assert few.memory["judges"] == pytest.approx(2 * parameter_count(large.architecture), rel=0.01)
    assert many.times["judging"] == pytest.approx(few.times["judging"] / 2, rel=0.05)
