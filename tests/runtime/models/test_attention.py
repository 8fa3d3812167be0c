"""Attention kernels against plain JAX, and plain JAX against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.runtime.models.attention import (
    cached_attention,
    plain_attention,
    self_attention,
    visible,
)
from tunelang.runtime.models.fused_attention import attend_branches
from tunelang.runtime.sharding import make_layout

BATCH, LENGTH, HEAD_DIM = 2, 7, 4


def random_heads(heads, kv_heads):
    """Draw queries, keys and values."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (BATCH, LENGTH, count, HEAD_DIM))
        for key, count in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    )


def numpy_attention(query, key, value, mask, scale, cap):
    """Attend in float64, one query of one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    group = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        logits = scale * key[b, :, n // group] @ query[b, t, n]
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        weights = np.where(mask[b, t], np.exp(logits), 0)
        out[b, t, n] = weights / weights.sum() @ value[b, :, n // group]
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_self_attention_equals_numpy(heads, window, packed, cap):
    query, key, value = random_heads(*heads)
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3]])
    order = jnp.arange(LENGTH)
    mask = np.broadcast_to(visible(order, order, window), (BATCH, LENGTH, LENGTH))
    if packed:
        mask = mask & np.asarray(segments[:, :, None] == segments[:, None, :])
    actual = self_attention(
        query, key, value, segments=segments if packed else None, window=window, scale=0.7,
        cap=cap, kernel="xla",
    )  # fmt: skip
    plain = plain_attention(query, key, value, jnp.asarray(mask), scale=0.7, cap=cap)
    np.testing.assert_allclose(actual, plain, rtol=1e-5, atol=1e-6)
    expected = numpy_attention(query, key, value, mask, 0.7, cap)
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_cached_attention_ignores_unwritten_places(window):
    query, key, value = random_heads(4, 2)
    expected = self_attention(
        query, key, value, segments=None, window=window, scale=1.0, cap=None, kernel="xla"
    )
    places = jnp.array([3, 5])
    unwritten = jnp.arange(LENGTH)[None, :, None, None] > places[:, None, None, None]
    actual = cached_attention(
        query[jnp.arange(BATCH), places][:, None],
        jnp.where(unwritten, 1e4, key).transpose(0, 2, 3, 1),
        jnp.where(unwritten, 1e4, value).swapaxes(1, 2),
        places,
        window=window, scale=1.0, cap=None,
    )  # fmt: skip
    np.testing.assert_allclose(
        actual[:, 0], expected[jnp.arange(BATCH), places], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_gradients_equal_those_of_jax(heads):
    query, key, value = random_heads(*heads)
    settings = {"scale": 0.7, "segments": None, "window": 3, "cap": None, "kernel": "xla"}

    def ours(*operands):
        return jnp.sum(jnp.sin(self_attention(*operands, **settings)))

    def jaxs(*operands):
        return jnp.sum(
            jnp.sin(
                jax.nn.dot_product_attention(
                    *operands, scale=0.7, is_causal=True, local_window_size=(2, 0)
                )
            )
        )

    for actual, expected in zip(
        jax.grad(ours, (0, 1, 2))(query, key, value),
        jax.grad(jaxs, (0, 1, 2))(query, key, value),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 2), (2, 1)])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (50, None), (None, 2.0)])
def test_splash_kernel_equals_plain_attention(heads, window, cap):
    """Also over a mesh, and with gradients. The kernel is interpreted here, compiled on a TPU."""
    keys = jax.random.split(jax.random.key(0), 3)
    operands = [
        jax.random.normal(key, (2, 256, count, 64))
        for key, count in zip(keys, (heads[0], heads[1], heads[1]), strict=True)
    ]
    segments = jnp.repeat(jnp.array([[1, 2, 0]]), jnp.array([100, 120, 36]), axis=1)
    segments = jnp.broadcast_to(segments, (2, 256))
    weights = jnp.sin(jnp.arange(256.0))[None, :, None, None] * (segments > 0)[..., None, None]

    def total(kernel, layout):
        def run(*operands):
            output = self_attention(
                *operands, segments=segments, window=window, scale=0.3, cap=cap, kernel=kernel,
                layout=layout,
            )  # fmt: skip
            return jnp.sum(weights * output), output

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*operands)

    (_, plain), expected = total("xla", None)
    split = make_layout(data=2, context=2, tensor=2)
    for layout in (None, make_layout(data=2, tensor=2), split):
        (_, output), gradients = total("splash", layout)
        np.testing.assert_allclose(output, plain, atol=1e-4)
        for actual, wanted in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(actual, wanted, atol=2e-4)


def test_branches_attend_in_one_call():
    """The GPU's path for branches of a sweep, with the plain kernel in place of cuDNN's."""
    keys = jax.random.split(jax.random.key(1), 3)
    query, key, value = (
        jax.random.normal(key, (3, 2, 8, heads, 4))
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2, 2]])
    rows = []

    def plain(query, key, value, segments):
        rows.append(len(query))
        return self_attention(
            query, key, value, segments=segments, window=None, scale=0.5, cap=None, kernel="xla"
        )

    def in_one_call(query, key, value, segments):
        return attend_branches(query, key, value, segments, plain)

    results = {}
    for name, attend in (("plain", plain), ("in one call", in_one_call)):

        def total(*operands, attend=attend):
            return jnp.sum(jnp.sin(attend(*operands)))

        rows.clear()
        gradient = jax.vmap(jax.value_and_grad(total, (0, 1, 2)), (0, 0, 0, None))
        results[name] = jax.jit(gradient)(query, key, value, segments)
        assert max(rows) == (6 if name == "in one call" else 2)
    for actual, expected in zip(*map(jax.tree.leaves, results.values()), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-5)
