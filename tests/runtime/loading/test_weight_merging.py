"""Merged weights against the papers' equations in float64, and against PEFT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.architectures import FAMILIES
from tunelang.dsl.vocabulary.training import Dare, Linear, Slerp, Ties
from tunelang.runtime.loading.weight_merging import merge_weights
from tunelang.runtime.models.parameters import abstract_decoder, arrays_by_path
from tunelang.runtime.sharding import make_layout, shardings

METHODS = {
    "linear": Linear.unvalidated(weights=(2.0, 1.0)),
    "slerp": Slerp.unvalidated(share=0.3),
    "ties": Ties.unvalidated(density=0.4, weights=(1.0, 0.5), scale=0.7),
    "dare": Dare.unvalidated(density=0.4),
}


def random_model(seed: int, dtype=jnp.float32):
    """Draw a small model; leaves below `blocks` have three layers of different magnitudes."""
    random = np.random.default_rng(seed)
    layers = random.normal(0, 1, (3, 8, 2, 6)) * np.array([1, 10, 0.1]).reshape(3, 1, 1, 1)
    table = random.normal(0, 1, (10, 8))
    return {
        "blocks": {"weight": jnp.asarray(layers, dtype)},
        "embedding": jnp.asarray(table, dtype),
    }


BASE, ONE, OTHER, THIRD = (random_model(seed) for seed in range(4))


def tensors_by_layer(model) -> dict[str, np.ndarray]:
    """List the tensors of a model in float64, with a name for each layer."""
    tensors = {}
    for name, leaf in arrays_by_path(model).items():
        array = np.asarray(leaf, np.float64)
        if name.startswith("blocks."):
            tensors |= {f"{name}.{layer}": tensor for layer, tensor in enumerate(array)}
        else:
            tensors[name] = array
    return tensors


def assert_merged(merged, expected: dict[str, np.ndarray], tolerance: float = 2e-6) -> None:
    """Assert that a merged model has the expected tensors, relative to their largest entry."""
    merged = tensors_by_layer(merged)
    assert merged.keys() == expected.keys()
    for name, wanted in expected.items():
        bound = tolerance * np.abs(wanted).max()
        np.testing.assert_allclose(merged[name], wanted, rtol=0, atol=bound, err_msg=name)


def merge_by_layer(combine, *models) -> dict[str, np.ndarray]:
    """Apply a function to the same tensor of each model, layer by layer."""
    layers = [tensors_by_layer(model) for model in models]
    return {name: combine(*(model[name] for model in layers)) for name in layers[0]}


@pytest.mark.parametrize("weights", [None, (2.0, 1.0, -0.5)])
def test_linear_equals_the_weighted_mean(weights):
    merged = merge_weights(Linear.unvalidated(weights=weights), [ONE, OTHER, THIRD], None, 0)
    assert_merged(
        merged, merge_by_layer(lambda *all: np.average(all, 0, weights), ONE, OTHER, THIRD)
    )


def spherical_arc(one, other, share=0.3):
    """Shoemake 1985, section 3.3, of the directions; the lengths of the ends stay as they are."""
    cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * one + np.sin(share * angle) * other) / np.sin(angle)


def test_slerp_equals_the_arc():
    assert_merged(
        merge_weights(METHODS["slerp"], [ONE, OTHER], None, 0),
        merge_by_layer(spherical_arc, ONE, OTHER),
    )


@pytest.mark.parametrize("factor", [2.0, 0.0, -3.0])
def test_slerp_of_parallel_models_is_linear(factor):
    other = jax.tree.map(lambda leaf: factor * leaf, ONE)
    merged = merge_weights(METHODS["slerp"], [ONE, other], None, 0)
    assert_merged(merged, merge_by_layer(lambda one: (0.7 + 0.3 * factor) * one, ONE))


def ties_in_numpy(base, *models, density, weights, scale):
    """Section 3 of the paper; the differences are weighted before signs are elected."""
    values = []
    for model, weight in zip(models, weights, strict=True):
        difference = model - base
        largest = np.argsort(-np.abs(difference), axis=None)[: int(density * base.size)]
        trimmed = np.zeros(base.size)
        trimmed[largest] = difference.flat[largest]
        values.append(weight * trimmed.reshape(base.shape))
    sign = np.where(np.sum(values, 0) >= 0, 1, -1)
    agree = np.sign(values) == sign
    return base + scale * np.sum(values, 0, where=agree) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, -2.0)])
def test_ties_equals_the_paper(density, weights):
    method = Ties.unvalidated(density=density, weights=weights, scale=0.7)
    merged = merge_weights(method, [ONE, OTHER, THIRD], BASE, 0)
    settings = {"density": density, "weights": weights or (1, 1, 1), "scale": 0.7}
    assert_merged(
        merged,
        merge_by_layer(lambda *all: ties_in_numpy(*all, **settings), BASE, ONE, OTHER, THIRD),
    )


def test_ties_keeps_equal_magnitudes():
    base = {"norm": jnp.zeros(6)}
    model = {"norm": jnp.asarray([1.0, -3.0, 2.0, 0.5, -2.0, 0.0])}
    merged = merge_weights(Ties.unvalidated(density=0.34), [model], base, 0)
    np.testing.assert_array_equal(merged["norm"], [0, -3, 2, 0, -2, 0])


def test_model_of_weight_0_has_no_vote():
    two = merge_weights(Ties.unvalidated(), [ONE, OTHER], BASE, 0)
    three = merge_weights(Ties.unvalidated(weights=(1.0, 0.0, 1.0)), [ONE, THIRD, OTHER], BASE, 0)
    assert_merged(three, tensors_by_layer(two))


@pytest.mark.parametrize("weights", [None, (1.0, 0.5, -2.0)])
def test_dare_of_full_density_equals_the_weighted_sum(weights):
    merged = merge_weights(
        Dare.unvalidated(density=1.0, weights=weights), [ONE, OTHER, THIRD], BASE, 0
    )
    factors = weights or (1 / 3,) * 3

    def combine(base, *all):
        return base + sum(w * (model - base) for w, model in zip(factors, all, strict=True))

    assert_merged(merged, merge_by_layer(combine, BASE, ONE, OTHER, THIRD))


def test_dare_drops_at_random():
    base = {"blocks": {"a": jnp.zeros((2, 300, 100))}, "b": jnp.zeros((300, 100))}
    models = [
        jax.tree.map(lambda leaf, offset=offset: leaf + offset, base) for offset in (1.0, 100.0)
    ]
    method = Dare.unvalidated(density=0.2, weights=(1.0, 1.0))
    merged = merge_weights(method, models, base, 3)
    # Each entry tells what was kept of both models: 5 of the first, 500 of the second.
    masks = [value % 500 == 5 for value in tensors_by_layer(merged).values()]
    masks += [value >= 500 for value in tensors_by_layer(merged).values()]
    assert {float(value) for value in np.unique(merged["b"])} == {0, 5, 500, 505}
    # Shares of 30000 entries, alone and of two together: five standard deviations.
    for offset, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(0.2, abs=0.012)
        for other in masks[:offset]:
            assert (mask & other).mean() == pytest.approx(0.04, abs=0.006)
    assert np.array_equal(merged["b"], merge_weights(method, models, base, 3)["b"])
    assert not np.array_equal(merged["b"], merge_weights(method, models, base, 4)["b"])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_merges_equal_peft(density):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft.utils.merge_utils")
    weights = torch.tensor([1.0, 1.5, 0.7])

    def combine(merge, base, *all, weights=weights):
        differences = [torch.from_numpy(tensor - base) for tensor in all]
        return base + merge(differences, weights, density).numpy()

    def elected(differences, weights, density):
        # PEFT elects signs before it weights.
        weighted = [w * tensor for w, tensor in zip(weights, differences, strict=True)]
        return theirs.ties(weighted, torch.ones(3), density)

    models = [ONE, OTHER, THIRD]
    chosen = tuple(weights.tolist())
    merged = merge_weights(Ties.unvalidated(density=density), models, BASE, 0)
    plain = merge_by_layer(
        lambda *all: combine(theirs.ties, *all, weights=torch.ones(3)), BASE, *models
    )
    assert_merged(merged, plain)
    merged = merge_weights(Ties.unvalidated(density=density, weights=chosen), models, BASE, 0)
    assert_merged(merged, merge_by_layer(lambda *all: combine(elected, *all), BASE, *models))
    if density == 1:
        merged = merge_weights(Dare.unvalidated(density=density, weights=chosen), models, BASE, 0)
        assert_merged(
            merged, merge_by_layer(lambda *all: combine(theirs.dare_linear, *all), BASE, *models)
        )


@pytest.mark.parametrize(
    "method",
    [
        Linear.unvalidated(),
        Slerp.unvalidated(),
        Ties.unvalidated(density=1.0),
        Dare.unvalidated(density=1.0),
    ],
    ids=lambda method: method.word,
)
def test_merge_of_a_model_with_itself_is_the_model(method):
    assert_merged(merge_weights(method, [ONE, ONE], BASE, 0), tensors_by_layer(ONE), tolerance=1e-6)


@pytest.mark.parametrize(
    "method", [Linear.unvalidated(weights=(1.0, 0.0)), Slerp.unvalidated(share=0.0)]
)
def test_merge_of_full_weight_is_the_first_model(method):
    assert_merged(
        merge_weights(method, [ONE, OTHER], None, 0), tensors_by_layer(ONE), tolerance=1e-6
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dtype_is_that_of_the_first_model(method):
    models = [random_model(1, jnp.bfloat16), OTHER]
    merged = merge_weights(method, models, BASE, 0)
    assert {leaf.dtype for leaf in arrays_by_path(merged).values()} == {jnp.dtype(jnp.bfloat16)}
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), models[0])
    assert_merged(
        merged,
        tensors_by_layer(merge_weights(method, [in_float32, OTHER], BASE, 0)),
        tolerance=2**-8,
    )


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_merge_on_a_mesh_equals_one_device(method):
    layout = make_layout(fsdp=4, tensor=2)
    axes = {"blocks": {"weight": (None, "embed", "heads", None)}, "embedding": ("vocab", "embed")}
    places = jax.tree.map(lambda leaf, names: layout.sharding(names, leaf.shape), BASE, axes)
    one, other, base = (jax.device_put(model, places) for model in (ONE, OTHER, BASE))
    merged = merge_weights(method, [one, other], base, 5)
    assert jax.tree.map(lambda leaf: leaf.sharding, merged) == places
    assert_merged(
        merged, tensors_by_layer(merge_weights(method, [ONE, OTHER], BASE, 5)), tolerance=1e-6
    )


def test_decoders_merge_in_their_own_sharding():
    _, abstract = abstract_decoder(FAMILIES["moe"], jnp.float32)
    places = shardings(abstract, make_layout(fsdp=2, tensor=2, expert=2))

    def filled(value: float):
        return jax.device_put(
            jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), abstract), places
        )

    models = [filled(1.0), filled(4.0)]
    merged = merge_weights(Linear.unvalidated(weights=(2.0, 1.0)), models, None, 0)
    assert jax.tree.structure(merged) == jax.tree.structure(models[0])
    for name, leaf in arrays_by_path(merged).items():
        assert leaf.sharding == arrays_by_path(models[0])[name].sharding, name
        np.testing.assert_allclose(leaf, 2.0)


@pytest.mark.parametrize(
    ("method", "count", "message"),
    [
        (Linear.unvalidated(weights=(1.0, 2.0)), 3, "2 weights for 3 models"),
        (Linear.unvalidated(weights=(0.1, 0.2, -0.3)), 3, "weights that add to 0"),
        (Slerp.unvalidated(), 3, "slerp is between two models, not 3"),
        (Ties.unvalidated(), 2, "ties takes differences from a base, and there is none"),
        (Dare.unvalidated(), 2, "dare takes differences from a base, and there is none"),
    ],
)
def test_wrong_number_of_models_or_weights_is_an_error(method, count, message):
    with pytest.raises(ValueError, match=message):
        merge_weights(method, [ONE, OTHER, THIRD][:count], None, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"norm": jnp.zeros((1, 8))}, r"`norm` is \(8,\) in one model and \(1, 8\) in another"),
        ({"a": jnp.zeros(2), "norm": jnp.zeros(8)}, "`a` is not in every model"),
        ({"norm": jnp.zeros(8, jnp.uint8)}, "`norm` is uint8"),
    ],
)
def test_unlike_models_are_an_error(other, message):
    with pytest.raises(ValueError, match=message):
        merge_weights(Linear.unvalidated(), [{"norm": jnp.ones(8)}, other], None, 0)
