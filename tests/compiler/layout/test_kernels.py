"""The choice of the attention kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.layout.queries import LLAMA, lay_out, stage
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.layout_query import (
    NoLayoutError,
)


@pytest.mark.parametrize(
    ("chip", "dtype_bytes", "change", "kernel"),
    [
        ("v5p", 2, {}, "splash"),
        ("v5p", 2, {"context": 1000}, "xla"),
        ("h200", 2, {}, "cudnn"),
        ("h200", 4, {}, "xla"),
        ("h200", 2, {"attention_cap": 50.0}, "xla"),
        ("h200", 2, {"head_dim": 256}, "xla"),
    ],
)
def test_auto_takes_the_fastest_kernel_that_can_be_used(
    folder: Path, chip: str, dtype_bytes: int, change: dict[str, Any], kernel: str
) -> None:
    devices = Devices(CHIPS[chip], 64, False)
    architecture = replace(LLAMA, **change)
    pinned = stage(folder, "remat = dots, micro_batch = 1 sequence, mesh = axes(fsdp = 64)")
    found = lay_out(pinned, architecture, dtype_bytes, devices)
    assert found.kernel == kernel
    asked = lay_out(pinned, architecture, dtype_bytes, devices, attention="xla")
    assert asked.kernel == "xla"
    assert asked.total >= found.total  # which holds the logits of attention
    if kernel == "xla":
        wrong = "splash" if chip == "v5p" else "cudnn"
        with pytest.raises(NoLayoutError, match=f"the kernel `{wrong}`"):
            lay_out(pinned, architecture, dtype_bytes, devices, attention=wrong)
