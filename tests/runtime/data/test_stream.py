"""The order of examples is a function of (seed, step), in any mixture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.data_helpers import batch, jsonl, library, questions, ref, text, write_jsonl
from tunelang.dsl.vocabulary import data, models
from tunelang.dsl.vocabulary.base import Condition, DataExpression, Measure
from tunelang.runtime.data.examples import Example, texts_of
from tunelang.runtime.data.feistel import derive, permute
from tunelang.runtime.data.mixture import assign
from tunelang.runtime.data.row_errors import BadRowError, NoRowsError, TooLongError
from tunelang.runtime.data.sample_order import Order, batch_positions, steps_of
from tunelang.runtime.data.stream import Library, Stream
from tunelang.runtime.tokenize.open_tokenizer import open_renderer


@pytest.fixture
def sources(tmp_path: Path) -> Library:
    """Three sources of 40, 25 and 10 rows."""
    sources = {}
    for name, count in (("a", 40), ("b", 25), ("c", 10)):
        sources[name] = jsonl(write_jsonl(tmp_path / f"{name}.jsonl", questions(count, name)))
    return library(tmp_path, **sources)


def mixture(**weights: float) -> data.Mixture:
    parts = (data.Weighted(of=ref(name), weight=weight) for name, weight in weights.items())
    return data.Mixture(parts=tuple(parts))


def prompts(examples: list[Example]) -> list[str]:
    return [example.prompt or "" for example in examples]


def numbers(stream: Stream) -> list[int]:
    return [example.fields["n"] for example in stream.once()]


# Permutations.


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    permuted = permute(np.arange(size), size, seed)
    assert np.array_equal(np.sort(permuted), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 258, 1023, 1024, 1025, 4096, 65_537])
def test_permutations_of_sizes_around_powers_of_two_are_bijections(size: int) -> None:
    assert len(np.unique(permute(np.arange(size), size, 7))) == size


def test_permutation_has_random_access() -> None:
    permuted = permute(np.arange(10**6), 10**6, 5)
    some = np.array([999_999, 3, 123_456])
    assert np.array_equal(permute(some, 10**6, 5), permuted[some])


@pytest.mark.parametrize("size", [3, 8, 300])
def test_permutation_places_are_equally_likely(size: int) -> None:
    """Chi-square, over seeds, of where the first item goes; chance stays far below 5 sigma."""
    expected = 40 if size < 100 else 10
    trials = expected * size
    hits = np.bincount(
        [int(permute(np.array([0]), size, seed)[0]) for seed in range(trials)], minlength=size
    )
    chi = float(((hits - expected) ** 2 / expected).sum())
    assert abs(chi - (size - 1)) < 5 * np.sqrt(2 * (size - 1)) + 5


def test_permutations_equal_recorded_ones() -> None:
    """Results depend on the order of data: a new version must not change it."""
    assert permute(np.arange(8), 8, 1).tolist() == [1, 4, 5, 0, 6, 7, 2, 3]
    assert permute(np.arange(5), 1000, 1).tolist() == [691, 920, 50, 281, 451]


def test_indices_outside_of_the_range_raise() -> None:
    with pytest.raises(IndexError):
        permute(np.array([5]), 5, 0)


# Mixtures.


@settings(max_examples=40, deadline=None)
@given(
    shares=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    start=st.integers(0, 10**9),
    length=st.integers(1, 2000),
)
def test_sources_of_a_mixture_get_exact_shares_in_any_window(
    shares: list[int], start: int, length: int
) -> None:
    """Closer than 2 to the share of any stretch of examples, so within a batch's rounding."""
    total = sum(shares)
    assignment = assign(tuple(share / total for share in shares))
    sources, _ = assignment.locate(np.arange(start, start + length))
    counts = np.bincount(sources, minlength=len(shares))
    exact = np.array(shares) / total * length
    assert np.abs(counts - exact).max() < 2


@settings(max_examples=30, deadline=None)
@given(
    percents=st.lists(st.integers(1, 30), min_size=1, max_size=4), size=st.integers(1, 64),
    first=st.integers(0, 10**6), steps=st.integers(1, 20),
)  # fmt: skip
def test_sources_of_a_mixture_get_exact_shares_in_any_steps(
    percents: list[int], size: int, first: int, steps: int
) -> None:
    percents = [*percents, 100 - sum(percents)] if sum(percents) < 100 else [50, 50]
    order = Order((7,) * len(percents), tuple(p / 100 for p in percents), seed=1)
    sources, _ = order.locate(
        np.concatenate([batch_positions(first + s, size) for s in range(steps)])
    )
    counts = np.bincount(sources, minlength=len(percents))
    assert np.abs(counts - np.array(percents) / 100 * size * steps).max() < 2


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_assignment_stays_within_tijdemans_bound(shares: list[int]) -> None:
    assignment = assign(tuple(share / sum(shares) for share in shares))
    period = len(assignment.sources)
    exact = np.arange(period + 1)[:, None] * np.array(shares) / sum(shares)
    bound = 1 - 1 / (2 * len(shares) - 2)
    assert np.abs(assignment.counts - exact).max() <= bound + 1e-9


def test_shares_without_a_small_denominator_are_rounded() -> None:
    weights = (0.123456789, 0.5, 0.376543211)
    assignment = assign(weights)
    assert assignment.counts[-1] / len(assignment.sources) == pytest.approx(weights, abs=1e-5)


def test_mixture_counts_the_draws_of_each_source() -> None:
    sources, drawn = assign((0.5, 0.3, 0.2)).locate(np.arange(1000))
    for source in range(3):
        assert np.array_equal(drawn[sources == source], np.arange(np.sum(sources == source)))


def test_weights_of_nested_mixtures_multiply(sources: Library) -> None:
    inner = mixture(a=0.5, b=0.5)
    outer = data.Mixture(
        parts=(data.Weighted(of=inner, weight=0.6), data.Weighted(of=ref("c"), weight=0.4))
    )
    stream = sources.stream(outer, seed=0)
    assert [part.weight for part in stream.parts] == pytest.approx([0.3, 0.3, 0.4])
    assert len(stream) == 75
    heads = [prompt[0] for prompt in prompts(batch(stream, 0, 100))]
    assert {head: heads.count(head) for head in "abc"} == {"a": 30, "b": 30, "c": 40}


# Streams.

EXPRESSIONS: dict[str, DataExpression] = {
    "one source": ref("a"),
    "mixture": mixture(a=0.5, b=0.3, c=0.2),
    "methods": data.Repeat(of=data.Take(of=data.Shuffle(of=ref("a"), seed=2), count=30), times=2),
    "methods of a mixture": data.Skip(of=mixture(a=0.8, c=0.2), count=7),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_random_access_equals_sequential_reading_and_resuming(sources: Library, name: str) -> None:
    stream = sources.stream(EXPRESSIONS[name], seed=5)
    sequence = [prompts(batch(stream, step, 8)) for step in range(30)]
    for step in (29, 3, 17, 0):
        assert prompts(batch(stream, step, 8)) == sequence[step]
    again = sources.stream(EXPRESSIONS[name], seed=5)
    assert [prompts(batch(again, step, 8)) for step in range(12, 30)] == sequence[12:]
    assert [
        prompts(batch(sources.stream(EXPRESSIONS[name], seed=6), s, 8)) for s in range(30)
    ] != sequence


def test_epoch_has_every_example_once_in_a_new_order(sources: Library) -> None:
    stream = sources.stream(ref("a"), seed=3)
    epochs = [prompts(batch(stream, epoch, 40)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 40 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_source_repeats_only_when_it_is_used_up(sources: Library) -> None:
    stream = sources.stream(mixture(a=0.5, b=0.3, c=0.2), seed=3)
    drawn = prompts(batch(stream, 0, 200))
    for name, size in (("a", 40), ("b", 25), ("c", 10)):
        of_source = [prompt for prompt in drawn if prompt.startswith(name)]
        for start in range(0, len(of_source) - size, size):
            assert len(set(of_source[start : start + size])) == size


def test_evaluation_reads_in_the_order_of_the_file(sources: Library) -> None:
    assert numbers(sources.stream(ref("b"), seed=0, shuffled=False)) == list(range(25))


def test_take_skip_and_repeat_select_examples(sources: Library) -> None:
    def read(expression: DataExpression) -> list[int]:
        return numbers(sources.stream(expression, seed=0, shuffled=False))

    taken = data.Take(of=ref("b"), count=4)
    assert read(taken) == [0, 1, 2, 3]
    assert read(data.Skip(of=ref("b"), count=22)) == [22, 23, 24]
    assert read(data.Repeat(of=taken, times=2)) == [0, 1, 2, 3] * 2
    assert read(data.Take(of=ref("b"), count=1000)) == list(range(25))
    both = sorted(read(taken) + read(data.Skip(of=ref("b"), count=4)))
    assert both == list(range(25))
    with pytest.raises(NoRowsError):
        read(data.Skip(of=ref("b"), count=25))


def test_take_and_skip_partition_a_mixture(sources: Library) -> None:
    mixed = mixture(a=0.5, b=0.3, c=0.2)

    def read(expression: DataExpression) -> list[str]:
        return prompts(list(sources.stream(expression, seed=0, shuffled=False).once()))

    taken, skipped = read(data.Take(of=mixed, count=30)), read(data.Skip(of=mixed, count=30))
    assert (len(taken), len(skipped)) == (30, 45)
    assert sorted(taken + skipped) == sorted(read(mixed))
    assert sum(prompt.startswith("a") for prompt in taken) == 15


def test_shuffle_depends_on_its_seed_alone(sources: Library) -> None:
    def first(seed: int, run: int) -> list[int]:
        cut = data.Take(of=data.Shuffle(of=ref("a"), seed=seed), count=10)
        return sorted(numbers(sources.stream(cut, seed=run)))

    assert first(1, 0) == first(1, 99) != first(2, 0)


def test_map_replaces_templates_of_roles(sources: Library) -> None:
    mapped = data.Map(of=ref("a"), prompt=text("Q: {q}"), system=text("Be {n}."))
    example = batch(sources.stream(mapped, seed=0, shuffled=False), 0, 2)[1]
    assert (example.prompt, example.system, example.response) == ("Q: a1?", "Be 1.", "yes yes ")


def test_texts_of_an_example_include_every_role_of_the_model(sources: Library) -> None:
    mapped = data.Map(of=ref("a"), system=text("S"), target=text("not read by a model"))
    example = batch(sources.stream(mapped, seed=0, shuffled=False), 0, 1)[0]
    assert list(texts_of(example)) == ["S", "a0?", "yes "]


def compare(operator: str, name: str, value: Any) -> data.Operator:
    operands = (data.FieldValue(name=name), data.Literal(value=value))
    return data.Operator(operator=operator, operands=operands)


def both(operator: str, *conditions: Condition) -> data.Operator:
    return data.Operator(operator=operator, operands=conditions)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (compare("<", "n", 3), [0, 1, 2]),
        (both("not", compare("<", "n", 22)), [22, 23, 24]),
        (both("and", compare(">=", "n", 3), compare("<=", "n", 4)), [3, 4]),
        (both("or", compare("==", "q", "b7?"), compare("==", "n", 2)), [2, 7]),
        (both("==", both("*", data.FieldValue(name="n"), data.Literal(value=2)),
              data.Literal(value=10)), [5]),
        (both(">", both("-", data.FieldValue(name="n")), data.Literal(value=-2)), [0, 1]),
        (data.Literal(value=True), list(range(25))),
        (compare("<", "length", 5), [0, 7, 14, 21]),
    ],
)  # fmt: skip
def test_where_keeps_examples_that_meet_the_condition(
    sources: Library, condition: Condition, expected: list[int]
) -> None:
    filtered = data.Where(of=ref("b"), condition=condition)
    stream = sources.stream(
        filtered, seed=0, shuffled=False, measure=lambda e: len(e.response or "")
    )
    assert numbers(stream) == expected


def test_where_drops_rows_with_fields_of_other_types(tmp_path: Path) -> None:
    rows = [{"q": "x", "a": "y", "n": n} for n in (1, "2", None, "three", [4], True)]
    sources = library(tmp_path, d=jsonl(write_jsonl(tmp_path / "d.jsonl", rows)))
    filtered = data.Where(of=ref(), condition=compare(">=", "n", 1))
    stream = sources.stream(filtered, seed=0, shuffled=False)
    # Text that reads as a number is one, as in CSV; the others are bad rows, not silent misses.
    assert numbers(stream) == [1, "2"]
    assert stream.bad.counts == {"WrongTypeError": 4}


def test_where_on_length_counts_tokens_of_the_rendered_chat(sources: Library) -> None:
    def tokens(chat: str) -> Callable[[Example], int]:
        renderer = open_renderer(models.Bytes(chat=chat), Path(), cache=Path())
        return lambda example: len(renderer.tokens(example))

    filtered = data.Where(of=ref("c"), condition=compare("<=", "length", 10))
    # <start> c 0 ? \n y e s and a space, <end>
    stream = sources.stream(filtered, seed=0, shuffled=False, measure=tokens("plain"))
    assert numbers(stream) == [0, 7]
    with pytest.raises(BadRowError) as caught:
        sources.stream(filtered, seed=0, measure=tokens("{{ nothing.at.all }}"))
    assert caught.value.row == "c.jsonl:1"


def test_where_that_leaves_no_row_raises(sources: Library) -> None:
    with pytest.raises(NoRowsError):
        sources.stream(data.Where(of=ref("a"), condition=data.Literal(value=False)), seed=0)


def split(of: DataExpression, part: str, **parts: float) -> data.Split:
    return data.Split(of=of, parts=parts, part=part)


def test_splits_are_disjoint_and_stable(tmp_path: Path) -> None:
    rows = questions(600)
    sources = library(tmp_path, d=jsonl(write_jsonl(tmp_path / "d.jsonl", rows)))
    shares = {"test": 0.2, "valid": 0.1}
    parts = {
        part: set(numbers(sources.stream(split(ref(), part, **shares), seed=0)))
        for part in ("train", "test", "valid")
    }
    assert set.union(*parts.values()) == set(range(600))
    assert sum(map(len, parts.values())) == 600
    assert 90 < len(parts["test"]) < 150
    # Membership depends on the row alone: not on the seed, on its neighbours or on the order of
    # fields.
    more = [dict(reversed(row.items())) for row in [*questions(9, "new"), *rows]]
    wider = library(tmp_path, d=jsonl(write_jsonl(tmp_path / "e.jsonl", more)))
    again = wider.stream(split(ref(), "test", **shares), seed=9)
    old = {e.fields["n"] for e in again.once() if not str(e.prompt).startswith("new")}
    assert old == parts["test"]


def test_split_of_a_split_divides_by_another_hash(tmp_path: Path) -> None:
    sources = library(tmp_path, d=jsonl(write_jsonl(tmp_path / "d.jsonl", questions(400))))
    train = split(ref(), "train", test=0.5)
    inner = len(sources.stream(split(train, "valid", valid=0.5), seed=0))
    assert 60 < inner < 140


def test_equal_problems_fall_into_the_same_split(tmp_path: Path) -> None:
    rows = [{"q": "same", "a": "x"}] * 20 + questions(20)
    sources = library(tmp_path, d=jsonl(write_jsonl(tmp_path / "d.jsonl", rows)))
    counts = [
        sum(e.prompt == "same" for e in sources.stream(split(ref(), part, test=0.5), seed=0).once())
        for part in ("train", "test")
    ]
    assert sorted(counts) == [0, 20]


def test_prompts_longer_than_the_limit_are_dropped(sources: Library) -> None:
    stream = sources.stream(ref("b"), seed=0, shuffled=False)
    short = sources.drop_long(stream, lambda e: int(e.fields["n"]), 3)
    assert numbers(short) == [0, 1, 2, 3]
    assert short.bad.counts["TooLongError"] == 21
    assert isinstance(short.bad.shown[0].cause, TooLongError)


@pytest.mark.parametrize(
    ("value", "unit", "steps"),
    [(500, "steps", 500), (2, "epochs", 234), (0.5, "epochs", 59), (0.001, "epochs", 1)],
)
def test_steps_follow_from_length_and_batch(value: float, unit: str, steps: int) -> None:
    assert steps_of(Measure(value=value, unit=unit), epoch=7473, batch=64) == steps


def test_derived_seeds_differ_by_label() -> None:
    seeds = {derive(seed, label) for seed in range(50) for label in ("a", "b", 1)}
    assert len(seeds) == 150
