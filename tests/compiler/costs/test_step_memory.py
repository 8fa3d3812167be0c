"""The temporary memory of an update, against what compiled programs hold."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.layout.queries import LLAMA, lay_out, stage
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.models.presets import PRESETS
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.supervised_stages import Sft
from tunelang.dsl.vocabulary.training import Axes, Lora


def test_vector_memory_of_tpus_lowers_the_peak(folder: Path) -> None:
    with_it = CHIPS["v5e"]
    pinned = "remat = full, micro_batch = 1 sequences"
    small = replace(PRESETS["qwen3-0.6b"], context=2048)
    there, taken = (
        lay_out(stage(folder, pinned), small, 2, Devices(chip, 16, False)).memory
        for chip in (replace(with_it, vmem=0), with_it)
    )
    assert 0.2 * with_it.vmem < there["backward"] - taken["backward"] < 0.5 * with_it.vmem
    assert taken["loss"] < there["loss"]
    assert {**taken, "backward": 0, "loss": 0} == {**there, "backward": 0, "loss": 0}


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_frozen_bfloat16_weights_are_copied_on_7x(folder: Path, storage: Any) -> None:
    adapter = adapted(LLAMA, (Lora.unvalidated(rank=4),), storage)
    table = LLAMA.vocabulary * LLAMA.width
    tables = table * (1 if LLAMA.tied else 2)
    pinned = "remat = full, micro_batch = 1 sequences"
    plain, copying = (
        lay_out(stage(folder, pinned), adapter, 2, Devices(CHIPS[chip], 1, False)).memory
        for chip in ("v5p", "tpu7x")
    )
    # Heads of 128 have their tiles already.
    projected = LLAMA.layers * LLAMA.width * (LLAMA.heads + 2 * LLAMA.kv_heads) * LLAMA.head_dim
    blocks = parameter_count(LLAMA) - tables - projected
    count = 0 if storage == "nf4" else blocks
    copied = copying["copies of weights"] - plain["copies of weights"]
    assert copied == pytest.approx(2 * count, rel=0.02)
    # The adapters alone are cast.
    assert 0 < plain["copies of weights"] < parameter_count(LLAMA) / 100
    assert copying["loss"] - plain["loss"] == pytest.approx(2 * table, rel=0.02)


@pytest.mark.parametrize(
    ("model", "chip", "mesh", "rows", "length", "counted"),
    [
        ("llama-3.2-1b", "tpu7x", {"fsdp": 8}, 4, 2048, 11.0),
        ("gemma-3-1b", "v5p", {"fsdp": 2}, 2, 4096, 13.1),
        ("gemma-3-1b", "v5p", {"fsdp": 4, "tensor": 2}, 8, 4096, 33.11),
        ("qwen3-0.6b", "tpu7x", {"fsdp": 8}, 8, 2048, 21.0),
        ("qwen3-0.6b", "h200", {"fsdp": 4}, 4, 4096, 19.25),
        ("gemma-3-1b", "h200", {"fsdp": 8}, 4, 4096, 64.55),
    ],
)
def test_activations_equal_those_of_compiled_programs(
    model: str, chip: str, mesh: dict[str, int], rows: int, length: int, counted: float
) -> None:
    """`counted`: GiB of the arrays by layers that XLA hands to the backward pass."""
    a = replace(PRESETS[model], context=length)
    devices = math.prod(mesh.values())
    batch = Measure.unvalidated(value=rows * mesh["fsdp"], unit="sequences")
    asked = Sft.unvalidated(
        batch=batch, micro_batch=rows, remat="none", mesh=Axes.unvalidated(**mesh),
        optimizer=AdamW.unvalidated(lr=1e-4),
    )  # fmt: skip
    there = Devices(CHIPS[chip], devices, False)
    planned = lay_out(asked, a, 2, there)
    assert planned.memory["activations"] / 2**30 == pytest.approx(counted, rel=0.025)
