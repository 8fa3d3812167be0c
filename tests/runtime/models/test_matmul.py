"""Products and their gradients against `jnp.einsum`."""

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
def test_product_and_its_gradients_equal_einsum(case):
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
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_operands_dtype():
    x, y = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)
    result = product(x, y, dtype=jnp.float32)
    assert result.dtype == jnp.float32
    gradients = jax.grad(lambda x, y: product(x, y, dtype=jnp.float32).sum(), (0, 1))(x, y)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.bfloat16]


def test_heads_are_one_axis_of_the_product():
    """So that what a layer keeps of them is not padded where the last axis is short."""
    x, y = jnp.ones((3, 5, 4)), jnp.ones((4, 6, 2))
    jaxpr = jax.make_jaxpr(lambda x, y: jax.vjp(product, x, y))(x, y)
    dots = [line for line in str(jaxpr).splitlines() if "dot_general[" in line]
    assert dots
    assert all("f32[3,5,12]" in line for line in dots)


@pytest.mark.parametrize(("case", "waits"), [("batched, narrow", True), ("narrow", False)])
def test_batched_product_waits_before_its_gradients(case, waits):
    x_shape, y_shape, _, contracted, batched = CASES[case]
    x, y = jnp.ones(x_shape), jnp.ones(y_shape)
    jaxpr = jax.make_jaxpr(
        jax.grad(lambda x, y: product(x, y, contracted, batched).sum(), (0, 1))
    )(x, y)  # fmt: skip
    assert ("optimization_barrier" in str(jaxpr)) is waits
