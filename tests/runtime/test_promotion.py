"""Models and losses do not rely on implicit promotion of ranks or dtypes.

Programs are traced, not compiled. Strictness is not on for all tests, since optax promotes the
count of steps when it corrects moments for their bias, and so do expected values in tests.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct

from tests.runtime.architectures import FAMILIES
from tests.runtime.models.test_lora import CHAINS, adapted
from tests.runtime.objectives.test_policy_gradient import POLICIES, preset_stage
from tunelang.dsl.vocabulary.training import K1, K2, K3, Masked, Truncated
from tunelang.runtime.models.decode_step import decode_step, decode_weights
from tunelang.runtime.models.kv_cache import empty_cache, insert
from tunelang.runtime.models.parameters import abstract_decoder
from tunelang.runtime.objectives.advantages import group_advantages
from tunelang.runtime.objectives.distill_losses import (
    Divergence,
    attention_transfer,
    divergence,
    feature_transfer,
    top_k,
)
from tunelang.runtime.objectives.gae import value_losses
from tunelang.runtime.objectives.policy_gradient import Completions, objective
from tunelang.runtime.objectives.preference_losses import bradley_terry
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.cross_entropy import LogitInputs, cross_entropy, token_scores


@pytest.fixture(autouse=True)
def forbid_promotion():
    """Turn implicit promotion into errors."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def floats(*shape, dtype=jnp.float32):
    """Describe an array."""
    return ShapeDtypeStruct(shape, dtype)


def trace_gradient(loss, *arrays):
    """Trace the gradient of a loss by its first argument."""
    jax.eval_shape(
        jax.grad(lambda first, *rest: jnp.sum(loss(first, *rest)), allow_int=True), *arrays
    )


def trace_decoder(architecture, dtype, layout):
    """Trace every program of a decoder."""
    graph, params = abstract_decoder(architecture, dtype)
    tokens = floats(4, 10, dtype=jnp.int32)

    def train(params, tokens):
        keys = jax.random.split(jax.random.key(0), 4)
        hidden, _ = nnx.merge(graph, params)(
            tokens, segments=jnp.ones_like(tokens), positions=jnp.zeros_like(tokens),
            dropout_keys=keys, layout=layout, remat="dots",
        )  # fmt: skip
        return hidden.astype(jnp.float32)

    def continue_prompts(params, tokens):
        ones = jnp.ones((4, 2, 8), jnp.int32)
        hidden = nnx.merge(graph, params).continuations(tokens, ones[:, 0, 0], ones, layout=layout)
        return hidden.astype(jnp.float32)

    def decode(params, tokens):
        decoder = nnx.merge(graph, params)
        _, prompts = decoder.prefill(tokens, jnp.ones(4, jnp.int32), layout=layout)
        slots = jnp.arange(4)
        cache = insert(empty_cache(architecture, 8, 16, dtype), prompts, slots, slots)
        weights = decode_weights(decoder)
        hidden, _ = decode_step(decoder, jnp.ones(8, jnp.int32), cache, weights, layout=layout)
        return decoder.logits(hidden, weights.head)

    def match_layers(params, tokens):
        decoder = nnx.merge(graph, params)
        return decoder.run_with_maps(tokens, jnp.ones_like(tokens), None, layout=layout)

    trace_gradient(train, params, tokens)
    trace_gradient(continue_prompts, params, tokens)
    jax.eval_shape(decode, params, tokens)
    jax.eval_shape(match_layers, params, tokens)
    jax.eval_shape(lambda params: nnx.merge(graph, params).merge_adapters().head_weight(), params)


@pytest.mark.parametrize(
    ("dtype", "mesh"), [(jnp.float32, {}), (jnp.bfloat16, {"fsdp": 2, "tensor": 2})]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_decoders_do_not_promote(name, mesh, dtype):
    trace_decoder(FAMILIES[name], dtype, make_layout(**mesh) if mesh else None)


@pytest.mark.parametrize("storage", ["f32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("chain", CHAINS)
def test_adapters_do_not_promote(chain, storage):
    architecture = adapted(FAMILIES["llama"], *CHAINS[chain], storage=storage)
    trace_decoder(architecture, jnp.bfloat16, None)


HIDDEN, HEAD = floats(8, 16, 8, dtype=jnp.bfloat16), floats(32, 8)
TARGETS, WEIGHTS = floats(8, 16, dtype=jnp.int32), floats(8, 16)
MESHES = pytest.mark.parametrize("mesh", [{}, {"data": 2, "context": 2, "tensor": 2}])


@MESHES
def test_cross_entropy_does_not_promote(mesh):
    layout = make_layout(**mesh) if mesh else None

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, chunk=4, cap=3.0, layout=layout)[0]

    def scores(hidden, head, targets):
        return sum(token_scores(hidden, head, targets, chunk=4, temperature=0.7, layout=layout))

    trace_gradient(loss, HIDDEN, HEAD, TARGETS, WEIGHTS)
    trace_gradient(scores, HIDDEN, HEAD, TARGETS)


@MESHES
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("k", [None, 5])
def test_divergences_do_not_promote(k, kind, mesh):
    layout = make_layout(**mesh) if mesh else None

    def loss(hidden, head, teacher_hidden, teacher_head, targets, weights):
        teacher = LogitInputs(teacher_hidden, teacher_head, 2.0)
        if k is not None:
            teacher = top_k(teacher, k=k, temperature=2.0, chunk=4, layout=layout)
        student, minimized = LogitInputs(hidden, head, 3.0), Divergence(kind, 0.3, 2.0, 0.3)
        return divergence(student, teacher, targets, weights, minimized, chunk=4, layout=layout)[0]

    trace_gradient(loss, HIDDEN, HEAD, floats(8, 16, 4), floats(32, 4), TARGETS, WEIGHTS)


def test_transfers_do_not_promote():
    mask = floats(8, 16, dtype=bool)
    for pooling in ("token", "mean", "last"):
        for distance in ("squared", "cosine"):
            trace_gradient(
                lambda *arrays, p=pooling, d=distance: feature_transfer(
                    *arrays, pooling=p, distance=d
                ),
                HIDDEN, floats(8, 16, 4), floats(8, 4), mask,
            )  # fmt: skip
    for distance in ("squared", "kl"):
        maps = floats(2, 3, 4, 5, 5), floats(2, 3, 2, 5, 5), floats(3, 5, 5, dtype=bool)
        trace_gradient(lambda *arrays, d=distance: attention_transfer(*arrays, distance=d), *maps)


@pytest.mark.parametrize("name", POLICIES)
def test_policy_losses_do_not_promote(name):
    array = floats(6, 7)
    batch = Completions(array, floats(6, 7, dtype=bool), *[array] * 5)
    choices = [{}] + [
        {"kl": kl(coefficient=0.1), "entropy": 0.1, "correction": correction(limit=2.0)}
        for kl in (K1, K2, K3)
        for correction in (Truncated, Masked)
    ]
    for choice in choices:
        policy = preset_stage(name, **choice)
        trace_gradient(
            lambda now, batch, policy=policy: objective(policy, batch._replace(now=now))[0],
            batch.now, batch,
        )  # fmt: skip


def test_advantages_values_and_scores_do_not_promote():
    for how in ("group_mean_std", "group_mean", "leave_one_out"):
        for dtype in (jnp.float32, jnp.int32):
            jax.eval_shape(
                lambda rewards, how=how: group_advantages(rewards, how), floats(3, 4, dtype=dtype)
            )
    array = floats(5)
    trace_gradient(lambda *arrays: value_losses(*arrays, 0.2)[0], array, array, array)
    trace_gradient(lambda *arrays: bradley_terry(*arrays, 0.1)[0], array, array, array)
