"""Adapters: what they add, what of them is trained, merged as live, on quantised weights too."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime.architectures import FAMILIES, LLAMA
from tests.runtime.training.test_train_step import ADAMW, make_batch, same
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
    for each in adapters:
        adapter = adapter_of(each, architecture)
        architecture = replace(architecture, adapters=(*architecture.adapters, adapter))
    return replace(architecture, storage=storage)


def random_decoder(architecture, dtype=jnp.float32):
    """A decoder whose adapters do something."""
    decoder = Decoder(architecture, nnx.Rngs(1), dtype)
    graph, params = nnx.split(decoder)
    keys = iter(jax.random.split(jax.random.key(2), 200))

    def drawn(path, each):
        if path[-1] not in ("b", "magnitude", "a"):
            return each
        array = each.get_value()
        noise = jax.random.normal(next(keys), array.shape)
        return each.replace(1 + 0.3 * noise if path[-1] == "magnitude" else 0.3 * noise)

    return nnx.merge(graph, nnx.map_state(drawn, params))


def logits(decoder):
    run = nnx.jit(lambda decoder, tokens: decoder.logits(decoder(tokens)[0]))
    return run(decoder, jnp.asarray(TOKENS))


LORA = Lora(rank=2, alpha=4.0)
ALL = Lora(rank=3, alpha=2.0, targets=("all", "embed"), rank_stabilized=True)
DORA = Dora(rank=2, alpha=3.0, targets=("q", "o", r"mlp\.(up|down)"))
CHAINS = {"lora": (LORA,), "everything": (ALL,), "dora": (DORA,), "stack": (LORA, DORA, ALL)}


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_fresh_adapter_changes_nothing(family):
    base = FAMILIES[family]
    graph, params = nnx.split(Decoder(base, nnx.Rngs(1)))
    decoder = Decoder(adapted(base, ALL, DORA), nnx.Rngs(1))
    flat = dict(nnx.to_flat_state(params))
    own = nnx.state(decoder)
    nnx.update(decoder, nnx.map_state(lambda path, each: flat.get(path, each), own))
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
def test_merged_is_live(family, chain, storage):
    decoder = random_decoder(adapted(FAMILIES[family], *CHAINS[chain], storage=storage))
    merged = decoder.merge_adapters()
    assert merged.architecture == plain(decoder.architecture)
    np.testing.assert_allclose(logits(merged), logits(decoder), atol=2e-4)
    fresh = Decoder(plain(decoder.architecture), nnx.Rngs(0))
    shapes = [
        {path: (each.shape, each.dtype) for path, each in nnx.to_flat_state(nnx.state(one))}
        for one in (merged, fresh)
    ]
    assert shapes[0] == shapes[1]
    # The decoder itself is as it was.
    assert decoder.blocks.attention.q.adapters


def trained(architecture, program, spec=ADAMW):
    optimizer = build_optimizer(spec, 10)
    start = random_state(architecture, optimizer, program, 0)
    before = jax.device_get(start.decoder_params)
    step = train_step(architecture, optimizer, learning_rate(spec, 10), program)
    state, metrics = step(start, make_batch())
    return before, state, metrics


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_only_the_last_adapter_is_trained(storage):
    architecture = adapted(LLAMA, LORA, DORA, storage=storage)
    before, state, _ = trained(architecture, StepConfig(layout=make_layout(), chunk=3))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == adapter_parameters(architecture, architecture.adapters[-1])
    # Two moments of each, and a count.
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count
    after = dict(nnx.to_flat_state(jax.device_get(state.decoder_params)))
    changed = {
        path for path, each in nnx.to_flat_state(before)
        if not np.array_equal(each.get_value(), after[path].get_value())
    }  # fmt: skip
    assert changed
    assert {path[-3:-1] for path in changed} == {("adapters", "1")}


def test_the_same_on_any_mesh_and_in_micro_batches():
    architecture = adapted(LLAMA, replace_dropout(LORA, 0.3), storage="nf4")
    _, whole, metrics = trained(architecture, StepConfig(layout=make_layout(), chunk=3))
    for program in (
        StepConfig(layout=make_layout(), chunk=3, micro_batches=4, remat="full"),
        StepConfig(layout=make_layout(2, 2, 2), chunk=3, micro_batches=2),
    ):
        _, found, other = trained(architecture, program)
        same(jax.device_get(found.params), jax.device_get(whole.params))
        same(jax.device_get(other), jax.device_get(metrics))
    without = adapted(LLAMA, LORA, storage="nf4")
    _, found, other = trained(without, StepConfig(layout=make_layout(), chunk=3))
    assert abs(other.loss[1] - metrics.loss[1]) > 1e-6  # dropout does something


def replace_dropout(lora, rate):
    return lora.model_copy(update={"dropout": rate})


@pytest.mark.parametrize("storage", ["f32", "nf4"])
@pytest.mark.parametrize("chain", ["dora", "stack"])
def test_samplers_use_them(chain, storage):
    """What the sampler says of its tokens is what training finds for the same parameters."""
    architecture = adapted(LLAMA, *CHAINS[chain], storage=storage)
    params = nnx.split(random_decoder(architecture))[1]
    engine = make_engine(architecture, slots=4, capacity=16)
    prompts = [Prompt(tokens, at) for at, tokens in enumerate([[1, 2, 3], [4, 5]])]
    sampler = Sampler(engine, Sampling(max_tokens=6), stop_ids=(), pad=0)
    found = sampler.sample(params, prompts, group=2, seed=1)
    score = score_program(architecture, StepConfig(layout=make_layout(), chunk=4), 1.0)
    padded = np.zeros((2, 3), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt.tokens)] = prompt.tokens
    tokens = found.tokens.reshape(2, 2, 6)
    scores = score(params, padded, np.array([3, 2], np.int32), tokens)
    np.testing.assert_allclose(np.asarray(scores).reshape(4, 6), found.log_probs, atol=2e-4)


def test_quantised_matrices():
    weight = jax.random.normal(jax.random.key(0), (2, 64, 6))
    for storage, bound in (("nf4", 0.1), ("int8", 0.01)):
        for inputs in (1, 2):
            codes, scales = quantized(weight, inputs, storage)
            back = dequantized(codes, scales, inputs, jnp.float32)
            assert back.shape == weight.shape
            assert float(jnp.abs(back - weight).mean() / jnp.abs(weight).mean()) < bound
    # What is quantised already stays as it is.
    back = dequantized(*quantized(weight, 2, "nf4"), 2, jnp.float32)
    again = dequantized(*quantized(back, 2, "nf4"), 2, jnp.float32)
    np.testing.assert_allclose(again, back, atol=1e-6)
    assert quantized(weight, 1, "nf4")[0].nbytes == weight.size // 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_quantised_stage_holds_no_dense_copy(remat):
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
        memory = step.lower(state, make_batch(1, 2)).compile().memory_analysis()
        sizes[storage] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    assert sizes["f32"][0] - sizes["nf4"][0] > 0.85 * dense
    assert sizes["nf4"][1] < 0.6 * dense


def parameters_of_blocks(a):
    return a.layers * (2 * a.width * (a.heads + a.kv_heads) * a.head_dim + 3 * a.width * a.mlp)


def test_targets():
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


def test_scales():
    assert adapter_of(Lora(rank=4, alpha=8.0), LLAMA).scale == 2
    assert adapter_of(Lora(rank=4, alpha=8.0, rank_stabilized=True), LLAMA).scale == 4


def test_divided():
    _, params = abstract_decoder(adapted(LLAMA, LORA, LORA), jnp.float32)
    chosen, rest = split_trainable(adapted(LLAMA, LORA, LORA), params)
    assert len(nnx.to_flat_state(chosen)) == 14
    assert any("adapters" in path for path, _ in nnx.to_flat_state(rest))
    assert not nnx.to_flat_state(split_trainable(LLAMA, abstract_decoder(LLAMA, jnp.float32)[1])[1])
