"""Memory, FLOPs and seconds of a step, by what the stage trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.compiler.layout.queries import LLAMA, lay_out, policy, stage
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.models.adapters import adapted
from tunelang.dsl.vocabulary.training import Lora


def test_separate_critic_takes_as_much_memory_as_the_policy(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    apart, shared = (
        lay_out(policy(folder, f"critic = critic(trunk = {trunk})", "ppo"), LLAMA, 2, devices)
        for trunk in ("separate", "shared")
    )
    held = sum(apart.memory[name] for name in ("parameters", "optimizer", "gradients"))
    assert apart.memory["critic"] == pytest.approx(held, rel=0.2)
    assert "critic" not in shared.memory
    assert 1.5 < apart.flops / shared.flops < 2


def test_prompt_counts_once_for_its_group(folder: Path) -> None:
    """The same number of completions costs less for few prompts than for many."""
    devices = Devices(CHIPS["v5p"], 1, False)
    rollout = "rollout = sampling(max_tokens = 64, max_prompt = 1024)"

    def laid_out(batch: int, group: int) -> float:
        text = policy(folder, rollout)
        text = text.model_copy(update={"batch": batch, "group": group})
        return lay_out(text, replace(LLAMA, layers=2), 2, devices).flops

    assert laid_out(32, 8) < 0.5 * laid_out(128, 2)


def test_skipped_groups_favour_micro_batches(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 1, False)
    small = replace(LLAMA, layers=2, width=256, mlp=512, vocabulary=1000, context=512)
    assert lay_out(policy(folder), small, 2, devices).micro_batches == 4
    assert lay_out(policy(folder, "refill = true"), small, 2, devices).micro_batches == 1


def test_fused_branches_share_frozen_weights(folder: Path) -> None:
    """The branches gather them once, which takes most of the time of a few tokens."""
    devices = Devices(CHIPS["v5e"], 64, False, (8, 8))
    few = stage(folder, "mesh = axes(fsdp = 64)")
    lora = adapted(replace(LLAMA, context=256), (Lora.unvalidated(rank=2),), "bf16")
    alone, together = (lay_out(few, lora, 2, devices, branches=count) for count in (1, 4))
    gathering = "gathering parameters over `fsdp`"
    assert alone.times[gathering] > alone.times["computing"]
    assert together.times[gathering] < 1.1 * alone.times[gathering]
    assert together.times["computing"] == pytest.approx(4 * alone.times["computing"])
    assert together.seconds < 0.6 * 4 * alone.seconds
    assert together.memory["optimizer"] == pytest.approx(4 * alone.memory["optimizer"], rel=1e-6)
    assert together.memory["parameters"] < 1.2 * alone.memory["parameters"]
    full = [lay_out(few, replace(LLAMA, context=256), 2, devices, branches=n) for n in (1, 2)]
    assert full[1].memory["parameters"] == pytest.approx(2 * full[0].memory["parameters"])
    assert full[1].seconds == pytest.approx(2 * full[0].seconds, rel=0.05)


def test_adapters_take_less_memory_than_full_training(folder: Path) -> None:
    devices = Devices(CHIPS["h200"], 8, False)
    pinned = stage(folder, "mesh = axes(fsdp = 8)")
    sizes = {
        storage: lay_out(pinned, adapted(LLAMA, (Lora(),), storage), 2, devices)
        for storage in ("bf16", "nf4")
    }
    full = lay_out(pinned, LLAMA, 2, devices)
    assert sizes["nf4"].memory["parameters"] < sizes["bf16"].memory["parameters"]
    assert sizes["bf16"].memory["optimizer"] < full.memory["optimizer"] / 30
    assert sizes["bf16"].flops < full.flops
