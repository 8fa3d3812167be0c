"""Slots and caches of rollouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.compiler.layout.queries import LLAMA, lay_out, policy
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.search.layout_search import MARGIN


def test_policy_has_slots_and_a_cache(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    layout = lay_out(policy(folder), LLAMA, 2, devices)
    assert layout.slots == 256
    assert layout.memory["kv cache"] > 0
    assert "reference" not in layout.memory
    assert "reference" in lay_out(policy(folder, "kl = k3(0.1)"), LLAMA, 2, devices).memory


def test_slots_shrink_when_memory_is_short(folder: Path) -> None:
    long = replace(LLAMA, context=32_768)
    rollout = "rollout = sampling(max_tokens = 30_000, max_prompt = 2000)"
    devices = Devices(CHIPS["h200"], 8, False)
    few = lay_out(policy(folder, rollout), long, 2, devices)
    assert few.slots is not None
    assert few.slots < 256
    assert few.total <= MARGIN * devices.chip.memory
    pinned = lay_out(policy(folder, rollout + ", slots = 8"), long, 2, devices)
    assert pinned.slots == 8
    assert pinned.memory["kv cache"] <= few.memory["kv cache"]
    assert pinned.times["rollout"] > few.times["rollout"]
