"""The choice of the attention kernel."""

from __future__ import annotations

from typing import Literal

from tunelang.compiler.layout.layout_query import NoLayoutError
from tunelang.compiler.layout.stage_layout import Kernel
from tunelang.compiler.models.architecture import Architecture

SPLASH_BLOCK = 128
"""Tokens that the kernel for TPUs works on at once, at least."""
_FASTEST_FIRST: tuple[Kernel, ...] = ("splash", "cudnn", "xla")


def attention_kernel(
    declared: Kernel | Literal["auto"],
    a: Architecture,
    length: int,
    dtype_bytes: int,
    platform: str,
) -> Kernel:
    """Return the kernel of attention: the one that the model declares, or for `auto` the fastest.

    Raises `NoLayoutError` where the declared one cannot be used.
    """
    obstacles: dict[Kernel, str] = {
        "splash": _splash_obstacle(length, platform),
        "cudnn": _cudnn_obstacle(a, dtype_bytes, platform),
        "xla": "",
    }
    if declared == "auto":
        return next(kernel for kernel in _FASTEST_FIRST if not obstacles[kernel])
    if obstacles[declared]:
        raise NoLayoutError("attention", f"the kernel `{declared}`: {obstacles[declared]}")
    return declared


def _splash_obstacle(length: int, platform: str) -> str:
    """Return why the kernel for TPUs cannot be used; empty where it can."""
    if platform != "tpu":
        return "it is for TPUs"
    if length % SPLASH_BLOCK:
        return f"{length} tokens are no multiple of {SPLASH_BLOCK}"
    return ""


def _cudnn_obstacle(a: Architecture, dtype_bytes: int, platform: str) -> str:
    """Return why cuDNN's kernel cannot be used; empty where it can."""
    if platform != "gpu":
        return "it is for GPUs"
    if dtype_bytes != 2:
        return "it is for bf16"
    if a.attention_cap is not None:
        return "it has no capped logits"
    if a.head_dim % 8 or a.head_dim > 128:
        return f"it has no head_dim of {a.head_dim}"
    return ""
