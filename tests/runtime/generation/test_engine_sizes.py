"""Prompt lengths, capacities and slots of engines."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.runtime.architectures import LLAMA
from tunelang.compiler.costs.rollout_costs import MOST_SLOTS
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation.engine_sizes import (
    prompt_room,
    sampling_layout,
    sampling_layout_over,
    slot_capacity,
    slot_count,
)
from tunelang.runtime.sharding import DECODE_RULES, make_layout


@pytest.mark.parametrize(("max_prompt", "room"), [(None, 25), (5, 5), (100, 25)])
def test_prompt_room_is_context_less_completion_or_the_stated_limit(max_prompt, room):
    assert LLAMA.context == 32
    assert prompt_room(LLAMA, Sampling(max_tokens=7, max_prompt=max_prompt)) == room


def test_slot_capacity_is_rounded_up_to_at_most_the_context():
    wide = replace(LLAMA, context=100)
    assert [slot_capacity(wide, longest, 10) for longest in (1, 22, 23, 80)] == [32, 32, 64, 96]
    assert slot_capacity(wide, 90, 10) == 100


def test_slot_count_is_a_power_of_two_up_to_a_limit():
    assert [slot_count(count) for count in (1, 3, 8, 9)] == [1, 4, 8, 16]
    assert slot_count(10**6) == MOST_SLOTS
    assert slot_count(10**6, most=5) == 5


def test_sampling_layout_gives_each_device_whole_weights_and_is_idempotent():
    layout = make_layout(fsdp=8)
    decoding = sampling_layout(LLAMA, jnp.float32, layout)
    assert decoding.rules is DECODE_RULES
    assert decoding.mesh.shape["data"] == 8
    assert sampling_layout(LLAMA, jnp.float32, decoding) == decoding
    assert sampling_layout_over(jax.devices(), LLAMA, jnp.float32) == decoding
    single_device = make_layout(devices=jax.devices()[:1])
    assert sampling_layout(LLAMA, jnp.float32, single_device) is single_device
