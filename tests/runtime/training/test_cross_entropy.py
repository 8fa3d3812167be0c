"""Chunked losses against whole logits, and the collectives that they compile to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.cross_entropy import cross_entropy, token_logprobs

BATCH, LENGTH, WIDTH, VOCAB = 8, 10, 6, 24


@pytest.fixture(scope="module")
def given():
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH)),
        jax.random.normal(keys[1], (VOCAB, WIDTH)),
        jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB),
        jax.random.uniform(keys[3], (BATCH, LENGTH)),
    )


def whole_logprobs(hidden, head, targets, cap, temperature=1.0):
    logits = hidden @ head.T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logp = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


def close(found, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), found, expected
    )


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 64])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}])
def test_cross_entropy_equals_whole(given, chunk, cap, mesh):
    hidden, head, targets, weights = given
    layout = make_layout(**mesh) if mesh else None

    def chunked(hidden, head, weights):
        total, count = cross_entropy(
            hidden, head, targets, weights, chunk=chunk, cap=cap, layout=layout
        )
        return total * 1.7, count

    def whole(hidden, head, weights):
        logp = whole_logprobs(hidden, head, targets, cap)
        return -jnp.sum(weights * logp) * 1.7, jnp.sum(weights)

    every = {"argnums": (0, 1, 2), "has_aux": True}
    found = jax.jit(jax.value_and_grad(chunked, **every))(hidden, head, weights)
    close(found, jax.jit(jax.value_and_grad(whole, **every))(hidden, head, weights))
    close(jax.jit(chunked)(hidden, head, weights), found[0])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_whole(given, temperature):
    hidden, head, targets, weights = given

    def chunked(hidden, head):
        found = token_logprobs(
            hidden, head, targets, chunk=4, cap=1.5, temperature=temperature,
            layout=make_layout(fsdp=2, context=2),
        )  # fmt: skip
        return jnp.sum(jnp.square(found) * weights), found

    def whole(hidden, head):
        found = whole_logprobs(hidden, head, targets, 1.5, temperature)
        return jnp.sum(jnp.square(found) * weights), found

    every = {"argnums": (0, 1), "has_aux": True}
    close(
        jax.jit(jax.value_and_grad(chunked, **every))(hidden, head),
        jax.jit(jax.value_and_grad(whole, **every))(hidden, head),
    )


def test_a_token_without_weight_counts_nothing(given):
    hidden, head, targets, _ = given
    total, count = cross_entropy(hidden, head, targets, jnp.zeros((BATCH, LENGTH)), chunk=4)
    assert (total, count) == (0.0, 0.0)


def loop_bodies(hlo):
    """The text of each computation that a loop of the program repeats."""
    blocks = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", hlo, re.S | re.M))
    return [blocks[name] for name in re.findall(r"body=%?([\w.\-]+)", hlo)]


def test_no_device_talks_to_another_inside_the_scan(given):
    """The head is gathered before the chunks, and its gradient exchanged after them."""
    hidden, head, targets, weights = given
    layout = make_layout(fsdp=8)
    head = jnp.pad(head, ((0, 0), (0, 2)))
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, 2)))

    def loss(hidden, head, targets, weights):
        return cross_entropy(hidden, head, targets, weights, chunk=2, layout=layout)[0]

    rows = layout.sharding(("batch", None, None), hidden.shape)
    flat = layout.sharding(("batch", None), targets.shape)
    columns = layout.sharding(("vocab", "embed"), head.shape)
    program = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        in_shardings=(rows, columns, flat, flat), out_shardings=(None, (rows, columns)),
    ).lower(hidden, head, targets, weights).compile()  # fmt: skip
    hlo = program.as_text()
    assert re.search("all-gather|all-reduce|reduce-scatter", hlo)
    bodies = loop_bodies(hlo)
    assert bodies
    for body in bodies:
        assert not re.search("all-gather|all-reduce|reduce-scatter|all-to-all", body)


def test_the_gradient_of_a_head_is_scattered_before_the_layers_go_back(given):
    """It is ready when that of the hidden states is; one of a frozen head is not made."""
    hidden, head, targets, weights = given
    layout = make_layout(fsdp=8)

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=2, layout=layout)[0]

    trained, frozen = (
        str(jax.make_jaxpr(jax.grad(loss, which))(hidden, head)) for which in ((0, 1), 0)
    )
    assert trained.count("optimization_barrier") == 1
    assert "optimization_barrier" not in frozen
