"""Decoders with adapters against the same decoders with adapters merged; what training changes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime.architectures import FAMILIES, LLAMA
from tests.runtime.training_helpers import ADAMW, assert_trees_close, random_batch
from tunelang.compiler.models.adapters import NoTargetError, adapter_of
from tunelang.compiler.models.architecture import plain
from tunelang.compiler.models.parameter_counts import adapter_parameters
from tunelang.dsl.vocabulary.training import Dora, Lora, Sampling
from tunelang.runtime.generation.engine import make_engine
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.parameters import abstract_decoder, split_trainable
from tunelang.runtime.models.quantization import dequantized, quantized
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.policy_step import score_program
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import abstract_state, random_state
from tunelang.runtime.training.train_step import train_step

TOKENS = np.random.default_rng(0).integers(0, 48, (3, 11), dtype=np.int32)


def adapted(architecture, *adapters, storage="f32"):
    """Add adapters to an architecture."""
    for kind in adapters:
        adapter = adapter_of(kind, architecture)
        architecture = replace(architecture, adapters=(*architecture.adapters, adapter))
    return replace(architecture, storage=storage)


def random_decoder(architecture, dtype=jnp.float32):
    """Make a decoder whose adapters are not zero."""
    decoder = Decoder(architecture, nnx.Rngs(1), dtype)
    graph, params = nnx.split(decoder)
    keys = iter(jax.random.split(jax.random.key(2), 200))

    def drawn(path, variable):
        if path[-1] not in ("b", "magnitude", "a"):
            return variable
        array = variable.get_value()
        noise = jax.random.normal(next(keys), array.shape)
        return variable.replace(1 + 0.3 * noise if path[-1] == "magnitude" else 0.3 * noise)

    return nnx.merge(graph, nnx.map_state(drawn, params))


def logits(decoder):
    """Compute the logits of `TOKENS`."""
    run = nnx.jit(lambda decoder, tokens: decoder.logits(decoder(tokens)[0]))
    return run(decoder, jnp.asarray(TOKENS))


LORA = Lora(rank=2, alpha=4.0)
ALL = Lora(rank=3, alpha=2.0, targets=("all", "embed"), rank_stabilized=True)
DORA = Dora(rank=2, alpha=3.0, targets=("q", "o", r"mlp\.(up|down)"))
CHAINS = {"lora": (LORA,), "everything": (ALL,), "dora": (DORA,), "stack": (LORA, DORA, ALL)}


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_fresh_adapter_does_not_change_logits(family):
    base = FAMILIES[family]
    graph, params = nnx.split(Decoder(base, nnx.Rngs(1)))
    decoder = Decoder(adapted(base, ALL, DORA), nnx.Rngs(1))
    flat = dict(nnx.to_flat_state(params))
    state = nnx.state(decoder)
    nnx.update(decoder, nnx.map_state(lambda path, variable: flat.get(path, variable), state))
    decoder.set_magnitudes()
    np.testing.assert_allclose(logits(decoder), logits(nnx.merge(graph, params)), atol=2e-5)


@pytest.mark.parametrize(
    ("family", "chain", "storage"),
    [
        ("llama", "everything", "f32"),  # a head of its own
        ("gemma", "everything", "f32"),  # a tied one
        ("llama", "dora", "nf4"),
        ("gemma", "stack", "f32"),
        ("llama", "stack", "int8"),
    ],
)
def test_merged_adapters_equal_live_ones(family, chain, storage):
    decoder = random_decoder(adapted(FAMILIES[family], *CHAINS[chain], storage=storage))
    merged = decoder.merge_adapters()
    assert merged.architecture == plain(decoder.architecture)
    np.testing.assert_allclose(logits(merged), logits(decoder), atol=2e-4)
    fresh = Decoder(plain(decoder.architecture), nnx.Rngs(0))
    shapes = [
        {
            path: (variable.shape, variable.dtype)
            for path, variable in nnx.to_flat_state(nnx.state(one))
        }
        for one in (merged, fresh)
    ]
    assert shapes[0] == shapes[1]
    # The decoder itself is as it was.
    assert decoder.blocks.attention.q.adapters


def train_adapters(architecture, config, spec=ADAMW):
    """Train two steps; returns parameters before, the state after, and metrics."""
    optimizer = build_optimizer(spec, 10)
    start = random_state(architecture, optimizer, config, 0)
    before = jax.device_get(start.decoder_params)
    step = train_step(architecture, optimizer, learning_rate(spec, 10), config)
    state, metrics = step(start, random_batch())
    return before, state, metrics


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_only_the_last_adapter_changes(storage):
    architecture = adapted(LLAMA, LORA, DORA, storage=storage)
    before, state, _ = train_adapters(architecture, StepConfig(layout=make_layout(), chunk=3))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == adapter_parameters(architecture, architecture.adapters[-1])
    # Two moments of each, and a count.
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count
    after = dict(nnx.to_flat_state(jax.device_get(state.decoder_params)))
    changed = {
        path for path, variable in nnx.to_flat_state(before)
        if not np.array_equal(variable.get_value(), after[path].get_value())
    }  # fmt: skip
    assert changed
    assert {path[-3:-1] for path in changed} == {("adapters", "1")}


def test_meshes_and_micro_batches_equal_one_device():
    architecture = adapted(LLAMA, with_dropout(LORA, 0.3), storage="nf4")
    _, expected, metrics = train_adapters(architecture, StepConfig(layout=make_layout(), chunk=3))
    for config in (
        StepConfig(layout=make_layout(), chunk=3, micro_batches=4, remat="full"),
        StepConfig(layout=make_layout(2, 2, 2), chunk=3, micro_batches=2),
    ):
        _, actual, actual_metrics = train_adapters(architecture, config)
        assert_trees_close(jax.device_get(actual.params), jax.device_get(expected.params))
        assert_trees_close(jax.device_get(actual_metrics), jax.device_get(metrics))
    without = adapted(LLAMA, LORA, storage="nf4")
    _, actual, actual_metrics = train_adapters(without, StepConfig(layout=make_layout(), chunk=3))
    assert abs(actual_metrics.loss[1] - metrics.loss[1]) > 1e-6  # dropout does something


def with_dropout(lora, rate):
    """Set the dropout of an adapter."""
    return lora.model_copy(update={"dropout": rate})


@pytest.mark.parametrize("storage", ["f32", "nf4"])
@pytest.mark.parametrize("chain", ["dora", "stack"])
def test_log_probs_of_the_sampler_equal_those_of_training(chain, storage):
    architecture = adapted(LLAMA, *CHAINS[chain], storage=storage)
    params = nnx.split(random_decoder(architecture))[1]
    engine = make_engine(architecture, slots=4, capacity=16)
    prompts = [Prompt(tokens, index) for index, tokens in enumerate([[1, 2, 3], [4, 5]])]
    sampler = Sampler(engine, Sampling(max_tokens=6), stop_ids=(), pad=0)
    episodes = sampler.sample(params, prompts, group=2, seed=1)
    score = score_program(architecture, StepConfig(layout=make_layout(), chunk=4), 1.0)
    padded = np.zeros((2, 3), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt.tokens)] = prompt.tokens
    tokens = episodes.tokens.reshape(2, 2, 6)
    scores = score(params, padded, np.array([3, 2], np.int32), tokens)
    np.testing.assert_allclose(np.asarray(scores).reshape(4, 6), episodes.log_probs, atol=2e-4)


def test_quantised_matrices_are_near_the_dense_ones():
    weight = jax.random.normal(jax.random.key(0), (2, 64, 6))
    for storage, bound in (("nf4", 0.1), ("int8", 0.01)):
        for inputs in (1, 2):
            codes, scales = quantized(weight, inputs, storage)
            restored = dequantized(codes, scales, inputs, jnp.float32)
            assert restored.shape == weight.shape
            assert float(jnp.abs(restored - weight).mean() / jnp.abs(weight).mean()) < bound
    # What is quantised already stays as it is.
    restored = dequantized(*quantized(weight, 2, "nf4"), 2, jnp.float32)
    restored_again = dequantized(*quantized(restored, 2, "nf4"), 2, jnp.float32)
    np.testing.assert_allclose(restored_again, restored, atol=1e-6)
    assert quantized(weight, 1, "nf4")[0].nbytes == weight.size // 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_step_on_quantised_weights_has_no_dense_copy(remat):
    """Neither among the step's arguments nor in what it keeps for the backward pass."""
    wide = replace(LLAMA, layers=16, width=128, mlp=512, head_dim=32)
    dense = 4 * parameters_of_blocks(wide)
    config = StepConfig(layout=make_layout(), remat=remat, chunk=8)
    optimizer = build_optimizer(ADAMW, 10)
    sizes = {}
    for storage in ("f32", "nf4"):
        architecture = adapted(wide, LORA, storage=storage)
        step = train_step(architecture, optimizer, learning_rate(ADAMW, 10), config)
        state = abstract_state(architecture, optimizer, config)
        memory = step.lower(state, random_batch(1, 2)).compile().memory_analysis()
        sizes[storage] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    assert sizes["f32"][0] - sizes["nf4"][0] > 0.85 * dense
    assert sizes["nf4"][1] < 0.6 * dense


def parameters_of_blocks(a):
    """Count the entries of all matrices of blocks."""
    return a.layers * (2 * a.width * (a.heads + a.kv_heads) * a.head_dim + 3 * a.width * a.mlp)


def test_targets_match_matrices():
    def matrices(*targets):
        return adapter_of(Lora(targets=targets), LLAMA).matrices

    assert matrices("q", "down") == ("blocks.attention.q", "blocks.mlp.down")
    assert matrices("head", "embed") == ("embedding", "head")
    assert matrices(r"mlp\.(up|gate)") == ("blocks.mlp.up", "blocks.mlp.gate")
    assert len(matrices("all")) == 7
    for architecture, target in ((LLAMA, "nothing"), (FAMILIES["gpt2"], "gate")):
        with pytest.raises(NoTargetError):
            adapter_of(Lora(targets=(target,)), architecture)
    with pytest.raises(NoTargetError):  # the head is the embedding
        adapter_of(Lora(targets=("head",)), FAMILIES["gemma"])
    with pytest.raises(NoTargetError):
        adapter_of(Dora(targets=("embed",)), LLAMA)


def test_scale_is_alpha_over_rank_or_its_root():
    assert adapter_of(Lora(rank=4, alpha=8.0), LLAMA).scale == 2
    assert adapter_of(Lora(rank=4, alpha=8.0, rank_stabilized=True), LLAMA).scale == 4


def test_split_trainable_takes_the_last_adapter():
    _, params = abstract_decoder(adapted(LLAMA, LORA, LORA), jnp.float32)
    trained, frozen = split_trainable(adapted(LLAMA, LORA, LORA), params)
    assert len(nnx.to_flat_state(trained)) == 14
    assert any("adapters" in path for path, _ in nnx.to_flat_state(frozen))
    assert not nnx.to_flat_state(split_trainable(LLAMA, abstract_decoder(LLAMA, jnp.float32)[1])[1])
