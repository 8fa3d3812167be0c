"""Mixtures of experts against a sum over experts in float64, and on meshes against one device."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime.architectures import FAMILIES
from tests.runtime.training_helpers import assert_trees_close, train
from tunelang.compiler.models.architecture import Mixture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.moe import MixtureOfExperts, balance_loss
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.step_config import StepConfig

MOE = FAMILIES["moe"]
X = jax.random.normal(jax.random.key(0), (8, 6, MOE.width))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("active", [1, 3])
def test_layer_equals_a_sum_over_experts(active, normalised):
    mixture = Mixture(count=5, active=active, width=12, normalised=normalised)
    layer = MixtureOfExperts(MOE, mixture, nnx.Rngs(3))
    output, (picked, probabilities) = layer(X)
    x = np.asarray(X, np.float64)
    logits = x @ np.asarray(layer.router[...], np.float64)
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(probabilities, share, atol=1e-6)
    largest = np.argsort(-share, -1)[..., :active]
    expected = np.zeros_like(x)
    gate, up, down = (
        np.asarray(weight_array[...], np.float64)
        for weight_array in (layer.experts.gate, layer.experts.up, layer.experts.down)
    )
    for token in np.ndindex(x.shape[:2]):
        chosen = largest[token]
        weights = share[token][chosen]
        weights = weights / weights.sum() if normalised else weights
        for weight, e in zip(weights, chosen, strict=True):
            h = x[token] @ gate[e]
            expected[token] += weight * ((h / (1 + np.exp(-h)) * (x[token] @ up[e])) @ down[e])
        assert set(np.flatnonzero(picked[token])) == set(chosen)
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_balance_loss_is_1_when_even_and_count_when_not():
    even = jnp.full((1, 2, 4, 4), 0.25)
    chosen = jax.nn.one_hot(jnp.arange(8).reshape(2, 4) % 4, 4)[None]
    counted = jnp.ones((2, 4), bool)
    assert float(balance_loss(chosen, even, counted)) == pytest.approx(1.0)
    one = jnp.zeros_like(even).at[..., 2].set(1.0)
    assert float(balance_loss(one, one, counted)) == pytest.approx(4.0)
    # Padding does not count.
    half = counted.at[1].set(False)
    mixed = jnp.concatenate([even[:, :1], one[:, :1]], axis=1)
    picked = jnp.concatenate([chosen[:, :1], one[:, :1]], axis=1)
    assert float(balance_loss(picked, mixed, half)) == pytest.approx(1.0)


def test_training_on_meshes_equals_one_device():
    expected = train(StepConfig(layout=make_layout(), chunk=3), MOE)
    assert sum(leaf.size for leaf in jax.tree.leaves(expected[0])) == parameter_count(MOE)
    for mesh in ({"expert": 4}, {"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}):
        actual = train(StepConfig(layout=make_layout(**mesh), chunk=3), MOE)
        assert_trees_close(actual, expected, 1e-4)
    # In micro-batches each part is balanced by itself.
    parts = StepConfig(layout=make_layout(expert=2), chunk=3, micro_batches=2, remat="full")
    actual = train(parts, MOE)
    np.testing.assert_allclose(actual[1].loss, expected[1].loss, rtol=1e-2)


def test_router_has_a_gradient_of_the_balance_loss():
    heavy = replace(MOE, experts=replace(MOE.experts, balance=10.0))
    decoder = Decoder(heavy, nnx.Rngs(0))
    graph, params = nnx.split(decoder)

    def loss(params):
        _, routed = nnx.merge(graph, params)(jnp.arange(24).reshape(2, 12) % 40)
        return balance_loss(*routed, jnp.ones((2, 12), bool))

    gradient = jax.grad(loss)(params)
    assert float(jnp.abs(gradient["blocks"]["mlp"]["router"][...]).max()) > 0
