"""Logits, weights in and out against `transformers`, on small random models that it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tunelang.compiler.families import architecture_of
from tunelang.runtime import weights
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.train import abstract_decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ODD = {**SIZES, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
ONE_KEY = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 10}
NO_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
CAPS = {
    "sliding_window": 5, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 2.0,
}  # fmt: skip
LOCAL, GLOBAL = "sliding_attention", "full_attention"
GEMMA3 = {"sliding_window": 5, "query_pre_attn_scalar": 10}

MOE = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "norm_topk_prob": True,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3}),
    "llama, tied": ("LlamaConfig", {**ONE_KEY, "tie_word_embeddings": True}),
    "llama, biases": ("LlamaConfig", {**ODD, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 5}),
    "mistral, no window": ("MistralConfig", {**ODD, "sliding_window": None}),
    "mistral, one key": ("MistralConfig", {**ONE_KEY, "sliding_window": 64}),
    "qwen 2": ("Qwen2Config", NO_HEAD_DIM),
    "qwen 2, tied": (
        "Qwen2Config",
        {**NO_HEAD_DIM, "num_hidden_layers": 3, "tie_word_embeddings": True},
    ),
    "qwen 2, windows": (
        "Qwen2Config",
        {**NO_HEAD_DIM, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen 3": ("Qwen3Config", SIZES),
    "qwen 3, tied": ("Qwen3Config", {**ODD, "tie_word_embeddings": True}),
    "qwen 3, biases": ("Qwen3Config", {**ONE_KEY, "attention_bias": True}),
    "qwen 3 moe": ("Qwen3MoeConfig", {**SIZES, **MOE}),
    "qwen 3 moe, odd": ("Qwen3MoeConfig", {**ODD, **MOE, "norm_topk_prob": False}),
    "qwen 3 moe, one key": (
        "Qwen3MoeConfig",
        {**ONE_KEY, **MOE, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "olmo 2": ("Olmo2Config", NO_HEAD_DIM),
    "olmo 2, tied": (
        "Olmo2Config",
        {**NO_HEAD_DIM, "num_key_value_heads": 6, "tie_word_embeddings": True},
    ),
    "olmo 2, odd": (
        "Olmo2Config",
        {**NO_HEAD_DIM, "num_hidden_layers": 3, "num_attention_heads": 3,
         "num_key_value_heads": 3, "rope_parameters": LLAMA3 | {"factor": 2.0}},
    ),
    "phi 3": ("Phi3Config", {**NO_HEAD_DIM, "sliding_window": 5}),
    "phi 3, tied": (
        "Phi3Config", {**NO_HEAD_DIM, "sliding_window": None, "tie_word_embeddings": True}
    ),
    "phi 3, odd": (
        "Phi3Config", {**NO_HEAD_DIM, "num_attention_heads": 3, "num_key_value_heads": 3}
    ),
    "gemma": ("GemmaConfig", SIZES),
    "gemma, one key": ("GemmaConfig", ONE_KEY),
    "gemma, odd": ("GemmaConfig", ODD),
    "gemma 2": ("Gemma2Config", {**SIZES, **CAPS}),
    "gemma 2, odd": ("Gemma2Config", {**ODD, **CAPS}),
    "gemma 2, one key": ("Gemma2Config", {**ONE_KEY, **CAPS}),
    "gemma 3": (
        "Gemma3TextConfig",
        {**SIZES, **GEMMA3, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL]},
    ),
    "gemma 3, scaled": (
        "Gemma3TextConfig",
        {
            **ODD, **GEMMA3, "layer_types": [LOCAL, GLOBAL, LOCAL],
            "rope_parameters": {
                GLOBAL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
                LOCAL: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma 3, global": ("Gemma3TextConfig", {**ONE_KEY, **GEMMA3, "layer_types": [GLOBAL]}),
}  # fmt: skip


def saved(case: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save a random model; returns tokens and its logits of them."""
    name, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    around_one = "gemma" not in case
    tokens = torch.randint(3, config.vocab_size, (2, 23))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            drawn = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2)
            is_scale = parameter.ndim == 1 and "bias" not in parameter_name
            parameter.copy_(drawn + (1.0 if is_scale and around_one else 0.0))
        logits = model(input_ids=tokens).logits
    # Some in one file, some in several with an index.
    model.save_pretrained(folder, max_shard_size="30KB" if "odd" in case else "5GB")
    return tokens.numpy(), logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_weights(case: str, tmp_path: Path) -> None:
    tokens, expected = saved(case, tmp_path)
    config = weights.configuration(tmp_path)
    architecture = architecture_of(config)
    params = weights.load(tmp_path, architecture, make_layout())
    graph, _ = abstract_decoder(architecture, jnp.float32)
    decoder = nnx.merge(graph, params)
    found = decoder.logits(decoder(jnp.asarray(tokens)))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    back = tmp_path / "back"
    back.mkdir()
    (back / "config.json").write_text(json.dumps(config))
    save_file(dict(weights.tensors(params, config)), back / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager")
    with torch.no_grad():
        logits = again.float()(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_array_equal(logits, expected)
