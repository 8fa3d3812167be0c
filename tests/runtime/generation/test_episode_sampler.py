"""Episodes against full forward passes, the training program, and other numbers of slots."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.runtime.architectures import FAMILIES
from tests.runtime.decoders import small_decoder
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation.engine import make_engine
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt
from tunelang.runtime.sharding import (
    DECODE_RULES,
    Layout,
    make_layout,
    reshard_for_decoding,
    shardings,
)
from tunelang.runtime.stages.policy_step import batch_of, score_program
from tunelang.runtime.tokenize.tokenizers import Bytes
from tunelang.runtime.training.step_config import StepConfig

CAPACITY, MAX_TOKENS, GROUP = 32, 7, 3
PAD, STOP = 47, 5
LENGTHS = (1, 20, 4, 17, 2)  # prompts in two buckets
NAMES = ("llama", "gemma2", "gpt2", "mistral", "qwen2")


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [
        Prompt(rng.integers(0, 47, length).tolist(), index=100 + index)
        for index, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def engine():
    """Engines by family and slots; one lives through all tests, as it does in a run."""
    cache = {}

    def make(name="llama", slots=4, **options):
        key = (name, slots, *options.items())
        if key not in cache:
            cache[key] = make_engine(FAMILIES[name], slots=slots, capacity=CAPACITY, **options)
        return cache[key]

    return make


@pytest.fixture(scope="module")
def run(engine):
    def run(
        name="llama", slots=4, requested_prompts=None, *, sampling=None, compiled=None,
        params=None, refill_at=None,
        stop_ids=(STOP,), seed=3, step=0, group=GROUP, tokenizer=None,
    ):  # fmt: skip
        sampler = Sampler(
            engine(name, slots) if compiled is None else compiled,
            Sampling(max_tokens=MAX_TOKENS, **(sampling or {})),
            stop_ids, PAD, tokenizer,
        )  # fmt: skip
        if refill_at is not None:
            sampler = replace(sampler, engine=replace(sampler.engine, refill_at=refill_at))
        return sampler.sample(
            small_decoder(FAMILIES[name])[1] if params is None else params,
            prompts() if requested_prompts is None else requested_prompts,
            group=group, seed=seed, step=step,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def forward_pass():
    """Logits `[vocab]` after a sequence, by a forward pass over all of it."""

    def make(name):
        graph, params = small_decoder(FAMILIES[name])

        @jax.jit
        def run(params, tokens):
            decoder = nnx.merge(graph, params)
            return decoder.logits(decoder(tokens)[0])

        def logits(ids):
            padded = np.zeros((1, CAPACITY), np.int32)
            padded[0, : len(ids)] = ids
            return np.asarray(run(params, padded)[0, len(ids) - 1])

        return logits

    return make


def assert_greedy(logits, prompt, completion, penalty=1.0):
    """Each token is the likeliest one after those before it, up to rounding: caps make ties."""
    for index, token in enumerate(completion):
        ids = [*prompt, *completion[:index]]
        likelihoods, seen = logits(ids).copy(), sorted(set(ids))
        likelihoods[seen] = np.where(
            likelihoods[seen] > 0, likelihoods[seen] / penalty, likelihoods[seen] * penalty
        )
        assert likelihoods[token] > likelihoods.max() - 1e-5


def assert_equal_episodes(actual, expected):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.lengths, expected.lengths)
    np.testing.assert_array_equal(actual.truncated, expected.truncated)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=2e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_argmax_of_full_forward_passes(run, forward_pass, name, penalty):
    sampling = {"temperature": 0.0, "repetition_penalty": penalty}
    result = run(name, sampling=sampling, group=2)
    logits = forward_pass(name)
    for index, prompt in enumerate(prompts()):
        for row in (2 * index, 2 * index + 1):
            completion = result[row].tokens
            assert_greedy(logits, prompt.tokens, completion, penalty)
            assert STOP not in completion[:-1]
            assert result.truncated[row] == (completion[-1] != STOP)
            assert len(completion) == MAX_TOKENS or completion[-1] == STOP


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=["plain", "greedy", "filtered"],
)
@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_equal_those_of_the_training_program(run, name, sampling):
    result = run(name, sampling=sampling)
    batch = batch_of(result, CAPACITY - MAX_TOKENS, MAX_TOKENS)
    config = StepConfig(layout=make_layout(), chunk=8)
    score = score_program(FAMILIES[name], config, sampling["temperature"])
    scored = score(
        small_decoder(FAMILIES[name])[1], batch.prompts, batch.prompt_lengths, batch.tokens
    )
    assert np.abs(np.where(batch.mask, scored - batch.sampler, 0)).max() < 1e-4
    assert (batch.sampler[batch.mask] < 0).all()


def test_batch_of_episodes_contains_prompts_and_completions(run):
    result = run()
    batch = batch_of(result, CAPACITY, MAX_TOKENS)
    for row, length in enumerate(result.lengths):
        prompt, sample = divmod(row, GROUP)
        expected = list(result.prompts[prompt])
        assert batch.prompts[prompt, : batch.prompt_lengths[prompt]].tolist() == expected
        assert (batch.prompts[prompt, batch.prompt_lengths[prompt] :] == PAD).all()
        assert batch.tokens[prompt, sample, :length].tolist() == result[row].tokens
        np.testing.assert_array_equal(np.flatnonzero(batch.mask[prompt, sample]), range(length))
        np.testing.assert_array_equal(batch.sampler[prompt, sample], result.log_probs[row])
    with pytest.raises(ValueError, match="tokens for a length of 2"):
        batch_of(result, 2, MAX_TOKENS)
    with pytest.raises(ValueError, match="tokens for a length of 1"):
        batch_of(result, CAPACITY, 1)


FILTERED = {"top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3}


@pytest.mark.parametrize(("slots", "refill_at"), [(1, None), (3, 1), (3, 3), (8, 2), (8, 8)])
def test_number_of_slots_does_not_change_episodes(run, slots, refill_at):
    assert_equal_episodes(
        run(slots=slots, sampling=FILTERED, refill_at=refill_at),
        run(slots=15, sampling=FILTERED),
    )


def test_order_of_prompts_does_not_change_episodes(run):
    expected = run(slots=3)
    order = [3, 0, 4, 2, 1]
    result = run(slots=3, requested_prompts=[prompts()[index] for index in order])
    rows = [GROUP * index + sample for index in order for sample in range(GROUP)]
    np.testing.assert_array_equal(result.tokens, expected.tokens[rows])
    np.testing.assert_allclose(result.log_probs, expected.log_probs[rows], atol=2e-5)
    single = run(slots=3, requested_prompts=prompts()[3:4])
    np.testing.assert_array_equal(single.tokens, expected.tokens[9:12])


def test_refilled_slot_keeps_no_state_of_the_previous_episode(run, forward_pass):
    # A long sequence, then a short one in the same and only slot, where tokens of the first would
    # be seen by attention, and penalised.
    sampling = {"temperature": 0.0, "repetition_penalty": 1.6}
    two_prompts = [prompts()[1], prompts()[0]]
    result = run(slots=1, requested_prompts=two_prompts, sampling=sampling, group=1, stop_ids=())
    for row, prompt in enumerate(two_prompts):
        assert result.lengths[row] == MAX_TOKENS
        assert_greedy(forward_pass("llama"), prompt.tokens, result[row].tokens, 1.6)


def test_draws_depend_on_step_seed_and_sample(run):
    reference = run(step=4)
    assert_equal_episodes(run(step=4), reference)
    assert not np.array_equal(run(step=5).tokens, reference.tokens)
    assert not np.array_equal(run(step=4, seed=9).tokens, reference.tokens)
    by_prompt = reference.tokens.reshape(-1, GROUP, MAX_TOKENS)
    assert not np.array_equal(by_prompt[:, 0], by_prompt[:, 1])
    # A larger group begins with the same completions.
    larger = run(step=4, group=GROUP + 1).tokens.reshape(-1, GROUP + 1, MAX_TOKENS)
    np.testing.assert_array_equal(larger[:, :GROUP], by_prompt)


def test_stop_token_ends_the_completion_and_belongs_to_it(run):
    free = run(stop_ids=())
    assert (free.lengths == MAX_TOKENS).all()
    assert free.truncated.all()
    assert free.work.decode_steps >= MAX_TOKENS
    # On the same engine: the most frequent tokens of the first run, one and then two of them.
    frequent = np.bincount(free.tokens.ravel()).argsort()[::-1]
    for stops in ([int(frequent[0])], [int(token) for token in frequent[:2]]):
        result = run(stop_ids=stops)
        for row in range(len(result.lengths)):
            ids = free.tokens[row].tolist()
            index = next((index for index, token in enumerate(ids) if token in stops), None)
            assert result.truncated[row] == (index is None)
            end = MAX_TOKENS if index is None else index + 1
            assert result[row].tokens == ids[:end]
            assert (result.tokens[row, end:] == PAD).all()
            assert (result.log_probs[row, :end] < 0).all()
            assert (result.log_probs[row, end:] == 0).all()
        assert not result.truncated.all()


def test_stop_token_at_the_last_position_is_not_truncation(run):
    free = run(stop_ids=(), requested_prompts=prompts()[:1], group=1)
    last = int(free.tokens[0, -1])
    result = run(stop_ids=[last], requested_prompts=prompts()[:1], group=1)
    assert result.tokens[0, result.lengths[0] - 1] == last
    assert not result.truncated[0]


class Letters(Bytes):
    """The ids of the tests as text: `STOP` ends in a part of a character, which `6` completes."""

    def decode(self, ids, *, continues=False, hide=()):
        del continues, hide
        texts = {STOP: b"e\xc3", 6: b"\xa9"}
        parts = (texts.get(token, bytes([97 + token % 26])) for token in ids)
        return b"".join(parts).decode(errors="replace")


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_stop_string_ends_the_episode_after_the_token_that_completes_it(
    run, monkeypatch, slots, steps
):
    monkeypatch.setattr("tunelang.runtime.generation.episode_sampler.TEXT_STEPS", steps)
    tokenizer = Letters()
    free = run(stop_ids=())
    texts = [tokenizer.decode(free[row].tokens) for row in range(len(free.lengths))]
    # One that stands in the middle of a completion, one that is rare, and one in no text.
    stop = (texts[4][2:4], texts[8][-1], "é-")
    result = run(slots=slots, stop_ids=(), sampling={"stop": stop}, tokenizer=tokenizer)
    for row in range(len(free.lengths)):
        ids = free[row].tokens
        stop_ends = (
            count
            for count in range(1, len(ids) + 1)
            if any(string in tokenizer.decode(ids[:count]) for string in stop)
        )
        end = next(stop_ends, None)
        assert result[row].tokens == ids[:end]
        assert result.truncated[row] == (end is None)
        assert (result.log_probs[row, result.lengths[row] :] == 0).all()
    assert 0 < result.lengths[4] <= 4
    assert_equal_episodes(run(stop_ids=(), sampling={"stop": ("é-",)}, tokenizer=tokenizer), free)


def test_prompt_of_a_group_is_prefilled_once(run, engine):
    calls = []
    compiled = engine(slots=4)

    def prefill(params, tokens, lengths):
        calls.append(tokens.shape)
        return compiled.prefill(params, tokens, lengths)

    result = run(compiled=replace(compiled, prefill=prefill), group=6)
    assert sum(count for count, _ in calls) == result.work.prefilled == len(LENGTHS)
    # Two bucketed lengths.
    assert {length for _, length in calls} == {16, 32}
    assert_equal_episodes(result, run(slots=30, group=6))


def test_prompts_prefilled_together_give_the_same_episodes(run):
    requested_prompts = prompts((3,) * 10)
    assert_equal_episodes(
        run(slots=10, requested_prompts=requested_prompts, group=1),
        run(slots=3, requested_prompts=requested_prompts, group=1),
    )


def test_no_prompts_give_no_episodes(run):
    result = run(requested_prompts=[])
    assert result.tokens.shape == (0, MAX_TOKENS)
    assert result.work.decode_calls == result.work.prefilled == 0
    assert batch_of(result, CAPACITY, MAX_TOKENS).tokens.shape == (0, GROUP, MAX_TOKENS)


def test_updated_parameters_are_used_and_not_donated(run):
    original = run()
    params = small_decoder(FAMILIES["llama"])[1]
    scaled = jax.tree.map(lambda x: 1.5 * x, params)
    assert not np.array_equal(run(params=scaled).tokens, original.tokens)
    assert_equal_episodes(run(params=params), original)


def test_changed_arguments_do_not_recompile(engine, run):
    compiled = engine(slots=4)
    run()
    programs = compiled.prefill, compiled.admit, compiled.decode
    cache_sizes = [program._cache_size() for program in programs]
    run(seed=1, step=8, stop_ids=(1, 2, 3), sampling={"temperature": 0.3, "top_k": 4})
    run(requested_prompts=prompts((20, 3, 9, 30 - MAX_TOKENS, 1)))
    assert [program._cache_size() for program in programs] == cache_sizes


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_mesh_does_not_change_episodes(run, name):
    layout = make_layout(data=2, fsdp=2, tensor=2)
    params = small_decoder(FAMILIES[name])[1]
    compiled = make_engine(FAMILIES[name], slots=4, capacity=CAPACITY, layout=layout)
    params = jax.device_put(params, shardings(params, layout))
    assert_equal_episodes(
        run(name, compiled=compiled, sampling=FILTERED, params=params), run(name, sampling=FILTERED)
    )
    # Slots with the same sharding in every program need one compilation of it.
    assert compiled.decode._cache_size() == 1


def test_separate_decode_mesh_does_not_change_episodes(run):
    """Weights as training has them, gathered into small groups that sample."""
    layout, params = make_layout(fsdp=8), small_decoder(FAMILIES["llama"])[1]
    params = jax.device_put(params, shardings(params, layout))
    decode_layout = Layout(make_layout(data=4, tensor=2).mesh, DECODE_RULES)
    gathered = reshard_for_decoding(params, decode_layout)
    compiled = make_engine(FAMILIES["llama"], slots=4, capacity=CAPACITY, layout=decode_layout)
    assert_equal_episodes(
        run("llama", compiled=compiled, sampling=FILTERED, params=gathered),
        run("llama", sampling=FILTERED),
    )
    largest = max(jax.tree.leaves(gathered), key=lambda array: array.size)
    shard = largest.sharding.shard_shape(largest.shape)
    assert np.prod(shard) * 2 == largest.size


def test_bfloat16_log_probabilities_are_finite(run, engine):
    result = run(compiled=engine(dtype=jnp.bfloat16))
    assert np.isfinite(result.log_probs).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requested_prompts": [Prompt([], 7)]}, "prompt 7 is empty"),
        ({"requested_prompts": prompts((26,))}, "prompt 100 of 26 tokens and a completion of 7"),
        ({"group": 0}, "0 completions"),
        ({"sampling": {"stop": ("x",)}}, "stop strings need a tokenizer"),
    ],
)
def test_invalid_prompts_and_groups_raise_value_error(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0, "capacity": 8}, "0 slots"),
        ({"slots": 2, "capacity": 33}, "context of 32"),
    ],
)
def test_sizes_out_of_range_raise_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(FAMILIES["llama"], **options)
