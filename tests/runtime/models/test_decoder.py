"""The decoder against numpy in float64, and against itself: packed, cached, rematerialised."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime import reference
from tests.runtime.architectures import FAMILIES, LLAMA
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.runtime.models.decode_step import decode_step, decode_weights
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.kv_cache import KEYS, VALUES, Cache, empty_cache, insert
from tunelang.runtime.sharding import make_layout, shardings

LENGTH = 10
family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def made():
    """Decoders by family, made once, with every parameter moved off its initial value."""
    found = {}

    def make(name):
        if name not in found:
            graph, params = nnx.split(Decoder(FAMILIES[name], nnx.Rngs(0)))
            keys = iter(jax.random.split(jax.random.key(1), 100))
            params = jax.tree.map(
                lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params
            )
            found[name] = graph, params
        return found[name]

    return make


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 48)


def logits(graph, params, tokens, **given):
    def run(params, tokens, given):
        decoder = nnx.merge(graph, params)
        return decoder.logits(decoder(tokens, **given)[0])

    return jax.jit(run)(params, tokens, given)


@family
def test_equals_numpy(made, tokens, name):
    graph, params = made(name)
    found = logits(graph, params, tokens)
    expected = [reference.logits(FAMILIES[name], params, each) for each in np.asarray(tokens)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@family
def test_parameter_count(made, name):
    _, params = made(name)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameter_count(FAMILIES[name])


@family
def test_every_parameter_gets_a_gradient_at_the_start(tokens, name):
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
        each = array if path[0] == "blocks" else array[None]
        assert (np.abs(each).reshape(len(each), -1).max(1) > 1e-7).all(), path


@family
def test_packed_equals_padded(made, tokens, name):
    graph, params = made(name)
    lengths = (4, 3)
    segments = jnp.array([[1] * 4 + [2] * 3 + [0] * 3])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    packed = jnp.concatenate([tokens[0, :4], tokens[1, :3], jnp.zeros(3, jnp.int32)])[None]
    together = logits(graph, params, packed, segments=segments, positions=positions)[0]
    apart = logits(graph, params, tokens)
    np.testing.assert_allclose(together[:4], apart[0, : lengths[0]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[4:7], apart[1, : lengths[1]], rtol=1e-5, atol=1e-5)


@family
def test_cached_decoding_equals_the_whole_forward_pass(made, tokens, name):
    graph, params = made(name)
    whole = logits(graph, params, tokens)
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
    np.testing.assert_allclose(first[0], whole[0, 4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(first[1], whole[1, 1], rtol=1e-5, atol=1e-5)
    # Slot 0 holds the second prompt, slot 2 the first, slot 1 nothing.
    for offset in range(5):
        new = jnp.array([tokens[1, 2 + offset], 0, tokens[0, 5 + offset]])
        found, cache = step(params, new, cache)
        np.testing.assert_allclose(found[0], whole[1, 2 + offset], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[2], whole[0, 5 + offset], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [7, 5, 10])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "moe"])  # windows, no rope, experts
def test_continuations_of_a_shared_prompt_are_those_of_whole_sequences(made, name):
    """Hidden states and gradients, for prompts of several lengths in groups of two."""
    graph, params = made(name)
    a, rng = FAMILIES[name], np.random.default_rng(0)
    lengths, length = [4, 2, 3], 5
    prompts = jnp.asarray(rng.integers(0, a.vocabulary, (3, 4)))
    completions = jnp.asarray(rng.integers(0, a.vocabulary, (3, 2, length)))
    weights = rng.standard_normal((3, 2, length, a.width)).astype(np.float32)

    @jax.jit
    def shared(params):
        found = nnx.merge(graph, params).continuations(prompts, jnp.array(lengths), completions)
        return jnp.sum(found * weights), found

    @jax.jit
    def whole(params):
        decoder = nnx.merge(graph, params)
        rows = []
        for prompt, count, group in zip(prompts, lengths, completions, strict=True):
            for own in group:
                hidden, _ = decoder(jnp.concatenate([prompt[:count], own])[None])
                rows.append(hidden[0, count - 1 : -1])
        found = jnp.stack(rows).reshape(weights.shape)
        return jnp.sum(found * weights), found

    (_, found), gradient = jax.value_and_grad(shared, has_aux=True)(params)
    (_, expected), wanted = jax.value_and_grad(whole, has_aux=True)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_one_prompt_fills_many_slots_and_none_beyond_the_last(made, tokens):
    graph, params = made("qwen3")
    decoder = nnx.merge(graph, params)
    _, prompts = decoder.prefill(tokens[:, :4], jnp.array([4, 3]))
    cache = insert(
        empty_cache(FAMILIES["qwen3"], 3, 6, jnp.float32),
        prompts, jnp.array([1, 1, 0]), jnp.array([0, 2, 3]),
    )  # fmt: skip
    np.testing.assert_array_equal(cache.lengths, [3, 0, 3])
    for each in (*cache.keys, *cache.values):
        np.testing.assert_array_equal(each[0], each[2])
    with pytest.raises(ValueError, match="prompts of 4 tokens for slots of 3"):
        insert(empty_cache(FAMILIES["qwen3"], 1, 3, jnp.float32), prompts, *2 * [jnp.arange(1)])


def test_decoding_on_a_mesh_writes_the_cache_in_place(made, tokens):
    graph, params = made("qwen3")
    layout = make_layout(fsdp=2, tensor=2)
    places = shardings(params, layout)
    decoder = nnx.merge(graph, params)
    _, prompts = decoder.prefill(tokens[:, :4], jnp.array([4, 4]))
    cache = insert(
        empty_cache(decoder.architecture, 2, 512, jnp.float32), prompts, *2 * [jnp.arange(2)]
    )
    expected, _ = decode_step(decoder, tokens[:, 4], cache, decode_weights(decoder))
    held = Cache(
        tuple(layout.sharding(KEYS, each.shape) for each in cache.keys),
        tuple(layout.sharding(VALUES, each.shape) for each in cache.values),
        layout.sharding((None,), (2,)),
    )

    def step(params, tokens, cache):
        decoder = nnx.merge(graph, params)
        return decode_step(decoder, tokens, cache, decode_weights(decoder), layout=layout)

    program = jax.jit(
        step, in_shardings=(places, None, held), out_shardings=(None, held), donate_argnums=2
    )
    compiled = program.lower(params, tokens[:, 4], cache).compile()
    memory = compiled.memory_analysis()
    # A device has a quarter of the cache, and needs less than that beside it.
    share = sum(each.nbytes for each in (*cache.keys, *cache.values)) // 4
    assert memory.alias_size_in_bytes >= share
    assert memory.temp_size_in_bytes < share
    found, _ = program(params, tokens[:, 4], cache)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_remat_changes_nothing(made, tokens, name):
    graph, params = made(name)

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


def test_bfloat16_is_near_float32(made, tokens):
    graph, params = made("llama")
    half, _ = nnx.split(nnx.eval_shape(lambda: Decoder(LLAMA, nnx.Rngs(0), jnp.bfloat16)))
    found, _ = nnx.merge(half, params)(tokens)
    assert found.dtype == jnp.bfloat16
    expected, _ = nnx.merge(graph, params)(tokens)
    assert jnp.mean(jnp.abs(found - expected)) < 0.03 * jnp.mean(jnp.abs(expected))


def test_dropout_belongs_to_the_row():
    from dataclasses import replace

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
def test_layers_of_a_pattern_by_a_kernel_that_knows_its_window(remat):
    a = replace(FAMILIES["gemma3"], context=128, head_dim=64, window=40)
    graph, params = nnx.split(Decoder(a, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(0), (1, 128), 0, 48)

    def gradient(kernel):
        def loss(params):
            hidden, _ = nnx.merge(graph, params)(tokens, kernel=kernel, remat=remat)
            return jnp.sum(jnp.sin(jnp.arange(128.0))[:, None] * hidden), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (found, hidden), (expected, plain) = gradient("splash"), gradient("xla")
    np.testing.assert_allclose(hidden, plain, atol=1e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), found, expected
    )
