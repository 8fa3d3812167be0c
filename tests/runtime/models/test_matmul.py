"""Products and their gradients against jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.runtime.models.matmul import product

CASES = {
    "wide": ((3, 5, 4), (4, 7), "btk,kn->btn", 1, 0),
    "narrow": ((3, 5, 7), (7, 2), "btk,kn->btn", 1, 0),
    "heads out": ((3, 5, 4), (4, 6, 2), "btk,knh->btnh", 1, 0),
    "heads in": ((3, 5, 6, 2), (6, 2, 4), "btnh,nhk->btk", 2, 0),
    "batched": ((2, 3, 5, 4), (2, 3, 4, 9), "abtk,abkn->abtn", 1, 2),
    "batched, narrow": ((2, 3, 5, 9), (2, 3, 9, 4), "abtk,abkn->abtn", 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case):
    x_shape, y_shape, axes, contracted, batched = CASES[case]
    x = jax.random.normal(jax.random.key(0), x_shape)
    y = jax.random.normal(jax.random.key(1), y_shape)

    def ours(x, y):
        return jnp.sum(jnp.sin(product(x, y, contracted, batched)))

    def plain(x, y):
        return jnp.sum(jnp.sin(jnp.einsum(axes, x, y)))

    value, gradients = jax.value_and_grad(ours, (0, 1))(x, y)
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1))(x, y)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_result_of_another_dtype_keeps_the_operands_gradients_dtype():
    x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    found = product(x, y, dtype=jnp.float32)
    assert found.dtype == jnp.float32
    gradients = jax.grad(lambda x, y: product(x, y, dtype=jnp.float32).sum(), (0, 1))(x, y)
    assert [each.dtype for each in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_heads_come_out_of_one_axis():
    """So that what a layer keeps of them is not padded where the last axis is short."""
    x, y = jnp.ones((3, 5, 4)), jnp.ones((4, 6, 2))
    made = jax.make_jaxpr(lambda x, y: jax.vjp(product, x, y))(x, y)
    dots = [line for line in str(made).splitlines() if "dot_general[" in line]
    assert dots
    assert all("f32[3,5,12]" in line for line in dots)


@pytest.mark.parametrize(("case", "waits"), [("batched, narrow", True), ("narrow", False)])
def test_weights_of_attention_are_let_go_before_their_gradient_is_there(case, waits):
    x_shape, y_shape, _, contracted, batched = CASES[case]
    x, y = jnp.ones(x_shape), jnp.ones(y_shape)
    made = jax.make_jaxpr(
        jax.grad(lambda x, y: product(x, y, contracted, batched).sum(), (0, 1))
    )(x, y)  # fmt: skip
    assert ("optimization_barrier" in str(made)) is waits
