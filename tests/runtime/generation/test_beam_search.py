"""Beam search against enumeration of all completions, greedy decoding, and other batch sizes."""

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
"""Stop tokens, some of which end completions of some prompts early."""
NAMES = ("llama", "gemma2", "gpt2", "mistral", "moe")


def prompts(lengths=(1, 20, 4, 17, 2), vocabulary=47):
    rng = np.random.default_rng(0)
    return [Prompt(rng.integers(0, vocabulary, length).tolist(), 0) for length in lengths]


def search(
    architecture, params, requested_prompts=None, *, together=8, beams=3, stop_ids=(STOP,),
    max_tokens=MAX_TOKENS, length_penalty=1.0, returned=1, compiled=None, **options,
):  # fmt: skip
    compiled = compiled or make_search(
        architecture, prompts=together, beams=beams, capacity=CAPACITY, **options
    )
    return beam_search(
        compiled, params, prompts() if requested_prompts is None else requested_prompts,
        max_tokens=max_tokens, stop_ids=stop_ids, pad=PAD,
        length_penalty=length_penalty, returned=returned,
    )  # fmt: skip


def assert_equal_searches(actual, expected):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.lengths, expected.lengths)
    np.testing.assert_array_equal(actual.truncated, expected.truncated)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=2e-5)
    np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "moe"])
def test_search_with_enough_beams_equals_exhaustive_enumeration(name):
    vocabulary, depth, stops = 4, 3, (1, 2)
    architecture = replace(FAMILIES[name], vocabulary=vocabulary)
    graph, params = small_decoder(architecture)
    completions = [
        completion
        for length in range(1, depth + 1)
        for completion in product(range(vocabulary), repeat=length)
        if not set(completion[:-1]) & set(stops) and (length == depth or completion[-1] in stops)
    ]

    @jax.jit
    def forward(tokens):
        decoder = nnx.merge(graph, params)
        return jax.nn.log_softmax(decoder.logits(decoder(tokens)[0]))

    compiled = make_search(architecture, prompts=2, beams=vocabulary**depth, capacity=CAPACITY)
    requested_prompts = prompts((6, 2), vocabulary)
    totals = []
    for prompt in requested_prompts:
        rows = np.zeros((len(completions), CAPACITY), np.int32)
        for row, completion in zip(rows, completions, strict=True):
            row[: len(prompt.tokens) + len(completion)] = [*prompt.tokens, *completion]
        log_probs = np.asarray(forward(rows))[:, len(prompt.tokens) - 1 :]
        totals.append(
            [sum(r[range(len(e)), e]) for r, e in zip(log_probs, completions, strict=True)]
        )
    for length_penalty in (0.0, 1.0, 2.5):
        result = search(
            architecture, params, requested_prompts, stop_ids=stops, max_tokens=depth,
            length_penalty=length_penalty, returned=len(completions) + 1, compiled=compiled,
        )  # fmt: skip
        for index, total in enumerate(totals):
            scores = {
                e: t / len(e) ** length_penalty for e, t in zip(completions, total, strict=True)
            }
            rows_of_prompt = range(index * result.group, (index + 1) * result.group)
            score_of_completion = {
                tuple(result[row].tokens): result.scores[row] for row in rows_of_prompt
            }
            assert (np.diff(list(score_of_completion.values())) <= 0).all()
            # One completion more than exist was requested.
            assert score_of_completion.pop(()) == -np.inf
            assert score_of_completion.keys() == scores.keys()
            for completion, score in score_of_completion.items():
                np.testing.assert_allclose(score, scores[completion], atol=1e-4)
            for row in rows_of_prompt[:-1]:
                assert result.truncated[row] == (result[row].tokens[-1] not in stops)


@pytest.mark.parametrize("name", NAMES)
def test_one_beam_equals_greedy_decoding(name):
    architecture = FAMILIES[name]
    _, params = small_decoder(architecture)
    engine = make_engine(architecture, slots=5, capacity=CAPACITY)
    sampler = Sampler(engine, Sampling(max_tokens=MAX_TOKENS, temperature=0.0), MANY, PAD)
    greedy = sampler.sample(params, prompts(), group=1, seed=0)
    result = search(architecture, params, beams=1, stop_ids=MANY, length_penalty=0.7)
    scores = greedy.log_probs.sum(1) / greedy.lengths**0.7
    np.testing.assert_array_equal(result.tokens, greedy.tokens)
    np.testing.assert_array_equal(result.truncated, greedy.truncated)
    np.testing.assert_allclose(result.log_probs, greedy.log_probs, atol=2e-5)
    np.testing.assert_allclose(result.scores, scores, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2"])
def test_results_do_not_depend_on_batch_size(name):
    architecture = FAMILIES[name]
    _, params = small_decoder(architecture)
    sizes = {"beams": 3, "capacity": CAPACITY}
    alone, two, eight = (make_search(architecture, prompts=n, **sizes) for n in (1, 2, 8))
    for length_penalty in (0.0, 1.0):
        options = {"stop_ids": MANY, "length_penalty": length_penalty, "returned": 3}
        together = search(architecture, params, compiled=eight, **options)
        assert_equal_searches(search(architecture, params, compiled=two, **options), together)
        for index, prompt in enumerate(prompts()):
            single = search(architecture, params, [prompt], compiled=alone, **options)
            rows = slice(3 * index, 3 * index + 3)
            np.testing.assert_array_equal(single.tokens, together.tokens[rows])
            np.testing.assert_allclose(single.scores, together.scores[rows], atol=1e-4)
        assert len(set(together.lengths.tolist())) > 1
        scores = together.log_probs.sum(1) / together.lengths**length_penalty
        np.testing.assert_allclose(together.scores, scores, atol=1e-4)


def test_more_beams_find_higher_scores():
    architecture = FAMILIES["llama"]
    _, params = small_decoder(architecture)
    scores = [
        search(architecture, params, beams=beams, stop_ids=(), length_penalty=0.0).scores.sum()
        for beams in (1, 8)
    ]
    assert scores[0] < scores[1]


def test_adapters_give_the_same_results_as_merged_weights():
    architecture = adapted(FAMILIES["llama"], LORA, ALL)
    decoder = random_decoder(architecture)
    merged = decoder.merge_adapters()
    live = search(architecture, nnx.split(decoder)[1], returned=2)
    assert_equal_searches(live, search(merged.architecture, nnx.split(merged)[1], returned=2))


@pytest.mark.parametrize("name", ["gemma2"])
def test_mesh_does_not_change_results(name):
    architecture = FAMILIES[name]
    _, params = small_decoder(architecture)
    layout = make_layout(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, shardings(params, layout))
    expected = search(architecture, params, returned=3)
    for together in (1, 8):
        result = search(architecture, placed, together=together, returned=3, layout=layout)
        assert_equal_searches(result, expected)


def test_program_compiles_once_for_each_padded_length():
    architecture = FAMILIES["llama"]
    _, params = small_decoder(architecture)
    compiled = make_search(architecture, prompts=2, beams=3, capacity=CAPACITY)
    search(architecture, params, compiled=compiled)
    assert compiled.run._cache_size() == 2  # prompts of up to 16 tokens, and longer ones
    search(architecture, params, compiled=compiled, stop_ids=(9,), length_penalty=0.5, max_tokens=3)
    assert compiled.run._cache_size() == 2


def test_bfloat16_scores_are_finite():
    architecture = FAMILIES["gemma2"]
    result = search(architecture, small_decoder(architecture)[1], dtype=jnp.bfloat16)
    assert np.isfinite(result.scores).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requested_prompts": []}, "no prompt"),
        ({"requested_prompts": [Prompt([], 7)]}, "no token"),
        ({"requested_prompts": prompts((26,))}, "prompt of 26 tokens and a completion of 7"),
        ({"returned": 4}, "4 completions of 3 beams"),
        ({"beams": 0}, "0 beams"),
    ],
)
def test_invalid_arguments_raise_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        search(FAMILIES["llama"], nnx.State({}), **options)
