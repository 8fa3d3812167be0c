"""Ranked layouts: legal, fitting, pinned, and the best of what there is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.layout.queries import LLAMA, lay_out, policy, query, stage
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.layout_query import (
    DoesNotFitError,
    NoLayoutError,
)
from tunelang.compiler.layout.stage_layout import shards_of
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Mixture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.models.presets import PRESETS
from tunelang.compiler.search.layout_search import MARGIN, rank_layouts
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Sft
from tunelang.dsl.vocabulary.training import Axes, Lora, Sampling


@pytest.mark.parametrize("chip", sorted(CHIPS))
@pytest.mark.parametrize("count", [8, 16, 64])
def test_every_layout_is_legal(folder: Path, chip: str, count: int) -> None:
    devices = Devices(CHIPS[chip], count, False)
    if count * CHIPS[chip].memory < 9 * 8.1e9:  # parameters and gradients alone
        with pytest.raises(DoesNotFitError):
            lay_out(stage(folder), LLAMA, 2, devices)
        return
    layout = lay_out(stage(folder), LLAMA, 2, devices)
    assert count % math.prod(layout.mesh.values()) == 0
    shards = layout.mesh["data"] * layout.mesh["fsdp"]
    assert layout.rows % (shards * layout.micro_batches) == 0
    assert LLAMA.heads % layout.mesh["tensor"] == 0
    assert layout.total <= CHIPS[chip].memory
    assert layout.seconds > 0


MODELS = [
    replace(PRESETS["llama-3.2-1b"], context=2048),
    replace(PRESETS["gemma-2b"], context=1024),
    replace(PRESETS["gemma-3-1b"], context=4096),
    replace(LLAMA, context=65_536),
    replace(PRESETS["qwen3-0.6b"], experts=Mixture(count=8, active=2, width=768), context=1024),
]


@settings(max_examples=80, deadline=None)
@given(
    at=st.integers(0, len(MODELS) - 1),
    form=st.sampled_from(["full", "lora", "qlora"]),
    chip=st.sampled_from(sorted(CHIPS)),
    count=st.sampled_from([1, 2, 4, 8, 16, 64]),
    rows=st.sampled_from([1, 2, 6, 8, 32, 96]),
    policy=st.booleans(),
)
def test_ranked_layouts_fit_and_more_devices_are_never_slower(
    at: int, form: str, chip: str, count: int, rows: int, policy: bool
) -> None:
    a = MODELS[at]
    if form != "full":
        lora = Lora.unvalidated(targets=("attention",))
        a = adapted(a, (lora,), "nf4" if form == "qlora" else "bf16")
    optimizer = AdamW.unvalidated(lr=1e-4)
    made: Training = (
        Policy.unvalidated(
            batch=rows, group=4, rollout=Sampling.unvalidated(max_tokens=256), optimizer=optimizer
        )
        if policy
        else Sft.unvalidated(
            batch=Measure.unvalidated(value=rows, unit="sequences"), optimizer=optimizer
        )
    )
    there = Devices(CHIPS[chip], count, False)
    try:
        best, *others = rank_layouts(query(made, a, 2, there))
    except DoesNotFitError:
        return
    experts = 1 if a.experts is None else a.experts.count
    for each in (best, *others):
        mesh = each.mesh
        assert count % math.prod(mesh.values()) == 0
        assert each.rows % (shards_of(mesh) * each.micro_batches) == 0
        assert a.heads % mesh["tensor"] == a.mlp % mesh["tensor"] == 0
        assert experts % mesh["expert"] == 0
        assert each.length % mesh["context"] == 0
        assert each.kernel != "splash" or each.length // mesh["context"] % 128 == 0
        assert each.total <= MARGIN * there.chip.memory
        assert best.seconds <= each.seconds * (1 + 1e-5)
    # Pinning what was chosen changes nothing.
    local = best.rows // shards_of(best.mesh) // best.micro_batches
    pins = {"mesh": Axes.unvalidated(**best.mesh), "micro_batch": local, "remat": best.remat}
    pinned = made.model_copy(update=pins)
    assert rank_layouts(query(pinned, a, 2, there)) == [best]
    # More devices are never slower.
    more = lay_out(made, a, 2, replace(there, count=2 * count))
    assert more.seconds <= best.seconds * (1 + 1e-5)


def test_more_devices_are_never_slower(folder: Path) -> None:
    times = [
        lay_out(stage(folder), LLAMA, 2, Devices(CHIPS["v5p"], count, False)).seconds
        for count in (4, 8, 16, 32, 64)
    ]
    assert times == sorted(times, reverse=True)


def test_pinning_the_chosen_layout_changes_nothing(folder: Path) -> None:
    devices = Devices(CHIPS["h200"], 8, False)
    free = lay_out(stage(folder), LLAMA, 2, devices)
    axes = ", ".join(f"{axis} = {size}" for axis, size in free.mesh.items())
    local = free.rows // (free.mesh["data"] * free.mesh["fsdp"]) // free.micro_batches
    pins = f"mesh = axes({axes}), micro_batch = {local} sequences, remat = {free.remat}"
    assert lay_out(stage(folder, pins), LLAMA, 2, devices) == free


def test_refusal_carries_the_smallest_layout(folder: Path) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage(folder), LLAMA, 2, Devices(CHIPS["v5e"], 2, False))
    nearest = caught.value.nearest
    assert nearest.offload == ("optimizer",)
    assert nearest.memory["gradients"] == nearest.memory["parameters"]


@pytest.mark.parametrize(
    ("more", "attribute"),
    [
        ("mesh = axes(data = 16)", "mesh"),
        ("mesh = axes(context = 3)", "mesh"),
        ("micro_batch = 3 sequences", "micro_batch"),
    ],
)
def test_contradicting_pin_is_named(folder: Path, more: str, attribute: str) -> None:
    text = stage(folder)
    try:
        text = stage(folder, more)
    except AssertionError:
        pytest.skip("the checker says so already")
    with pytest.raises(NoLayoutError) as caught:
        lay_out(text, LLAMA, 2, Devices(CHIPS["v5p"], 8, False))
    assert caught.value.attribute == attribute


def test_optimizer_is_offloaded_when_nothing_else_fits(folder: Path) -> None:
    one, two = (Devices(CHIPS["h200"], count, False) for count in (1, 2))
    assert not lay_out(stage(folder), LLAMA, 2, two).offload
    alone = lay_out(stage(folder), LLAMA, 2, one)
    assert alone.offload == ("optimizer",)
    assert "optimizer" not in alone.memory
    link = "bringing moments from the host, and back"
    assert alone.times[link] == pytest.approx(16 * parameter_count(LLAMA) / CHIPS["h200"].host)
    with pytest.raises(DoesNotFitError):
        lay_out(stage(folder, "offload = none"), LLAMA, 2, one)
    small = replace(CHIPS["h200"], name="cpu")  # its memory is that of the host
    with pytest.raises(DoesNotFitError):
        lay_out(stage(folder), LLAMA, 2, Devices(small, 1, True))


def test_reference_can_be_offloaded(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    text = "kl = k3(0.1), offload = {}"
    layouts = {
        where: lay_out(policy(folder, text.format(where)), LLAMA, 2, devices)
        for where in ("none", "reference", "both")
    }
    assert layouts["both"].offload == ("optimizer", "reference")
    assert "reference" not in layouts["reference"].memory
    assert layouts["both"].total < layouts["reference"].total < layouts["none"].total
    for where in ("reference", "both"):
        with pytest.raises(NoLayoutError, match="no reference") as caught:
            lay_out(policy(folder, f"offload = {where}"), LLAMA, 2, devices)
        assert caught.value.attribute == "offload"
    lora = adapted(LLAMA, (Lora(),), "bf16")
    pinned = lay_out(stage(folder, "offload = optimizer"), lora, 2, devices)
    assert pinned.offload == ("optimizer",)  # as the spec says, however little it is
