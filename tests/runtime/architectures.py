"""Small architectures, one for each combination of choices that a family of models makes."""

from tunelang.compiler.models.architecture import (
    Architecture,
    LinearScaling,
    Llama3Scaling,
    Mixture,
)

_SIZES = {
    "vocabulary": 48, "layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "head_dim": 8,
    "mlp": 32, "context": 32,
}  # fmt: skip

LLAMA = Architecture(
    **_SIZES, rope_base=500.0, tied=False, norm_epsilon=1e-5,
    rope_scaling=Llama3Scaling(factor=8.0, original_context=16),
)  # fmt: skip

FAMILIES = {
    "llama": LLAMA,
    "gemma": Architecture(
        **{**_SIZES, "kv_heads": 1}, activation="geglu", norm_unit_offset=True, embedding_scale=4.0
    ),
    "gemma2": Architecture(
        **_SIZES, activation="geglu", norm_unit_offset=True, norm_placement="both",
        pattern=("local", "global"), window=3, attention_cap=2.0, logit_cap=1.5, query_scale=0.3,
        embedding_scale=4.0,
    ),
    "gemma3": Architecture(
        **{**_SIZES, "layers": 5}, activation="geglu", norm_placement="both", qk_norm=True,
        pattern=("local", "local", "global"), window=4, rope_base=900.0, rope_local_base=50.0,
        rope_scaling=LinearScaling(factor=4.0),
    ),
    "gpt2": Architecture(
        **{**_SIZES, "kv_heads": 4}, activation="gelu", norm="layer", position="learned",
        qkv_bias=True, output_bias=True, mlp_bias=True,
    ),
    "qwen2": Architecture(**_SIZES, qkv_bias=True, tied=False),
    "qwen3": Architecture(**_SIZES, qk_norm=True),
    "olmo2": Architecture(**_SIZES, qk_norm=True, qk_norm_joint=True, norm_placement="post"),
    "moe": Architecture(**_SIZES, qk_norm=True, experts=Mixture(count=4, active=2, width=12)),
    "mistral": Architecture(**_SIZES, pattern=("local",), window=5, tied=False),
    "post": Architecture(**_SIZES, norm_placement="post", activation="relu"),
}  # fmt: skip
