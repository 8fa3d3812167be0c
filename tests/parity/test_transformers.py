"""Logits, gradients and written weights against `transformers`, on small random models of its."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tunelang.compiler.models.families import architecture_of
from tunelang.runtime.loading import pretrained
from tunelang.runtime.loading.stored_tensors import tensors
from tunelang.runtime.models.decode_step import decode_step, decode_weights
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.kv_cache import empty_cache, insert
from tunelang.runtime.models.model_folder import read_config
from tunelang.runtime.models.parameters import abstract_decoder
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.objective import Batch, summed_loss
from tunelang.runtime.training.step_config import StepConfig

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
    "llama 2": ("LlamaConfig", {**NO_HEAD_DIM, "num_key_value_heads": 6}),
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


FAMILY = (
    "llama 3", "mistral", "qwen 2", "qwen 3", "qwen 3 moe", "olmo 2", "phi 3", "gemma", "gemma 2",
    "gemma 3",
)  # fmt: skip
"""One configuration of each family."""


def save_random_model(case: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save a random model; returns tokens and their logits."""
    tokens, logits, _ = save_model(case, folder)
    return tokens, logits


def save_model(case: str, folder: Path) -> tuple[np.ndarray, np.ndarray, Any]:
    """Save a random model; returns tokens, their logits and the model."""
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
    return tokens.numpy(), logits.numpy(), model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_written_weights_equal_transformers(case: str, tmp_path: Path) -> None:
    tokens, expected = save_random_model(case, tmp_path)
    config = read_config(tmp_path)
    architecture = architecture_of(config)
    params = pretrained.load(tmp_path, architecture, make_layout())
    graph, _ = abstract_decoder(architecture, jnp.float32)
    decoder = nnx.merge(graph, params)
    actual = decoder.logits(decoder(jnp.asarray(tokens))[0])
    np.testing.assert_allclose(actual, expected, atol=1e-4)

    written = tmp_path / "back"
    written.mkdir()
    (written / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors(params, config)), written / "model.safetensors")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        written, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = reloaded.float()(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_array_equal(logits, expected)


def open_decoder(folder: Path, dtype: Any = jnp.float32) -> tuple[Decoder, Any, Any]:
    """Load the decoder of a folder; returns it, its graph and its parameters."""
    architecture = architecture_of(read_config(folder))
    params = pretrained.load(folder, architecture, make_layout())
    graph, _ = abstract_decoder(architecture, dtype)
    return nnx.merge(graph, params), graph, params


@pytest.mark.parametrize("case", FAMILY)
def test_padded_packed_and_cached_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    """Compute padded rows, packed rows, and token after token with a cache."""
    tokens, expected, theirs = save_model(case, tmp_path)
    decoder, graph, params = open_decoder(tmp_path)
    run = nnx.jit(
        lambda d, *inputs: d.logits(d(inputs[0], segments=inputs[1], positions=inputs[2])[0])
    )
    lengths = (17, 9)

    # Padded at the right, as `transformers` does it.
    mask = np.arange(23) < np.array(lengths)[:, None]
    with torch.no_grad():
        padded = theirs(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))
        ).logits.numpy()
    places = np.broadcast_to(np.arange(23, dtype=np.int32), (2, 23))
    actual = run(decoder, tokens.astype(np.int32), mask.astype(np.int32), places)
    np.testing.assert_allclose(np.asarray(actual)[mask], padded[mask], atol=1e-4)
    np.testing.assert_allclose(np.asarray(actual)[mask], expected[mask], atol=1e-4)

    # Both rows in one sequence.
    packed = np.zeros((1, 30), np.int32)
    segments, positions = np.zeros_like(packed), np.zeros_like(packed)
    start = 0
    for row, length in enumerate(lengths):
        packed[0, start : start + length] = tokens[row, :length]
        segments[0, start : start + length] = row + 1
        positions[0, start : start + length] = np.arange(length)
        start += length
    actual = np.asarray(run(decoder, packed, segments, positions))[0]
    np.testing.assert_allclose(actual[:17], expected[0, :17], atol=1e-4)
    np.testing.assert_allclose(actual[17:26], expected[1, :9], atol=1e-4)

    # A prompt, then token by token into a cache.
    prompt = 6
    hidden, prompts = decoder.prefill(
        jnp.asarray(tokens[:, :prompt], jnp.int32), jnp.full(2, prompt, jnp.int32)
    )
    cache = empty_cache(decoder.architecture, 2, 24, jnp.float32)
    cache = insert(cache, prompts, jnp.arange(2), jnp.arange(2))

    @jax.jit
    def step(params: Any, token: Any, cache: Any) -> Any:
        decoder = nnx.merge(graph, params)
        hidden, cache = decode_step(decoder, token, cache, decode_weights(decoder))
        return decoder.logits(hidden), cache

    np.testing.assert_allclose(decoder.logits(hidden), expected[:, prompt - 1], atol=1e-4)
    for place in range(prompt, 23):
        logits, cache = step(params, jnp.asarray(tokens[:, place], jnp.int32), cache)
        np.testing.assert_allclose(logits, expected[:, place], atol=1e-4)


@pytest.mark.parametrize("case", ["llama 3", "gemma 2", "qwen 3 moe", "phi 3"])
def test_gradients_equal_transformers(case: str, tmp_path: Path) -> None:
    tokens, _, theirs = save_model(case, tmp_path)
    labels = torch.tensor(tokens)
    theirs(input_ids=labels, labels=labels).loss.backward()
    expected = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    _, graph, params = open_decoder(tmp_path)
    batch = Batch(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool))
    config = StepConfig(layout=make_layout(), chunk=8)
    count = tokens.shape[0] * (tokens.shape[1] - 1)

    def loss(params: Any) -> Any:
        decoder = nnx.merge(graph, params)
        return summed_loss(decoder, batch, None, config, balanced=False) / count

    gradient = jax.jit(jax.grad(loss))(params)
    gradients = dict(tensors(gradient, read_config(tmp_path)))
    for name, array in gradients.items():
        if name not in expected:  # experts lie together in the model, and apart in its file
            head, expert, tail = name.partition(".experts.")[0], *name.split(".")[-3:-1]
            if tail == "down_proj":
                wanted = expected[f"{head}.experts.down_proj"][int(expert)]
            else:
                gate_and_up = expected[f"{head}.experts.gate_up_proj"][int(expert)]
                wanted = np.split(gate_and_up, 2)[tail == "up_proj"]
        else:
            wanted = expected[name]
        scale = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(array / scale, wanted / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", FAMILY)
def test_bfloat16_error_is_that_of_transformers(case: str, tmp_path: Path) -> None:
    """Both are compared with the model in float32."""
    tokens, expected, theirs = save_model(case, tmp_path)
    theirs.config._experts_implementation = "eager"  # its grouped product wants even sizes
    with torch.no_grad():
        rounded = theirs.bfloat16()(input_ids=torch.tensor(tokens)).logits.float().numpy()
    decoder, *_ = open_decoder(tmp_path, jnp.bfloat16)
    actual = np.asarray(nnx.jit(lambda d, t: d.logits(d(t)[0]))(decoder, tokens.astype(np.int32)))
    our_error, their_error = (
        np.sqrt(np.mean((logits - expected) ** 2)) for logits in (actual, rounded)
    )
    # Both errors are partly random.
    assert our_error <= their_error * 1.1, f"{our_error} against {their_error}"
