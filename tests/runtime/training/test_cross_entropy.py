"""Losses in chunks against losses of full logits, and the collectives of their programs."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests.runtime.training_helpers import assert_trees_close, loop_bodies
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.cross_entropy import cross_entropy, token_logprobs

BATCH, LENGTH, WIDTH, VOCAB = 8, 10, 6, 24


@pytest.fixture(scope="module")
def logit_arrays():
    """Hidden states, head, targets and weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH)),
        jax.random.normal(keys[1], (VOCAB, WIDTH)),
        jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB),
        jax.random.uniform(keys[3], (BATCH, LENGTH)),
    )


def full_logprobs(hidden, head, targets, cap, temperature=1.0):
    """Compute log-probabilities of targets from the logits of every token at once."""
    logits = hidden @ head.T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logp = jax.nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 4, 5, 10, 64])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}])
def test_cross_entropy_equals_full_logits(logit_arrays, chunk, cap, mesh):
    hidden, head, targets, weights = logit_arrays
    layout = make_layout(**mesh) if mesh else None

    def chunked(hidden, head, weights):
        total, count = cross_entropy(
            hidden, head, targets, weights, chunk=chunk, cap=cap, layout=layout
        )
        return total * 1.7, count

    def unchunked(hidden, head, weights):
        logp = full_logprobs(hidden, head, targets, cap)
        return -jnp.sum(weights * logp) * 1.7, jnp.sum(weights)

    options = {"argnums": (0, 1, 2), "has_aux": True}
    actual = jax.jit(jax.value_and_grad(chunked, **options))(hidden, head, weights)
    assert_trees_close(
        actual, jax.jit(jax.value_and_grad(unchunked, **options))(hidden, head, weights)
    )
    assert_trees_close(jax.jit(chunked)(hidden, head, weights), actual[0])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_full_logits(logit_arrays, temperature):
    hidden, head, targets, weights = logit_arrays

    def chunked(hidden, head):
        log_probs = token_logprobs(
            hidden, head, targets, chunk=4, cap=1.5, temperature=temperature,
            layout=make_layout(fsdp=2, context=2),
        )  # fmt: skip
        return jnp.sum(jnp.square(log_probs) * weights), log_probs

    def unchunked(hidden, head):
        log_probs = full_logprobs(hidden, head, targets, 1.5, temperature)
        return jnp.sum(jnp.square(log_probs) * weights), log_probs

    options = {"argnums": (0, 1), "has_aux": True}
    assert_trees_close(
        jax.jit(jax.value_and_grad(chunked, **options))(hidden, head),
        jax.jit(jax.value_and_grad(unchunked, **options))(hidden, head),
    )


def test_tokens_without_weight_give_zero_loss(logit_arrays):
    hidden, head, targets, _ = logit_arrays
    total, count = cross_entropy(hidden, head, targets, jnp.zeros((BATCH, LENGTH)), chunk=4)
    assert (total, count) == (0.0, 0.0)


def test_loop_over_chunks_has_no_collectives(logit_arrays):
    """The head is gathered before the chunks, and its gradient exchanged after them."""
    hidden, head, targets, weights = logit_arrays
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


def test_gradient_of_the_head_waits_behind_one_barrier(logit_arrays):
    """It is ready when that of the hidden states is; one of a frozen head is not made."""
    hidden, head, targets, weights = logit_arrays
    layout = make_layout(fsdp=8)

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=2, layout=layout)[0]

    trained, frozen = (
        str(jax.make_jaxpr(jax.grad(loss, which))(hidden, head)) for which in ((0, 1), 0)
    )
    assert trained.count("optimization_barrier") == 1
    assert "optimization_barrier" not in frozen
