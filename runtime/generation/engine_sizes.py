"""The sizes and the layout that a sampling engine is made for."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from tunelang.compiler.costs.rollout_costs import MOST_SLOTS, sampling_tensor
from tunelang.compiler.layout.hardware import chip_of
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.sharding import DECODE_RULES, Layout, make_layout, remesh_for_decoding

_ROUND = 32
"""Slots hold a multiple of so many tokens, so that stages share programs."""


def prompt_room(architecture: Architecture, sampling: Sampling) -> int:
    """Return the most tokens that a prompt may have: the context less a completion."""
    room = architecture.context - sampling.max_tokens
    return room if sampling.max_prompt is None else min(room, sampling.max_prompt)


def slot_capacity(architecture: Architecture, longest: int, max_tokens: int) -> int:
    """Return the tokens of a slot for prompts of up to `longest` tokens and their completions."""
    rounded = -(-(longest + max_tokens) // _ROUND) * _ROUND
    return min(rounded, architecture.context)


def slot_count(count: int, most: int = MOST_SLOTS) -> int:
    """Return how many of `count` completions to sample at once, over all devices."""
    return min(most, 1 << (count - 1).bit_length())


def sampling_layout(architecture: Architecture, dtype: DTypeLike, layout: Layout) -> Layout:
    """Return the layout in which to sample from a model that has one for training.

    Each group of devices has whole weights: gathered in every decode step they would take most of
    its time.
    """
    count, chip = layout.mesh.size, chip_of(layout.mesh.devices.flat[0].device_kind)
    if count == 1 or layout.rules is DECODE_RULES:
        return layout
    width = np.dtype(dtype).itemsize
    tensor = 1 if chip is None else sampling_tensor(architecture, width, count, chip.memory)
    return remesh_for_decoding(layout, count // tensor, tensor)


def sampling_layout_over(
    devices: Sequence[jax.Device], architecture: Architecture, dtype: DTypeLike
) -> Layout:
    """Return the layout over all devices of a model that is only sampled from, or scores."""
    return sampling_layout(architecture, dtype, make_layout(fsdp=len(devices), devices=devices))
