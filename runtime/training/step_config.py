"""The static settings of a training step."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from tunelang.compiler.layout.stage_layout import Remat
from tunelang.runtime.models.attention import Kernel
from tunelang.runtime.sharding import Layout


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings that a training program is compiled for, besides the architecture."""

    layout: Layout
    dtype: DTypeLike = jnp.float32
    """The dtype of activations."""
    micro_batches: int = 1
    """Parts of a batch that are run one after another."""
    remat: Remat = "none"
    kernel: Kernel = "xla"
    chunk: int = 128
    """Tokens of a sequence whose logits are in memory at once."""
    seed: int = 0
    """The seed of the dropout."""
    offloaded: bool = False
    """Whether the moments of the optimizer lie in the memory of the host."""
    branches: int = 1
    """States that are trained side by side on the same batches: their changing parts have a leading
    axis then, and so have metrics."""

    @property
    def attends(self) -> Kernel:
        """The kernel as models are to use it."""
        return "cudnn_vmap" if self.branches > 1 and self.kernel == "cudnn" else self.kernel
