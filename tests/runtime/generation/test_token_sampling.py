"""Sampling against the definitions, written naively in numpy."""

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


def settings(slots: int = 1, **chosen) -> SlotSettings:
    return token_sampling.slot_settings(Sampling(**chosen), slots)


def keys(slots: int, seed: int = 0, step: int = 0) -> jax.Array:
    at = jnp.arange(slots)
    return token_sampling.token_keys(jnp.int32(seed), jnp.int32(step), at // 4, at % 4, at * 0)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def naive(logits, temperature=1.0, top_k=None, top_p=None, min_p=None) -> np.ndarray:
    """The distribution that is sampled from, one slot, in float64, by a full sort."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    p = softmax(logits / temperature)
    if top_k is not None and top_k < len(p):
        p = np.where(p >= np.sort(p)[-top_k], p, 0)
        p /= p.sum()
    if top_p is not None and top_p < 1:
        ordered = np.sort(p)[::-1]
        before = np.cumsum(ordered) - ordered
        last = ordered[before < top_p].min() if top_p > 0 else ordered[0]
        p = np.where(p >= last, p, 0)
    if min_p is not None:
        p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


# What a filter keeps.

GRID = [
    {}, {"top_k": 1}, {"top_k": 5}, {"top_k": 10_000}, {"top_p": 0.0}, {"top_p": 0.3},
    {"top_p": 0.9}, {"top_p": 1.0}, {"min_p": 0.1}, {"min_p": 1.0}, {"top_k": 7, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.05}, {"top_k": 9, "top_p": 0.9, "min_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-6, 30.0])
@pytest.mark.parametrize("chosen", GRID, ids=str)
def test_filters_keep_what_the_definition_keeps(chosen, temperature):
    logits = np.random.default_rng(7).normal(0, 3, (16, 60)).astype(np.float32)
    given = settings(16, temperature=temperature, **chosen)
    found = keep(token_sampling.scale(jnp.asarray(logits), given.temperature), given)
    for slot in range(16):
        expected = naive(logits[slot], temperature, **chosen)
        # A token too unlikely for float32 is of no account, kept or not.
        counts = softmax(logits[slot].astype(np.float64) / temperature) > 1e-9
        np.testing.assert_array_equal(np.asarray(found[slot])[counts], expected[counts] > 0)


@pytest.mark.parametrize(
    ("probabilities", "chosen", "kept"),
    [
        # The mass before the third is just the share: it is not needed.
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.75}, [1, 1, 0, 0]),
        ([0.5, 0.25, 0.125, 0.125], {"top_p": 0.76}, [1, 1, 1, 1]),
        ([0.125, 0.5, 0.125, 0.25], {"top_p": 0.5}, [0, 1, 0, 0]),
        # Ties go together, wherever they stand.
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
def test_boundaries_and_ties(probabilities, chosen, kept):
    with np.errstate(divide="ignore"):
        logits = jnp.log(jnp.asarray(probabilities, jnp.float32))[None]
    given = settings(**chosen)
    found = keep(token_sampling.scale(logits, given.temperature), given)[0]
    np.testing.assert_array_equal(found, np.asarray(kept, bool))


@pytest.mark.parametrize("vocab", [256, 5000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.9999])
@pytest.mark.parametrize("ties", [False, True])
def test_top_p_is_exactly_the_full_sort(vocab, top_p, ties):
    # In whole units of probability, where sums do not depend on the order: no tolerance at all.
    random = np.random.default_rng(11)
    logits = random.normal(0, 2, (8, vocab)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    given = settings(8, top_p=top_p)
    scaled = token_sampling.scale(jnp.asarray(logits), given.temperature)
    mass = np.asarray(token_sampling._mass(scaled), np.int64)
    found = np.asarray(keep(scaled, given))
    for slot in range(8):
        order = np.argsort(-np.asarray(scaled[slot]), kind="stable")
        before = np.cumsum(mass[slot][order]) - mass[slot][order]
        target = np.float32(top_p) * np.float32(mass[slot].sum())
        last = np.asarray(scaled[slot])[order][before < target][-1]
        np.testing.assert_array_equal(found[slot], np.asarray(scaled[slot]) >= last)


# What is drawn.


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize(
    "chosen",
    [
        {name: value for (name, value), on in zip(
            {"top_k": 4, "top_p": 0.8, "min_p": 0.1}.items(), switches, strict=True) if on}
        for switches in itertools.product([False, True], repeat=3)
    ],
    ids=str,
)  # fmt: skip
def test_every_combination_draws_from_its_distribution(temperature, chosen):
    slots = 4000
    logits = np.array([0.3, 2.0, -1.0, 1.5, 0.0, 1.9, -3.0], np.float32)
    given = settings(slots, temperature=temperature, **chosen)
    found = draw(jnp.tile(jnp.asarray(logits), (slots, 1)), keys(slots), given)
    expected = naive(logits, temperature, **chosen)
    counts = np.bincount(np.asarray(found.token), minlength=7)
    assert not counts[expected == 0].any()
    on = expected > 0
    squared = ((counts - slots * expected)[on] ** 2 / (slots * expected[on])).sum()
    assert squared < 30  # chi-square of at most 6 degrees of freedom: p = 4e-5
    tokens = np.asarray(found.token)
    np.testing.assert_allclose(found.log_prob, np.log(expected[tokens]), atol=1e-5)
    plain = softmax(logits.astype(np.float64) / (temperature or 1.0))
    np.testing.assert_allclose(found.plain_log_prob, np.log(plain[tokens]), atol=1e-5)


def test_slots_have_parameters_of_their_own():
    logits = jnp.tile(jnp.array([1.0, 2.0, 0.0, 1.9]), (3, 1))
    rows = [settings(1), settings(1, temperature=0.0), settings(1, top_k=2, temperature=0.5)]
    mixed = SlotSettings(*(jnp.concatenate(each) for each in zip(*rows, strict=True)))
    together = draw(logits, keys(3), mixed)
    for slot, alone in enumerate(rows):
        one = draw(logits[slot : slot + 1], keys(3)[slot : slot + 1], alone)
        jax.tree.map(
            lambda a, b, at=slot: np.testing.assert_array_equal(a[at], b[0]), together, one
        )


def test_temperature_0_is_the_first_of_the_likeliest():
    logits = jnp.array([[0.0, 5.0, 5.0, -jnp.inf], [-1e30, -2.0, -3.0, -jnp.inf]])
    found = draw(logits, keys(2), settings(2, temperature=0.0))
    np.testing.assert_array_equal(found.token, [1, 1])
    np.testing.assert_array_equal(found.log_prob, [0.0, 0.0])
    assert np.isfinite(found.plain_log_prob).all()


def test_temperature_counts_without_any_filter():
    # In another library temperature without top-p was greedy.
    logits = jnp.tile(jnp.array([0.0, 0.1, 0.2]), (2000, 1))
    found = np.asarray(draw(logits, keys(2000), settings(2000, temperature=1.0)).token)
    assert (np.bincount(found, minlength=3) > 500).all()


def test_what_cannot_occur_is_never_drawn():
    logits = jnp.tile(jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]), (500, 1))
    found = draw(logits, keys(500), settings(500, temperature=5.0))
    assert set(np.asarray(found.token).tolist()) == {1, 3}
    np.testing.assert_allclose(found.log_prob, np.log(0.5), rtol=1e-5)


def test_not_a_number_shows():
    found = draw(jnp.array([[0.0, jnp.nan, 1.0]]), keys(1), settings())
    assert 0 <= int(found.token[0]) < 3
    assert np.isnan(found.log_prob).all()
    greedy = draw(jnp.array([[0.0, jnp.nan, 1.0]]), keys(1), settings(temperature=0.0))
    assert np.isnan(greedy.log_prob).all()


def test_repetition_penalty():
    logits = jnp.array([[2.0, -2.0, 1.0, 0.5]])
    seen = jnp.array([[True, True, False, False]])
    found = draw(logits, keys(1), settings(repetition_penalty=2.0, temperature=0.0), seen)
    assert int(found.token[0]) == 0  # 2 / 2 ties with 1, and comes first
    found = draw(logits, keys(1), settings(repetition_penalty=4.0, temperature=0.0), seen)
    assert int(found.token[0]) == 2
    warm = draw(logits, keys(1), settings(repetition_penalty=2.0, temperature=0.7), seen)
    token = int(warm.token[0])
    penalised = softmax(np.array([1.0, -4.0, 1.0, 0.5]) / 0.7)
    assert float(warm.log_prob[0]) == pytest.approx(np.log(penalised)[token], abs=1e-5)
    plain = softmax(np.array([2.0, -2.0, 1.0, 0.5]) / 0.7)
    assert float(warm.plain_log_prob[0]) == pytest.approx(np.log(plain)[token], abs=1e-5)


def test_large_vocabulary_without_filter_is_one_distribution():
    logits = jax.random.normal(jax.random.key(3), (8, 150_000))
    found = draw(logits, keys(8), settings(8))
    np.testing.assert_allclose(found.log_prob, found.plain_log_prob, atol=1e-5)
    assert np.asarray(found.token).max() > 75_000


def test_the_draw_is_in_proportion_to_the_mass():
    # So little mass that every boundary between tokens, and between blocks, is met.
    mass = np.array([0, 1, 0, 0, 2, 0, 0, 1, 4, 0], np.int32)
    found = jax.jit(token_sampling._draw)(keys(8000), jnp.tile(jnp.asarray(mass), (8000, 1)))
    counts = np.bincount(np.asarray(found), minlength=10)
    assert not counts[mass == 0].any()
    np.testing.assert_allclose(counts, mass * 1000, atol=200)


def test_no_token_is_favoured_by_where_its_mass_lies():
    # A remainder of 32 bits by three quarters of 2**30 would favour the first third by a quarter.
    logits = jnp.tile(jnp.log(jnp.array([1.0, 1.0, 1.0, 0.99])), (6000, 1))
    found = draw(logits, keys(6000), settings(6000, top_k=3)).token
    np.testing.assert_allclose(np.bincount(np.asarray(found), minlength=4)[:3], 2000, atol=150)


# Keys.


def test_draws_do_not_depend_on_the_slot():
    logits = jax.random.normal(jax.random.key(5), (12, 50))
    order = np.random.default_rng(0).permutation(12)
    straight = draw(logits, keys(12), settings(12, top_p=0.9))
    mixed = draw(logits[order], keys(12)[order], settings(12, top_p=0.9))
    np.testing.assert_array_equal(straight.token[order], mixed.token)
    few = draw(logits[:3], keys(12)[:3], settings(3, top_p=0.9))
    np.testing.assert_array_equal(straight.token[:3], few.token)


def test_draws_repeat_with_the_seed_and_differ_with_all_else():
    logits = jnp.zeros((64, 1000))
    slots = jnp.arange(64)

    def tokens(seed=1, step=2, prompt=0, sample=0, position=0):
        made = token_sampling.token_keys(
            jnp.int32(seed),
            jnp.int32(step),
            slots + prompt,
            slots * 0 + sample,
            slots * 0 + position,
        )
        return np.asarray(draw(logits, made, settings(64)).token)

    first = tokens()
    np.testing.assert_array_equal(first, tokens())
    for change in ("seed", "step", "sample", "position"):
        assert (tokens(**{change: 9}) == first).mean() < 0.1, change
    np.testing.assert_array_equal(tokens(prompt=8)[:-8], first[8:])
    assert len(np.unique(first)) > 50


@pytest.mark.parametrize(
    "asked",
    [Sampling(temperature=0.0), Sampling(top_k=1), Sampling(temperature=0.0, repetition_penalty=2)],
    ids=["greedy", "top-k 1", "penalty"],
)
def test_the_likeliest_of_logits_that_the_same_program_caps(asked):
    """The compiler may round the cap in two ways, and then no logit equals the largest."""
    slots, vocab = 16, 48

    @jax.jit
    def run(hidden, head):
        logits = 1.5 * jnp.tanh(hidden @ head / 1.5)
        keys = jax.random.split(jax.random.key(0), slots)
        seen = jnp.ones((slots, vocab), bool)
        return logits, token_sampling.sample_tokens(
            logits, keys, token_sampling.slot_settings(asked, slots), seen
        )

    for seed in range(5):
        one, other = jax.random.split(jax.random.key(seed))
        logits, draw = run(
            jax.random.normal(one, (slots, 16)), jax.random.normal(other, (16, vocab))
        )
        taken = jnp.take_along_axis(logits, draw.token[:, None], -1)[:, 0]
        np.testing.assert_allclose(taken, logits.max(-1), rtol=1e-6)
