"""The decoder against numpy in float64, and against itself: packed, cached, rematerialised."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime import reference
from tests.runtime.architectures import FAMILIES, LLAMA
from tests.runtime.decoders import small_decoder
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.runtime.models.decode_step import decode_step, decode_weights
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.kv_cache import KEYS, VALUES, Cache, empty_cache, insert
from tunelang.runtime.sharding import make_layout, shardings

LENGTH = 10
family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def tokens():
    """Two random sequences."""
    return jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 48)


def logits(graph, params, tokens, **layout_of_tokens):
    """Compute logits; `layout_of_tokens` has segments and positions."""

    def run(params, tokens, layout_of_tokens):
        decoder = nnx.merge(graph, params)
        return decoder.logits(decoder(tokens, **layout_of_tokens)[0])

    return jax.jit(run)(params, tokens, layout_of_tokens)


@family
def test_logits_equal_numpy(tokens, name):
    graph, params = small_decoder(FAMILIES[name])
    actual = logits(graph, params, tokens)
    expected = [reference.logits(FAMILIES[name], params, row) for row in np.asarray(tokens)]
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


@family
def test_parameter_count_equals_the_formula(name):
    _, params = small_decoder(FAMILIES[name])
    assert sum(x.size for x in jax.tree.leaves(params)) == parameter_count(FAMILIES[name])


@family
def test_initial_gradient_of_every_parameter_is_nonzero(tokens, name):
    graph, params = nnx.split(Decoder(FAMILIES[name], nnx.Rngs(0)))

    @jax.jit
    def gradient(params):
        def loss(params):
            decoder = nnx.merge(graph, params)
            logp = jax.nn.log_softmax(decoder.logits(decoder(tokens[:, :-1])[0]))
            return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], -1))

        return jax.grad(loss)(params)

    for path, leaf in nnx.to_flat_state(gradient(params)):
        array = np.asarray(leaf.get_value())
        # Adding the same vector to every key changes no softmax, unless rotations part them.
        if "learned" in FAMILIES[name].position and path[-2:] == ("k", "bias"):
            continue
        # Each layer of a stacked parameter by itself.
        by_layer = array if path[0] == "blocks" else array[None]
        assert (np.abs(by_layer).reshape(len(by_layer), -1).max(1) > 1e-7).all(), path


@family
def test_packed_logits_equal_padded_ones(tokens, name):
    graph, params = small_decoder(FAMILIES[name])
    lengths = (4, 3)
    segments = jnp.array([[1] * 4 + [2] * 3 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    packed = jnp.concatenate([tokens[0, :4], tokens[1, :3], jnp.zeros(3, jnp.int32)])[None]
    packed_logits = logits(graph, params, packed, segments=segments, positions=positions)[0]
    padded_logits = logits(graph, params, tokens)
    np.testing.assert_allclose(
        packed_logits[:4], padded_logits[0, : lengths[0]], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        packed_logits[4:7], padded_logits[1, : lengths[1]], rtol=1e-5, atol=1e-5
    )


@family
def test_cached_decoding_equals_the_full_forward_pass(tokens, name):
    graph, params = small_decoder(FAMILIES[name])
    expected = logits(graph, params, tokens)
    lengths = np.array([5, 2])

    @jax.jit
    def prefill(params, prompts, lengths):
        decoder = nnx.merge(graph, params)
        hidden, prompts = decoder.prefill(prompts, lengths)
        cache = empty_cache(decoder.architecture, 3, LENGTH, jnp.float32)
        return decoder.logits(hidden), insert(cache, prompts, jnp.array([1, 0]), jnp.array([0, 2]))

    @jax.jit
    def step(params, tokens, cache):
        decoder = nnx.merge(graph, params)
        hidden, cache = decode_step(decoder, tokens, cache, decode_weights(decoder))
        return decoder.logits(hidden), cache

    first, cache = prefill(params, tokens[:, :5], lengths)
    np.testing.assert_allclose(first[0], expected[0, 4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first[1], expected[1, 1], rtol=1e-5, atol=1e-5)
    # Slot 0 holds the second prompt, slot 2 the first, slot 1 nothing.
    for offset in range(5):
        new = jnp.array([tokens[1, 2 + offset], 0, tokens[0, 5 + offset]])
        actual, cache = step(params, new, cache)
        np.testing.assert_allclose(actual[0], expected[1, 2 + offset], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actual[2], expected[0, 5 + offset], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [7, 5, 10])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "moe"])  # windows, no rope, experts
def test_continuations_equal_full_sequences(name):
    """Hidden states and gradients, for prompts of several lengths in groups of two."""
    graph, params = small_decoder(FAMILIES[name])
    a, rng = FAMILIES[name], np.random.default_rng(0)
    lengths, length = [4, 2, 3], 5
    prompts = jnp.asarray(rng.integers(0, a.vocabulary, (3, 4)))
    completions = jnp.asarray(rng.integers(0, a.vocabulary, (3, 2, length)))
    weights = rng.standard_normal((3, 2, length, a.width)).astype(np.float32)

    @jax.jit
    def shared(params):
        hidden_states = nnx.merge(graph, params).continuations(
            prompts, jnp.array(lengths), completions
        )
        return jnp.sum(hidden_states * weights), hidden_states

    @jax.jit
    def full(params):
        decoder = nnx.merge(graph, params)
        rows = []
        for prompt, count, group in zip(prompts, lengths, completions, strict=True):
            for completion in group:
                hidden, _ = decoder(jnp.concatenate([prompt[:count], completion])[None])
                rows.append(hidden[0, count - 1 : -1])
        hidden_states = jnp.stack(rows).reshape(weights.shape)
        return jnp.sum(hidden_states * weights), hidden_states

    (_, hidden_states), gradient = jax.value_and_grad(shared, has_aux=True)(params)
    (_, expected), expected_gradient = jax.value_and_grad(full, has_aux=True)(params)
    np.testing.assert_allclose(hidden_states, expected, rtol=1e-4, atol=1e-5)
    for actual, wanted in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True
    ):
        np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=1e-4)


def test_insert_fills_slots_and_skips_those_out_of_range(tokens):
    graph, params = small_decoder(FAMILIES["qwen3"])
    decoder = nnx.merge(graph, params)
    _, prompts = decoder.prefill(tokens[:, :4], jnp.array([4, 3]))
    cache = insert(
        empty_cache(FAMILIES["qwen3"], 3, 6, jnp.float32),
        prompts, jnp.array([1, 1, 0]), jnp.array([0, 2, 3]),
    )  # fmt: skip
    np.testing.assert_array_equal(cache.lengths, [3, 0, 3])
    for array in (*cache.keys, *cache.values):
        np.testing.assert_array_equal(array[0], array[2])
    with pytest.raises(ValueError, match="prompts of 4 tokens for slots of 3"):
        insert(empty_cache(FAMILIES["qwen3"], 1, 3, jnp.float32), prompts, *2 * [jnp.arange(1)])


def test_decoding_on_a_mesh_updates_the_cache_in_place(tokens):
    graph, params = small_decoder(FAMILIES["qwen3"])
    layout = make_layout(fsdp=2, tensor=2)
    param_shardings = shardings(params, layout)
    decoder = nnx.merge(graph, params)
    _, prompts = decoder.prefill(tokens[:, :4], jnp.array([4, 4]))
    cache = insert(
        empty_cache(decoder.architecture, 2, 512, jnp.float32), prompts, *2 * [jnp.arange(2)]
    )
    expected, _ = decode_step(decoder, tokens[:, 4], cache, decode_weights(decoder))
    cache_shardings = Cache(
        tuple(layout.sharding(KEYS, array.shape) for array in cache.keys),
        tuple(layout.sharding(VALUES, array.shape) for array in cache.values),
        layout.sharding((None,), (2,)),
    )

    def step(params, tokens, cache):
        decoder = nnx.merge(graph, params)
        return decode_step(decoder, tokens, cache, decode_weights(decoder), layout=layout)

    program = jax.jit(
        step,
        in_shardings=(param_shardings, None, cache_shardings),
        out_shardings=(None, cache_shardings),
        donate_argnums=2,
    )
    compiled = program.lower(params, tokens[:, 4], cache).compile()
    memory = compiled.memory_analysis()
    # A device has a quarter of the cache, and needs less than that in addition.
    share = sum(array.nbytes for array in (*cache.keys, *cache.values)) // 4
    assert memory.alias_size_in_bytes >= share
    assert memory.temp_size_in_bytes < share
    actual, _ = program(params, tokens[:, 4], cache)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_remat_does_not_change_gradients(tokens, name):
    graph, params = small_decoder(FAMILIES[name])

    def gradient(remat):
        def loss(params):
            return jnp.sum(nnx.merge(graph, params)(tokens, remat=remat)[0] ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-4),
            gradient(remat), expected,
        )  # fmt: skip


def test_bfloat16_is_near_float32(tokens):
    graph, params = small_decoder(FAMILIES["llama"])
    half, _ = nnx.split(nnx.eval_shape(lambda: Decoder(LLAMA, nnx.Rngs(0), jnp.bfloat16)))
    actual, _ = nnx.merge(half, params)(tokens)
    assert actual.dtype == jnp.bfloat16
    expected, _ = nnx.merge(graph, params)(tokens)
    assert jnp.mean(jnp.abs(actual - expected)) < 0.03 * jnp.mean(jnp.abs(expected))


def test_dropout_depends_on_the_key_of_the_row():
    decoder = Decoder(replace(LLAMA, dropout=0.5), nnx.Rngs(0))
    tokens = jnp.tile(jnp.arange(6), (3, 1))
    keys = jax.random.split(jax.random.key(0), 3)
    dropped, _ = decoder(tokens, dropout_keys=keys)
    assert not np.allclose(dropped[0], dropped[1])
    assert not np.allclose(dropped[0], decoder(tokens)[0][0])
    np.testing.assert_allclose(
        decoder(tokens[:1], dropout_keys=keys[1:2])[0][0], dropped[1], atol=1e-5
    )


@pytest.mark.parametrize("remat", ["none", "full"])
def test_splash_kernel_equals_plain_attention_for_a_pattern(remat):
    a = replace(FAMILIES["gemma3"], context=128, head_dim=64, window=40)
    graph, params = nnx.split(Decoder(a, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(0), (1, 128), 0, 48)

    def gradient(kernel):
        def loss(params):
            hidden, _ = nnx.merge(graph, params)(tokens, kernel=kernel, remat=remat)
            return jnp.sum(jnp.sin(jnp.arange(128.0))[:, None] * hidden), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (actual, hidden), (expected, plain) = gradient("splash"), gradient("xla")
    np.testing.assert_allclose(hidden, plain, atol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), actual, expected
    )
