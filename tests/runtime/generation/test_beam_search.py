"""Beam search against all completions that there are, against greedy decoding, against itself."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime.architectures import FAMILIES
from tests.runtime.decoders import small_decoder
from tests.runtime.models.test_lora import ALL, LORA, adapted, random_decoder
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.engine import make_engine
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt
from tunelang.runtime.sharding import make_layout, shardings

CAPACITY, MAX_TOKENS = 32, 7
PAD, STOP = 47, 5
MANY = tuple(range(0, 47, 6))
"""Stop tokens, of which some end some prompts early."""
NAMES = ("llama", "gemma2", "gpt2", "mistral", "moe")


def prompts(lengths=(1, 20, 4, 17, 2), vocabulary=47):
    rng = np.random.default_rng(0)
    return [Prompt(rng.integers(0, vocabulary, length).tolist(), 0) for length in lengths]


def search(
    architecture, params, asked=None, *, together=8, beams=3, stop_ids=(STOP,),
    max_tokens=MAX_TOKENS, length_penalty=1.0, returned=1, made=None, **given,
):  # fmt: skip
    own = made or make_search(
        architecture, prompts=together, beams=beams, capacity=CAPACITY, **given
    )
    return beam_search(
        own, params, prompts() if asked is None else asked, max_tokens=max_tokens,
        stop_ids=stop_ids, pad=PAD, length_penalty=length_penalty, returned=returned,
    )  # fmt: skip


def equal(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.truncated, other.truncated)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_enough_beams_find_the_best_of_all_completions(name):
    vocabulary, depth, stops = 4, 3, (1, 2)
    architecture = replace(FAMILIES[name], vocabulary=vocabulary)
    graph, params = small_decoder(architecture)
    every = [
        each
        for length in range(1, depth + 1)
        for each in product(range(vocabulary), repeat=length)
        if not set(each[:-1]) & set(stops) and (length == depth or each[-1] in stops)
    ]

    @jax.jit
    def whole(tokens):
        decoder = nnx.merge(graph, params)
        return jax.nn.log_softmax(decoder.logits(decoder(tokens)[0]))

    made = make_search(architecture, prompts=2, beams=vocabulary**depth, capacity=CAPACITY)
    asked = prompts((6, 2), vocabulary)
    totals = []
    for prompt in asked:
        rows = np.zeros((len(every), CAPACITY), np.int32)
        for row, each in zip(rows, every, strict=True):
            row[: len(prompt.tokens) + len(each)] = [*prompt.tokens, *each]
        log_probs = np.asarray(whole(rows))[:, len(prompt.tokens) - 1 :]
        totals.append([sum(r[range(len(e)), e]) for r, e in zip(log_probs, every, strict=True)])
    for length_penalty in (0.0, 1.0, 2.5):
        found = search(
            architecture, params, asked, stop_ids=stops, max_tokens=depth,
            length_penalty=length_penalty, returned=len(every) + 1, made=made,
        )  # fmt: skip
        for at, total in enumerate(totals):
            scores = {e: t / len(e) ** length_penalty for e, t in zip(every, total, strict=True)}
            mine = range(at * found.group, (at + 1) * found.group)
            ours = {tuple(found[row].tokens): found.scores[row] for row in mine}
            assert (np.diff(list(ours.values())) <= 0).all()
            # One more than there are was asked for.
            assert ours.pop(()) == -np.inf
            assert ours.keys() == scores.keys()
            for each, score in ours.items():
                np.testing.assert_allclose(score, scores[each], atol=1e-4)
            for row in mine[:-1]:
                assert found.truncated[row] == (found[row].tokens[-1] not in stops)


@pytest.mark.parametrize("name", NAMES)
def test_one_beam_is_greedy(name):
    architecture = FAMILIES[name]
    _, params = small_decoder(architecture)
    engine = make_engine(architecture, slots=5, capacity=CAPACITY)
    sampler = Sampler(engine, Sampling(max_tokens=MAX_TOKENS, temperature=0.0), MANY, PAD)
    greedy = sampler.sample(params, prompts(), group=1, seed=0)
    found = search(architecture, params, beams=1, stop_ids=MANY, length_penalty=0.7)
    scores = greedy.log_probs.sum(1) / greedy.lengths**0.7
    np.testing.assert_array_equal(found.tokens, greedy.tokens)
    np.testing.assert_array_equal(found.truncated, greedy.truncated)
    np.testing.assert_allclose(found.log_probs, greedy.log_probs, atol=2e-5)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2"])
def test_a_batch_is_its_prompts_one_by_one(name):
    architecture = FAMILIES[name]
    _, params = small_decoder(architecture)
    sizes = {"beams": 3, "capacity": CAPACITY}
    alone, two, all_ = (make_search(architecture, prompts=n, **sizes) for n in (1, 2, 8))
    for length_penalty in (0.0, 1.0):
        given = {"stop_ids": MANY, "length_penalty": length_penalty, "returned": 3}
        together = search(architecture, params, made=all_, **given)
        equal(search(architecture, params, made=two, **given), together)
        for at, prompt in enumerate(prompts()):
            one = search(architecture, params, [prompt], made=alone, **given)
            rows = slice(3 * at, 3 * at + 3)
            np.testing.assert_array_equal(one.tokens, together.tokens[rows])
            np.testing.assert_allclose(one.scores, together.scores[rows], atol=1e-4)
        assert len(set(together.lengths.tolist())) > 1
        scores = together.log_probs.sum(1) / together.lengths**length_penalty
        np.testing.assert_allclose(together.scores, scores, atol=1e-4)


def test_more_beams_find_no_worse():
    architecture = FAMILIES["llama"]
    _, params = small_decoder(architecture)
    scores = [
        search(architecture, params, beams=beams, stop_ids=(), length_penalty=0.0).scores.sum()
        for beams in (1, 8)
    ]
    assert scores[0] < scores[1]


def test_adapters_are_those_merged():
    architecture = adapted(FAMILIES["llama"], LORA, ALL)
    decoder = random_decoder(architecture)
    merged = decoder.merge_adapters()
    live = search(architecture, nnx.split(decoder)[1], returned=2)
    equal(live, search(merged.architecture, nnx.split(merged)[1], returned=2))


@pytest.mark.parametrize("name", ["gemma2"])
def test_a_mesh_changes_nothing(name):
    architecture = FAMILIES[name]
    _, params = small_decoder(architecture)
    layout = make_layout(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, shardings(params, layout))
    expected = search(architecture, params, returned=3)
    for together in (1, 8):
        found = search(architecture, placed, together=together, returned=3, layout=layout)
        equal(found, expected)


def test_compiled_once_for_a_length():
    architecture = FAMILIES["llama"]
    _, params = small_decoder(architecture)
    made = make_search(architecture, prompts=2, beams=3, capacity=CAPACITY)
    search(architecture, params, made=made)
    assert made.run._cache_size() == 2  # prompts of up to 16 tokens, and longer ones
    search(architecture, params, made=made, stop_ids=(9,), length_penalty=0.5, max_tokens=3)
    assert made.run._cache_size() == 2


def test_bfloat16():
    architecture = FAMILIES["gemma2"]
    found = search(architecture, small_decoder(architecture)[1], dtype=jnp.bfloat16)
    assert np.isfinite(found.scores).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"asked": []}, "no prompt"),
        ({"asked": [Prompt([], 7)]}, "no token"),
        ({"asked": prompts((26,))}, "prompt of 26 tokens and a completion of 7"),
        ({"returned": 4}, "4 completions of 3 beams"),
        ({"beams": 0}, "0 beams"),
    ],
)
def test_impossible_search_is_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        search(FAMILIES["llama"], nnx.State({}), **given)
