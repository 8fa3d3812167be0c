"""The sizes of well-known models: rows of `Architecture`, one for each preset of the language.

Each is what the model's published `config.json` says; the tests hold the parameter counts against
those that the publishers state.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tunelang.compiler.models.architecture import Architecture, Llama3Scaling

_GEMMA_2B = Architecture(
    vocabulary=256_000, layers=18, width=2048, heads=8, kv_heads=1, head_dim=256, mlp=16_384,
    context=8192, activation="geglu", norm_unit_offset=True, embedding_scale=2048**0.5,
)  # fmt: skip

_GEMMA_3_1B = Architecture(
    vocabulary=262_144, layers=26, width=1152, heads=4, kv_heads=1, head_dim=256, mlp=6912,
    context=32_768, activation="geglu", norm_placement="both", norm_unit_offset=True, qk_norm=True,
    rope_base=1e6, rope_local_base=1e4, window=512, pattern=("local",) * 5 + ("global",),
    embedding_scale=1152**0.5,
)  # fmt: skip

_LLAMA_32_1B = Architecture(
    vocabulary=128_256, layers=16, width=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192,
    context=131_072, norm_epsilon=1e-5, rope_base=5e5, rope_scaling=Llama3Scaling(factor=32.0),
)  # fmt: skip

_LLAMA_31_8B = Architecture(
    vocabulary=128_256, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, mlp=14_336,
    context=131_072, norm_epsilon=1e-5, rope_base=5e5, rope_scaling=Llama3Scaling(factor=8.0),
    tied=False,
)  # fmt: skip

_LLAMA_31_70B = Architecture(
    vocabulary=128_256, layers=80, width=8192, heads=64, kv_heads=8, head_dim=128, mlp=28_672,
    context=131_072, norm_epsilon=1e-5, rope_base=5e5, rope_scaling=Llama3Scaling(factor=8.0),
    tied=False,
)  # fmt: skip

_QWEN3_06B = Architecture(
    vocabulary=151_936, layers=28, width=1024, heads=16, kv_heads=8, head_dim=128, mlp=3072,
    context=40_960, rope_base=1e6, qk_norm=True,
)  # fmt: skip

PRESETS: Mapping[str, Architecture] = MappingProxyType(
    {
        "gemma-2b": _GEMMA_2B,
        "gemma-3-1b": _GEMMA_3_1B,
        "llama-3.2-1b": _LLAMA_32_1B,
        "llama-3.1-8b": _LLAMA_31_8B,
        "llama-3.1-70b": _LLAMA_31_70B,
        "qwen3-0.6b": _QWEN3_06B,
    }
)
"""Preset of the language -> architecture, with the publisher's vocabulary."""

PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        "google/gemma-2b": "gemma-2b",
        "google/gemma-2b-it": "gemma-2b",
        "google/gemma-3-1b-pt": "gemma-3-1b",
        "google/gemma-3-1b-it": "gemma-3-1b",
        "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
        "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
        "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
        "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
        "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
        "Qwen/Qwen3-0.6B": "qwen3-0.6b",
        "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
    }
)
"""Id on the hub -> preset, so that plans for them need no network."""
