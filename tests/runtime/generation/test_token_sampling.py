"""Sampling against its definitions, written with full sorts in numpy."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation import token_sampling
from tunelang.runtime.generation.token_sampling import SlotSettings

draw = jax.jit(token_sampling.sample_tokens)
keep = jax.jit(token_sampling.filtered)


def settings(slots: int = 1, **options) -> SlotSettings:
    return token_sampling.slot_settings(Sampling(**options), slots)


def keys(slots: int, seed: int = 0, step: int = 0) -> jax.Array:
    index = jnp.arange(slots)
    return token_sampling.token_keys(
        jnp.int32(seed), jnp.int32(step), index // 4, index % 4, index * 0
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def sorted_distribution(logits, temperature=1.0, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """Return the distribution of one slot that is sampled from, in float64, by a full sort."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    p = softmax(logits / temperature)
    if top_k is not None and top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if top_p is not None and top_p < 1:
        ordered = np.sort(p)[::-1]
        mass_before = np.cumsum(ordered) - ordered
        last = ordered[mass_before < top_p].min() if top_p > 0 else ordered[0]
        p = np.where(p >= last, p, 0)
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


# Filters.

GRID = [
    {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 10_000}, {"top_p": 0.0}, {"top_p": 0.3},
    {"top_p": 0.9}, {"top_p": 1.0}, {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 7, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.05}, {"top_k": 9, "top_p": 0.9, "min_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-6, 30.0])
@pytest.mark.parametrize("options", GRID, ids=str)
def test_filters_keep_the_tokens_of_the_definition(options, temperature):
    logits = np.random.default_rng(7).normal(0, 3, (16, 60)).astype(np.float32)
    parameters = settings(16, temperature=temperature, **options)
    result = keep(token_sampling.scale(jnp.asarray(logits), parameters.temperature), parameters)
    for slot in range(16):
        expected = sorted_distribution(logits[slot], temperature, **options)
        # A token too unlikely for float32 does not matter.
        relevant = softmax(logits[slot].astype(np.float64) / temperature) > 1e-9
        np.testing.assert_array_equal(np.asarray(result[slot])[relevant], expected[relevant] > 0)


@pytest.mark.parametrize(
    ("probabilities", "options", "expected"),
    [
        # The mass before the third is just the share: it is not needed.
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.75}, [1, 1, 0, 0]),
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.76}, [1, 1, 1, 1]),
        ([0.125, 0.5, 0.125, 0.25], {"top_p": 0.5}, [0, 1, 0, 0]),
        # Ties are kept or dropped together, in any order.
        ([0.25, 0.25, 0.25, 0.25], {"top_p": 0.1}, [1, 1, 1, 1]),
        ([0.25, 0.25, 0.25, 0.25], {"top_k": 1}, [1, 1, 1, 1]),
        ([0.125, 0.5, 0.125, 0.25], {"top_k": 3}, [1, 1, 1, 1]),
        ([0.125, 0.5, 0.125, 0.25], {"top_k": 2}, [0, 1, 0, 1]),
        ([0.125, 0.5, 0.125, 0.25], {"min_p": 0.5}, [0, 1, 0, 1]),
        # Top-p is a share of what top-k left: 0.5 is two thirds of 0.75.
        ([0.5, 0.25, 0.125, 0.125], {"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ([1.0, 0.0, 0.0, 0.0], {"top_p": 0.999}, [1, 0, 0, 0]),
    ],
)
def test_filters_at_boundaries_keep_ties_together(probabilities, options, expected):
    with np.errstate(divide="ignore"):
        logits = jnp.log(jnp.asarray(probabilities, jnp.float32))[None]
    parameters = settings(**options)
    result = keep(token_sampling.scale(logits, parameters.temperature), parameters)[0]
    np.testing.assert_array_equal(result, np.asarray(expected, bool))


@pytest.mark.parametrize("vocab", [256, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("ties", [False, True])
def test_top_p_equals_a_full_sort_exactly(vocab, top_p, ties):
    # In whole units of probability, where sums do not depend on the order: no tolerance at all.
    random = np.random.default_rng(11)
    logits = random.normal(0, 2, (8, vocab)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    parameters = settings(8, top_p=top_p)
    scaled = token_sampling.scale(jnp.asarray(logits), parameters.temperature)
    mass = np.asarray(token_sampling._mass(scaled), np.int64)
    result = np.asarray(keep(scaled, parameters))
    for slot in range(8):
        order = np.argsort(-np.asarray(scaled[slot]), kind="stable")
        mass_before = np.cumsum(mass[slot][order]) - mass[slot][order]
        target = np.float32(top_p) * np.float32(mass[slot].sum())
        last = np.asarray(scaled[slot])[order][mass_before < target][-1]
        np.testing.assert_array_equal(result[slot], np.asarray(scaled[slot]) >= last)


# Draws.


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {name: value for (name, value), on in zip(
            {"top_k": 4, "top_p": 0.8, "min_p": 0.1}.items(), switches, strict=True) if on}
        for switches in itertools.product([False, True], repeat=3)
    ],
    ids=str,
)  # fmt: skip
def test_draws_of_each_combination_of_filters_follow_its_distribution(temperature, options):
    slots = 4000
    logits = np.array([0.3, 2.0, -1.0, 1.5, 0.0, 1.9, -3.0], np.float32)
    parameters = settings(slots, temperature=temperature, **options)
    result = draw(jnp.tile(jnp.asarray(logits), (slots, 1)), keys(slots), parameters)
    expected = sorted_distribution(logits, temperature, **options)
    counts = np.bincount(np.asarray(result.token), minlength=7)
    assert not counts[expected == 0].any()
    on = expected > 0
    squared = ((counts - slots * expected)[on] ** 2 / (slots * expected[on])).sum()
    assert squared < 30  # chi-square of at most 6 degrees of freedom: p = 4e-5
    tokens = np.asarray(result.token)
    np.testing.assert_allclose(result.log_prob, np.log(expected[tokens]), atol=1e-5)
    plain = softmax(logits.astype(np.float64) / (temperature or 1.0))
    np.testing.assert_allclose(result.plain_log_prob, np.log(plain[tokens]), atol=1e-5)


def test_slots_with_different_settings_draw_independently():
    logits = jnp.tile(jnp.array([1.0, 2.0, 0.0, 1.9]), (3, 1))
    rows = [settings(1), settings(1, temperature=0.0), settings(1, top_k=2, temperature=0.5)]
    mixed_settings = SlotSettings(*(jnp.concatenate(values) for values in zip(*rows, strict=True)))
    together = draw(logits, keys(3), mixed_settings)
    for slot, slot_parameters in enumerate(rows):
        single = draw(logits[slot : slot + 1], keys(3)[slot : slot + 1], slot_parameters)
        jax.tree.map(
            lambda a, b, slot=slot: np.testing.assert_array_equal(a[slot], b[0]), together, single
        )


def test_temperature_0_draws_the_first_likeliest_token():
    logits = jnp.array([[0.0, 5.0, 5.0, -jnp.inf], [-1e30, -2.0, -3.0, -jnp.inf]])
    result = draw(logits, keys(2), settings(2, temperature=0.0))
    np.testing.assert_array_equal(result.token, [1, 1])
    np.testing.assert_array_equal(result.log_prob, [0.0, 0.0])
    assert np.isfinite(result.plain_log_prob).all()


def test_temperature_without_filters_is_not_greedy():
    # In another library temperature without top-p was greedy.
    logits = jnp.tile(jnp.array([0.0, 0.1, 0.2]), (2000, 1))
    result = np.asarray(draw(logits, keys(2000), settings(2000, temperature=1.0)).token)
    assert (np.bincount(result, minlength=3) > 500).all()


def test_tokens_of_probability_0_are_never_drawn():
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]), (500, 1))
    result = draw(logits, keys(500), settings(500, temperature=5.0))
    assert set(np.asarray(result.token).tolist()) == {1, 3}
    np.testing.assert_allclose(result.log_prob, np.log(0.5), rtol=1e-5)


def test_nan_logits_give_nan_log_probabilities():
    result = draw(jnp.array([[0.0, jnp.nan, 1.0]]), keys(1), settings())
    assert 0 <= int(result.token[0]) < 3
    assert np.isnan(result.log_prob).all()
    greedy = draw(jnp.array([[0.0, jnp.nan, 1.0]]), keys(1), settings(temperature=0.0))
    assert np.isnan(greedy.log_prob).all()


def test_repetition_penalty_lowers_seen_tokens():
    logits = jnp.array([[2.0, -2.0, 1.0, 0.5]])
    seen = jnp.array([[True, True, False, False]])
    result = draw(logits, keys(1), settings(repetition_penalty=2.0, temperature=0.0), seen)
    assert int(result.token[0]) == 0  # 2 / 2 ties with 1, and comes first
    result = draw(logits, keys(1), settings(repetition_penalty=4.0, temperature=0.0), seen)
    assert int(result.token[0]) == 2
    warm = draw(logits, keys(1), settings(repetition_penalty=2.0, temperature=0.7), seen)
    token = int(warm.token[0])
    penalised = softmax(np.array([1.0, -4.0, 1.0, 0.5]) / 0.7)
    assert float(warm.log_prob[0]) == pytest.approx(np.log(penalised)[token], abs=1e-5)
    plain = softmax(np.array([2.0, -2.0, 1.0, 0.5]) / 0.7)
    assert float(warm.plain_log_prob[0]) == pytest.approx(np.log(plain)[token], abs=1e-5)


def test_without_filters_both_log_probabilities_are_equal():
    logits = jax.random.normal(jax.random.key(3), (8, 150_000))
    result = draw(logits, keys(8), settings(8))
    np.testing.assert_allclose(result.log_prob, result.plain_log_prob, atol=1e-5)
    assert np.asarray(result.token).max() > 75_000


def test_draws_are_in_proportion_to_mass():
    # So little mass that every boundary between tokens, and between blocks, is met.
    mass = np.array([0, 1, 0, 0, 2, 0, 0, 1, 4, 0], np.int32)
    result = jax.jit(token_sampling._draw)(keys(8000), jnp.tile(jnp.asarray(mass), (8000, 1)))
    counts = np.bincount(np.asarray(result), minlength=10)
    assert not counts[mass == 0].any()
    np.testing.assert_allclose(counts, mass * 1000, atol=200)


def test_position_in_the_vocabulary_does_not_bias_draws():
    # A remainder of 32 bits by three quarters of 2**30 would favour the first third by a quarter.
    logits = jnp.tile(jnp.log(jnp.array([1.0, 1.0, 1.0, 0.99])), (6000, 1))
    result = draw(logits, keys(6000), settings(6000, top_k=3)).token
    np.testing.assert_allclose(np.bincount(np.asarray(result), minlength=4)[:3], 2000, atol=150)


# Keys.


def test_draws_do_not_depend_on_the_slot():
    logits = jax.random.normal(jax.random.key(5), (12, 50))
    order = np.random.default_rng(0).permutation(12)
    straight = draw(logits, keys(12), settings(12, top_p=0.9))
    mixed = draw(logits[order], keys(12)[order], settings(12, top_p=0.9))
    np.testing.assert_array_equal(straight.token[order], mixed.token)
    few = draw(logits[:3], keys(12)[:3], settings(3, top_p=0.9))
    np.testing.assert_array_equal(straight.token[:3], few.token)


def test_draws_repeat_for_equal_keys_and_differ_otherwise():
    logits = jnp.zeros((64, 1000))
    slots = jnp.arange(64)

    def tokens(seed=1, step=2, prompt=0, sample=0, position=0):
        slot_keys = token_sampling.token_keys(
            jnp.int32(seed),
            jnp.int32(step),
            slots + prompt,
            slots * 0 + sample,
            slots * 0 + position,
        )
        return np.asarray(draw(logits, slot_keys, settings(64)).token)

    reference = tokens()
    np.testing.assert_array_equal(reference, tokens())
    for change in ("seed", "step", "sample", "position"):
        assert (tokens(**{change: 9}) == reference).mean() < 0.1, change
    np.testing.assert_array_equal(tokens(prompt=8)[:-8], reference[8:])
    assert len(np.unique(reference)) > 50


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(temperature=0.0, repetition_penalty=2)],
    ids=["greedy", "top-k 1", "penalty"],
)
def test_greedy_draw_is_the_largest_logit_after_a_cap_in_the_same_program(sampling):
    """The compiler may round the cap in two ways, and then no logit equals the largest."""
    slots, vocab = 16, 48

    @jax.jit
    def run(hidden, head):
        logits = 1.5 * jnp.tanh(hidden @ head / 1.5)
        keys = jax.random.split(jax.random.key(0), slots)
        seen = jnp.ones((slots, vocab), bool)
        return logits, token_sampling.sample_tokens(
            logits, keys, token_sampling.slot_settings(sampling, slots), seen
        )

    for seed in range(5):
        hidden_key, head_key = jax.random.split(jax.random.key(seed))
        logits, draw = run(
            jax.random.normal(hidden_key, (slots, 16)), jax.random.normal(head_key, (16, vocab))
        )
        drawn_logits = jnp.take_along_axis(logits, draw.token[:, None], -1)[:, 0]
        np.testing.assert_allclose(drawn_logits, logits.max(-1), rtol=1e-6)
