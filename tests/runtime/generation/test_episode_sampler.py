"""Episodes against whole forward passes, against the trainer, and against themselves."""

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
        Prompt(rng.integers(0, 47, length).tolist(), index=100 + place)
        for place, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def engine():
    """Engines by family and slots; one lives through all tests, as it does in a run."""
    found = {}

    def make(name="llama", slots=4, **given):
        key = (name, slots, *given.items())
        if key not in found:
            found[key] = make_engine(FAMILIES[name], slots=slots, capacity=CAPACITY, **given)
        return found[key]

    return make


@pytest.fixture(scope="module")
def run(engine):
    def run(
        name="llama", slots=4, asked=None, *, given=None, own=None, params=None, refill_at=None,
        stop_ids=(STOP,), seed=3, step=0, group=GROUP, tokenizer=None,
    ):  # fmt: skip
        sampler = Sampler(
            engine(name, slots) if own is None else own,
            Sampling(max_tokens=MAX_TOKENS, **(given or {})),
            stop_ids, PAD, tokenizer,
        )  # fmt: skip
        if refill_at is not None:
            sampler = replace(sampler, engine=replace(sampler.engine, refill_at=refill_at))
        return sampler.sample(
            small_decoder(FAMILIES[name])[1] if params is None else params,
            prompts() if asked is None else asked,
            group=group, seed=seed, step=step,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def whole_pass():
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
    for place, token in enumerate(completion):
        ids = [*prompt, *completion[:place]]
        found, seen = logits(ids).copy(), sorted(set(ids))
        found[seen] = np.where(found[seen] > 0, found[seen] / penalty, found[seen] * penalty)
        assert found[token] > found.max() - 1e-5


def equal(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.lengths, other.lengths)
    np.testing.assert_array_equal(one.truncated, other.truncated)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_argmax_of_repeated_whole_passes(run, whole_pass, name, penalty):
    given = {"temperature": 0.0, "repetition_penalty": penalty}
    found = run(name, given=given, group=2)
    logits = whole_pass(name)
    for place, prompt in enumerate(prompts()):
        for row in (2 * place, 2 * place + 1):
            completion = found[row].tokens
            assert_greedy(logits, prompt.tokens, completion, penalty)
            assert STOP not in completion[:-1]
            assert found.truncated[row] == (completion[-1] != STOP)
            assert len(completion) == MAX_TOKENS or completion[-1] == STOP


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 5, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=["plain", "greedy", "filtered"],
)
@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_are_those_of_the_training_program(run, name, given):
    found = run(name, given=given)
    batch = batch_of(found, CAPACITY - MAX_TOKENS, MAX_TOKENS)
    config = StepConfig(layout=make_layout(), chunk=8)
    score = score_program(FAMILIES[name], config, given["temperature"])
    scored = score(
        small_decoder(FAMILIES[name])[1], batch.prompts, batch.prompt_lengths, batch.tokens
    )
    assert np.abs(np.where(batch.mask, scored - batch.sampler, 0)).max() < 1e-4
    assert (batch.sampler[batch.mask] < 0).all()


def test_a_batch_holds_prompts_and_completions(run):
    found = run()
    batch = batch_of(found, CAPACITY, MAX_TOKENS)
    for row, length in enumerate(found.lengths):
        prompt, at = divmod(row, GROUP)
        expected = list(found.prompts[prompt])
        assert batch.prompts[prompt, : batch.prompt_lengths[prompt]].tolist() == expected
        assert (batch.prompts[prompt, batch.prompt_lengths[prompt] :] == PAD).all()
        assert batch.tokens[prompt, at, :length].tolist() == found[row].tokens
        np.testing.assert_array_equal(np.flatnonzero(batch.mask[prompt, at]), range(length))
        np.testing.assert_array_equal(batch.sampler[prompt, at], found.log_probs[row])
    with pytest.raises(ValueError, match="tokens for a length of 2"):
        batch_of(found, 2, MAX_TOKENS)
    with pytest.raises(ValueError, match="tokens for a length of 1"):
        batch_of(found, CAPACITY, 1)


FILTERED = {"top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3}


@pytest.mark.parametrize(("slots", "refill_at"), [(1, None), (3, 1), (3, 3), (8, 2), (8, 8)])
def test_slots_change_nothing(run, slots, refill_at):
    equal(
        run(slots=slots, given=FILTERED, refill_at=refill_at),
        run(slots=15, given=FILTERED),
    )


def test_the_order_of_the_queue_changes_nothing(run):
    expected = run(slots=3)
    order = [3, 0, 4, 2, 1]
    found = run(slots=3, asked=[prompts()[place] for place in order])
    rows = [GROUP * place + sample for place in order for sample in range(GROUP)]
    np.testing.assert_array_equal(found.tokens, expected.tokens[rows])
    np.testing.assert_allclose(found.log_probs, expected.log_probs[rows], atol=2e-5)
    alone = run(slots=3, asked=prompts()[3:4])
    np.testing.assert_array_equal(alone.tokens, expected.tokens[9:12])


def test_a_refilled_slot_holds_nothing_of_its_predecessor(run, whole_pass):
    # A long sequence, then a short one in the same and only slot, where tokens of the first would
    # be seen by attention, and penalised.
    given = {"temperature": 0.0, "repetition_penalty": 1.6}
    both = [prompts()[1], prompts()[0]]
    found = run(slots=1, asked=both, given=given, group=1, stop_ids=())
    for row, prompt in enumerate(both):
        assert found.lengths[row] == MAX_TOKENS
        assert_greedy(whole_pass("llama"), prompt.tokens, found[row].tokens, 1.6)


def test_draws_belong_to_the_step_the_seed_and_the_sample(run):
    first = run(step=4)
    equal(run(step=4), first)
    assert not np.array_equal(run(step=5).tokens, first.tokens)
    assert not np.array_equal(run(step=4, seed=9).tokens, first.tokens)
    by_prompt = first.tokens.reshape(-1, GROUP, MAX_TOKENS)
    assert not np.array_equal(by_prompt[:, 0], by_prompt[:, 1])
    # A larger group begins with the same completions.
    larger = run(step=4, group=GROUP + 1).tokens.reshape(-1, GROUP + 1, MAX_TOKENS)
    np.testing.assert_array_equal(larger[:, :GROUP], by_prompt)


def test_stop_tokens_are_part_of_the_completion_and_can_change(run):
    free = run(stop_ids=())
    assert (free.lengths == MAX_TOKENS).all()
    assert free.truncated.all()
    assert free.work.decode_steps >= MAX_TOKENS
    # On the same engine: the most frequent tokens of the first run, one and then two of them.
    frequent = np.bincount(free.tokens.ravel()).argsort()[::-1]
    for stops in ([int(frequent[0])], [int(each) for each in frequent[:2]]):
        found = run(stop_ids=stops)
        for row in range(len(found.lengths)):
            ids = free.tokens[row].tolist()
            place = next((place for place, each in enumerate(ids) if each in stops), None)
            assert found.truncated[row] == (place is None)
            end = MAX_TOKENS if place is None else place + 1
            assert found[row].tokens == ids[:end]
            assert (found.tokens[row, end:] == PAD).all()
            assert (found.log_probs[row, :end] < 0).all()
            assert (found.log_probs[row, end:] == 0).all()
        assert not found.truncated.all()


def test_a_stop_token_at_the_last_place_is_no_truncation(run):
    free = run(stop_ids=(), asked=prompts()[:1], group=1)
    last = int(free.tokens[0, -1])
    found = run(stop_ids=[last], asked=prompts()[:1], group=1)
    assert found.tokens[0, found.lengths[0] - 1] == last
    assert not found.truncated[0]


class Letters(Bytes):
    """The ids of the tests as text: `STOP` ends in a part of a character, which `6` completes."""

    def decode(self, ids, *, continues=False, hide=()):
        del continues, hide
        texts = {STOP: b"e\xc3", 6: b"\xa9"}
        parts = (texts.get(each, bytes([97 + each % 26])) for each in ids)
        return b"".join(parts).decode(errors="replace")


@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("turns", [1, 3, 16])
def test_stop_strings_end_right_after_the_token_that_completes_them(run, monkeypatch, slots, turns):
    monkeypatch.setattr("tunelang.runtime.generation.episode_sampler.TEXT_STEPS", turns)
    tokenizer = Letters()
    free = run(stop_ids=())
    texts = [tokenizer.decode(free[row].tokens) for row in range(len(free.lengths))]
    # One that stands in the middle of a completion, one that is rare, and one in no text.
    stop = (texts[4][2:4], texts[8][-1], "é-")
    found = run(slots=slots, stop_ids=(), given={"stop": stop}, tokenizer=tokenizer)
    for row in range(len(free.lengths)):
        ids = free[row].tokens
        ends = (
            count
            for count in range(1, len(ids) + 1)
            if any(each in tokenizer.decode(ids[:count]) for each in stop)
        )
        end = next(ends, None)
        assert found[row].tokens == ids[:end]
        assert found.truncated[row] == (end is None)
        assert (found.log_probs[row, found.lengths[row] :] == 0).all()
    assert 0 < found.lengths[4] <= 4
    equal(run(stop_ids=(), given={"stop": ("é-",)}, tokenizer=tokenizer), free)


def test_a_prompt_of_a_group_is_prefilled_once(run, engine):
    calls = []
    made = engine(slots=4)

    def prefill(params, tokens, lengths):
        calls.append(tokens.shape)
        return made.prefill(params, tokens, lengths)

    found = run(own=replace(made, prefill=prefill), group=6)
    assert sum(count for count, _ in calls) == found.work.prefilled == len(LENGTHS)
    # Two bucketed lengths.
    assert {length for _, length in calls} == {16, 32}
    equal(found, run(slots=30, group=6))


def test_many_prompts_are_prefilled_together(run):
    asked = prompts((3,) * 10)
    equal(run(slots=10, asked=asked, group=1), run(slots=3, asked=asked, group=1))


def test_an_empty_queue(run):
    found = run(asked=[])
    assert found.tokens.shape == (0, MAX_TOKENS)
    assert found.work.decode_calls == found.work.prefilled == 0
    assert batch_of(found, CAPACITY, MAX_TOKENS).tokens.shape == (0, GROUP, MAX_TOKENS)


def test_updated_parameters_are_used_and_none_is_used_up(run):
    before = run()
    params = small_decoder(FAMILIES["llama"])[1]
    moved = jax.tree.map(lambda x: 1.5 * x, params)
    assert not np.array_equal(run(params=moved).tokens, before.tokens)
    equal(run(params=params), before)


def test_programs_are_compiled_once(engine, run):
    made = engine(slots=4)
    run()
    before = [each._cache_size() for each in (made.prefill, made.admit, made.decode)]
    run(seed=1, step=8, stop_ids=(1, 2, 3), given={"temperature": 0.3, "top_k": 4})
    run(asked=prompts((20, 3, 9, 30 - MAX_TOKENS, 1)))
    assert [each._cache_size() for each in (made.prefill, made.admit, made.decode)] == before


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_mesh_changes_nothing(run, name):
    layout = make_layout(data=2, fsdp=2, tensor=2)
    params = small_decoder(FAMILIES[name])[1]
    own = make_engine(FAMILIES[name], slots=4, capacity=CAPACITY, layout=layout)
    params = jax.device_put(params, shardings(params, layout))
    equal(run(name, own=own, given=FILTERED, params=params), run(name, given=FILTERED))
    # Slots that lie the same way in every program need one version of each.
    assert own.decode._cache_size() == 1


def test_a_mesh_of_its_own_changes_nothing(run):
    """Weights as training has them, gathered into small groups that sample."""
    layout, params = make_layout(fsdp=8), small_decoder(FAMILIES["llama"])[1]
    params = jax.device_put(params, shardings(params, layout))
    apart = Layout(make_layout(data=4, tensor=2).mesh, DECODE_RULES)
    gathered = reshard_for_decoding(params, apart)
    own = make_engine(FAMILIES["llama"], slots=4, capacity=CAPACITY, layout=apart)
    equal(run("llama", own=own, given=FILTERED, params=gathered), run("llama", given=FILTERED))
    largest = max(jax.tree.leaves(gathered), key=lambda array: array.size)
    shard = largest.sharding.shard_shape(largest.shape)
    assert np.prod(shard) * 2 == largest.size


def test_bfloat16(run, engine):
    found = run(own=engine(dtype=jnp.bfloat16))
    assert np.isfinite(found.log_probs).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"asked": [Prompt([], 7)]}, "prompt 7 is empty"),
        ({"asked": prompts((26,))}, "prompt 100 of 26 tokens and a completion of 7"),
        ({"group": 0}, "0 completions"),
        ({"given": {"stop": ("x",)}}, "stop strings need a tokenizer"),
    ],
)
def test_what_cannot_run_is_refused(run, given, message):
    with pytest.raises(ValueError, match=message):
        run(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 0, "capacity": 8}, "0 slots"),
        ({"slots": 2, "capacity": 33}, "context of 32"),
    ],
)
def test_sizes_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        make_engine(FAMILIES["llama"], **given)
