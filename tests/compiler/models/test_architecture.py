"""Counts that follow from an architecture, against published ones; and the way from a spec."""

from dataclasses import replace

import pytest

from tunelang.compiler.models.architecture import from_transformer
from tunelang.compiler.models.parameter_counts import (
    forward_flops,
    kv_bytes_per_token,
    matmul_parameters,
    parameter_count,
    train_flops,
)
from tunelang.compiler.models.presets import PRESETS
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import Reference


def transformer(**given):
    return models.Transformer(tokenizer=Reference(noun="tokenizer", name="t"), **given)


PUBLISHED = {
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
}
"""Parameters in the publishers' safetensors files."""


def test_every_preset_of_the_language_has_an_architecture():
    assert set(PRESETS) == set(models.PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_published_ones(name):
    assert parameter_count(PRESETS[name]) == PUBLISHED[name]


def test_flops():
    llama = PRESETS["llama-3.1-8b"]
    attention = 2 * 32 * 32 * 128 * (8192 + 1)
    assert matmul_parameters(llama) == parameter_count(llama) - 128_256 * 4096 - 65 * 4096
    assert forward_flops(llama, 8192) == 2 * matmul_parameters(llama) + attention
    assert train_flops(llama, 8192) == 3 * forward_flops(llama, 8192)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_flops_count_only_the_keys_inside_a_window(length, window):
    small = replace(
        PRESETS["qwen3-0.6b"], layers=3, window=window, pattern=("local", "global"), head_dim=2
    )
    keys = 2 * sum(min(t + 1, window) for t in range(length)) + sum(range(1, length + 1))
    expected = 4 * small.heads * small.head_dim * keys / length
    assert forward_flops(small, length) - 2 * matmul_parameters(small) == pytest.approx(expected)


def test_kv_bytes():
    assert kv_bytes_per_token(PRESETS["llama-3.1-8b"], 2) == 131_072


def test_omitted_sizes_follow_from_the_others():
    found = from_transformer(transformer(layers=2, width=64, heads=4), 100, PRESETS)
    assert (found.kv_heads, found.head_dim, found.mlp) == (4, 16, 192)
    assert (found.vocabulary, found.context, found.pattern) == (100, 1024, ("global",))
    plain = transformer(layers=2, width=64, heads=4, activation="gelu", window=8, logit_cap=30.0)
    found = from_transformer(plain, 100, PRESETS)
    assert (found.mlp, found.window, found.pattern, found.logit_cap) == (256, 8, ("local",), 30.0)


def test_stated_sizes_override_the_preset():
    found = from_transformer(transformer(preset="gemma-3-1b", layers=4, tied=False), 300, PRESETS)
    assert found == replace(PRESETS["gemma-3-1b"], vocabulary=300, layers=4, tied=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": 2, "width": 8}, "needs heads"),
        ({"layers": 2, "width": 8, "heads": 4, "kv_heads": 3}, "4 heads do not divide into 3"),
        ({"layers": 2, "width": 9, "heads": 3}, "head_dim is 3"),
        ({"layers": 2, "width": 2, "heads": 4}, "head_dim is 0"),
        (
            {"layers": 2, "width": 8, "heads": 4, "experts": models.Experts(count=2, active=4)},
            "4 of 2 experts",
        ),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        from_transformer(transformer(**given), 100, PRESETS)


@pytest.mark.parametrize("pattern", [(), ("local",)])
def test_impossible_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=r"pattern|window"):
        replace(PRESETS["qwen3-0.6b"], pattern=pattern)
