"""Meshes that split sequences, experts and large models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.compiler.layout.queries import LLAMA, lay_out, policy, stage
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.layout_query import (
    NoLayoutError,
)
from tunelang.compiler.models.architecture import Architecture, Mixture


def test_long_sequences_are_split_when_the_batch_cannot_be(folder: Path) -> None:
    long = replace(LLAMA, context=131_072)
    devices = Devices(CHIPS["v5p"], 16, False)
    few = lay_out(stage(folder, batch="batch = 2 sequences"), long, 2, devices)
    assert few.mesh["context"] > 1
    assert few.mesh["data"] * few.mesh["fsdp"] <= 2
    assert lay_out(stage(folder), LLAMA, 2, devices).mesh["context"] == 1
    # It is better than to split all else.
    pinned = "mesh = axes(fsdp = 2, tensor = 8)"
    other = lay_out(stage(folder, pinned, "batch = 2 sequences"), long, 2, devices)
    assert few.seconds < other.seconds


def test_policies_and_experts_refuse_the_context_axis(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    pin = "mesh = axes(data = 4, context = 2)"
    assert lay_out(stage(folder, pin), LLAMA, 2, devices).mesh["context"] == 2
    mixture = replace(LLAMA, experts=Mixture(count=4, active=2, width=1024))
    for kind, model in ((stage(folder, pin), mixture), (policy(folder, pin), LLAMA)):
        with pytest.raises(NoLayoutError, match="is not for"):
            lay_out(kind, model, 2, devices)


def test_large_model_is_split_over_devices(folder: Path) -> None:
    layout = lay_out(stage(folder), LLAMA, 2, Devices(CHIPS["v5e"], 64, False))
    assert layout.mesh["fsdp"] * layout.mesh["tensor"] >= 8


def test_experts_are_split_over_a_pinned_axis(folder: Path) -> None:
    mixture = Mixture(count=64, active=8, width=768)
    architecture = replace(LLAMA, experts=mixture, layers=16)
    devices = Devices(CHIPS["h200"], 8, False)
    pinned = lay_out(stage(folder, "mesh = axes(expert = 8)"), architecture, 2, devices)
    assert pinned.mesh["expert"] == 8
    with pytest.raises(NoLayoutError, match="do not divide the 1 experts"):
        lay_out(stage(folder, "mesh = axes(expert = 8)"), LLAMA, 2, devices)


def test_small_batch_leaves_devices_idle(folder: Path) -> None:
    tiny = Architecture(
        vocabulary=64, layers=2, width=16, heads=2, kv_heads=2, head_dim=8, mlp=32, context=32
    )
    layout = lay_out(
        stage(folder, batch="batch = 3 sequences"), tiny, 4, Devices(CHIPS["v5e"], 8, True)
    )
    assert layout.rows == 3
    assert layout.mesh["data"] * layout.mesh["fsdp"] in (1, 3)
