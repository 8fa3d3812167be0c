"""Packing: nothing is lost, nothing crosses a sequence, and steps have random access."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.data_helpers import jsonl, library, questions, ref, shared, text, write_jsonl
from tunelang.dsl.vocabulary import data, models
from tunelang.dsl.vocabulary.base import DataExpression, Measure
from tunelang.runtime.data.row_errors import BadRowError, NoRowsError
from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.tokenize.open_tokenizer import open_renderer
from tunelang.runtime.tokenize.packing import (
    Batch,
    Table,
    batch_of,
    first_fit_decreasing,
    plan,
    sequences_of,
)
from tunelang.runtime.tokenize.token_cache import Corpus, tokenise


def bytes_renderer() -> Renderer:
    return open_renderer(models.Bytes(chat="plain"), Path(), cache=Path())


def make_corpus(
    folder: Path, count: int = 60, context: int = 64, seed: int = 1, **settings: Any
) -> Corpus:
    name = write_jsonl(folder / "d.jsonl", questions(count))
    stream = library(folder, d=jsonl(name, **settings)).stream(ref(), seed=seed)
    return tokenise(stream, bytes_renderer(), context=context, cache=folder / "cache")


def epochs(value: float = 1) -> Measure:
    return Measure(value=value, unit="epochs")


def segments(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Ids and masks of the segments of a batch, whose invariants are checked."""
    items = []
    for row in range(len(batch.tokens)):
        numbers = batch.segments[row]
        used = int((numbers > 0).sum())
        assert (numbers[used:] == 0).all()
        assert not batch.mask[row, used:].any()
        assert (np.diff(numbers[:used]) >= 0).all()
        for number in range(1, int(numbers.max()) + 1):
            in_segment = numbers == number
            assert np.array_equal(batch.positions[row, in_segment], np.arange(in_segment.sum()))
            assert not batch.mask[row, in_segment][0]
            ids, mask = batch.tokens[row, in_segment].tolist(), batch.mask[row, in_segment].tolist()
            items.append((tuple(ids), tuple(mask)))
    return items


def all_segments(corpus: Corpus, positions: int) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    pairs = corpus.tokens(np.arange(positions))
    return [(tuple(ids.tolist()), tuple(mask.tolist())) for ((ids, mask),) in pairs]


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=80), capacity=st.integers(50, 120))
def test_first_fit_decreasing_equals_the_plain_algorithm(lengths: list[int], capacity: int) -> None:
    bins, count = first_fit_decreasing(lengths, capacity)
    loads = np.bincount(bins, lengths, count) if lengths else np.zeros(0)
    assert (loads <= capacity).all()
    assert (loads > 0).all()
    # As a plain search does it.
    rooms: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda bin: -lengths[bin]):
        fitting = [bin for bin, room in enumerate(rooms) if room >= lengths[item]]
        bin = fitting[0] if fitting else len(rooms)
        rooms += [capacity] if bin == len(rooms) else []
        rooms[bin] -= lengths[item]
        assert bins[item] == bin
    assert count == len(rooms)


def test_items_longer_than_the_capacity_raise() -> None:
    with pytest.raises(ValueError, match="an item of 9 for bins of 8"):
        first_fit_decreasing([9], 8)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [7, 60, 1000])
def test_packing_loses_no_item(tmp_path: Path, packed: bool, window: int) -> None:
    corpus = make_corpus(tmp_path)
    table = plan(corpus, epochs(), batch=1, packed=packed, longest=100, window=window)
    packed_items = [
        item for step in range(table.steps) for item in segments(batch_of(table, corpus, step))
    ]
    assert sorted(packed_items) == sorted(all_segments(corpus, 60))
    assert sorted(table.items.tolist()) == list(range(60))
    assert table.useful == pytest.approx(corpus.lengths(np.arange(60)).sum() / table.steps / 100)
    if not packed:
        assert table.steps == 60
        assert packed_items == all_segments(corpus, 60)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_have_random_access(tmp_path: Path, packed: bool) -> None:
    corpus = make_corpus(tmp_path)
    table = plan(corpus, epochs(3), batch=4, packed=packed, window=16)
    sequence = [batch_of(table, corpus, step) for step in range(table.steps)]
    again = plan(make_corpus(tmp_path), epochs(3), batch=4, packed=packed, window=16)
    for step in (table.steps - 1, 2, 0):
        resumed = batch_of(again, corpus, step)
        for name in ("tokens", "mask", "segments", "positions"):
            assert np.array_equal(getattr(resumed, name), getattr(sequence[step], name))
    other = make_corpus(tmp_path, seed=2)
    moved = plan(other, epochs(3), batch=4, packed=packed, window=16)
    assert not np.array_equal(batch_of(moved, other, 0).tokens, sequence[0].tokens)


def test_batches_have_the_planned_shape_and_types(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    table = plan(corpus, epochs(), batch=3, packed=True, longest=128)
    batch = batch_of(table, corpus, 0)
    for name, dtype in (("tokens", "int32"), ("mask", "bool"), ("segments", "int32")):
        assert getattr(batch, name).shape == (3, 128)
        assert getattr(batch, name).dtype == dtype
    with pytest.raises(IndexError):
        batch_of(table, corpus, table.steps)


def test_batch_in_tokens_is_rounded_down_to_sequences() -> None:
    assert sequences_of(Measure(value=1_000_000, unit="tokens"), 2048) == 488
    assert sequences_of(Measure(value=64, unit="sequences"), 2048) == 64
    with pytest.raises(ValueError, match="1000 tokens"):
        sequences_of(Measure(value=1000, unit="tokens"), 2048)


def test_steps_follow_from_the_length_of_the_stage(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)

    def table(value: float, unit: str) -> Table:
        return plan(corpus, Measure(value=value, unit=unit), batch=4, packed=True, window=20)

    assert table(9, "steps").steps == 9
    one, two = table(1, "epochs"), table(2, "epochs")
    assert set(one.items) >= set(range(60))
    assert set(two.items) >= set(range(120))
    needed = table(5000, "tokens")
    used = needed.tokens.reshape(-1, 4).sum(1).cumsum()
    assert used[-1] >= 5000 > used[-2]


def test_bins_of_a_window_are_not_sorted_by_length(tmp_path: Path) -> None:
    """First-fit decreasing would put long examples first: an unintended curriculum."""
    corpus = make_corpus(tmp_path, count=200)
    table = plan(corpus, epochs(), batch=1, packed=True)
    longest = [
        corpus.lengths(table.items[a:b]).max()
        for a, b in zip(table.starts, table.starts[1:], strict=False)
    ]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


def test_packing_keeps_the_shares_of_a_mixture(tmp_path: Path) -> None:
    kinds = {
        name: jsonl(write_jsonl(tmp_path / f"{name}.jsonl", questions(50, name))) for name in "ab"
    }
    parts = tuple(
        data.Weighted(of=ref(name), weight=weight) for name, weight in (("a", 0.8), ("b", 0.2))
    )
    stream = library(tmp_path, **kinds).stream(data.Mixture(parts=parts), seed=0)
    corpus = tokenise(stream, bytes_renderer(), context=64, cache=tmp_path)
    table = plan(corpus, epochs(4), batch=8, packed=True)
    sources, _ = corpus.order.locate(table.items)
    assert abs((sources == 0).mean() - 0.8) < 0.02


# The context.


@pytest.mark.parametrize("policy", ["drop", "cut", "stop"])
def test_long_rows_are_cut_or_dropped_by_policy(tmp_path: Path, policy: str) -> None:
    if policy == "stop":
        with pytest.raises(BadRowError) as caught:
            make_corpus(tmp_path, context=20, on_long_row=policy)
        assert caught.value.row == "d.jsonl:4"
        return
    corpus = make_corpus(tmp_path, context=20, on_long_row=policy)
    lengths = corpus.lengths(np.arange(corpus.order.epoch))
    assert lengths.max() <= 20
    fitting = [n for n in range(60) if len(f"{n}?\n" + "yes " * (n % 7 + 1)) + 2 <= 20]
    assert corpus.order.epoch == (60 if policy == "cut" else len(fitting))
    assert corpus.bad.counts["TooLongError"] == (0 if policy == "cut" else 60 - len(fitting))


def test_cut_that_leaves_no_answer_drops_the_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x" * 40, "a": "y"}, {"q": "x", "a": "y" * 40}])
    stream = library(tmp_path, d=jsonl("d.jsonl", on_long_row="cut")).stream(ref(), seed=0)
    corpus = tokenise(stream, bytes_renderer(), context=20, cache=tmp_path)
    [(_, mask)] = all_segments(corpus, corpus.order.epoch)
    assert any(mask)


def test_divided_plain_text_predicts_every_token_once(tmp_path: Path) -> None:
    body = "".join(chr(97 + n % 26) for n in range(333))
    (tmp_path / "a.txt").write_text(body)
    stream = library(tmp_path, d=data.TextFiles(path=("a.txt",))).stream(ref(), seed=0)
    renderer = bytes_renderer()
    corpus = tokenise(stream, renderer, context=32, cache=tmp_path)
    predicted = {}
    for ((ids, mask),) in corpus.tokens(np.arange(corpus.order.epoch)):
        assert len(ids) <= 32
        assert not mask[0]
        assert mask[1:].all()
        predicted[tuple(ids.tolist())] = ids[1:].tolist()
    tokens = renderer.tokens(next(stream.once()))
    assert sum(map(len, predicted.values())) == len(tokens) - 1
    flat = [id for ids in predicted.values() for id in ids]
    assert sorted(flat) == sorted(tokens.ids[1:])


def test_plain_text_follows_the_other_policies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 50)

    def corpus(policy: str) -> Corpus:
        kind = data.TextFiles(path=("a.txt",), on_long_row=policy)
        stream = library(tmp_path, d=kind).stream(ref(), seed=0)
        return tokenise(stream, bytes_renderer(), context=32, cache=tmp_path)

    cut = corpus("cut")
    assert cut.order.epoch == 1
    assert cut.lengths(np.arange(1)).tolist() == [32]
    with pytest.raises(BadRowError):
        corpus("stop")


def test_rows_without_an_answer_are_dropped_on_every_start(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x", "a": " "}, {"q": "x", "a": "y"}])
    for _ in range(2):  # the second time from the cache
        stream = library(tmp_path, d=jsonl("d.jsonl")).stream(ref(), seed=0)
        corpus = tokenise(stream, bytes_renderer(), context=20, cache=tmp_path)
        assert corpus.order.epoch == 1
        assert corpus.bad.counts == {"EmptyMaskError": 1}
        assert corpus.bad.shown[0].row == "d.jsonl:1"


def test_data_without_answers_raises(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x", "a": " "}])
    stream = library(tmp_path, d=jsonl("d.jsonl")).stream(ref(), seed=0)
    with pytest.raises(NoRowsError) as caught:
        tokenise(stream, bytes_renderer(), context=20, cache=tmp_path)
    assert caught.value.dropped.counts == {"EmptyMaskError": 1}


def test_failing_template_names_the_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x", "a": "y"}])
    stream = library(tmp_path, d=jsonl("d.jsonl")).stream(ref(), seed=0)
    failing = open_renderer(models.Bytes(chat="{{ nothing.at.all }}"), Path(), cache=Path())
    with pytest.raises(BadRowError) as caught:
        tokenise(stream, failing, context=20, cache=tmp_path)
    assert (caught.value.source, caught.value.row) == ("d", "d.jsonl:1")


def test_cache_depends_on_the_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", questions(3))

    def tokens(chat: str, expression: DataExpression) -> list[Any]:
        stream = library(tmp_path, d=jsonl("d.jsonl")).stream(expression, seed=0, shuffled=False)
        corpus = open_renderer(models.Bytes(chat=chat), Path(), cache=Path())
        return all_segments(tokenise(stream, corpus, context=200, cache=tmp_path), 3)

    mapped = data.Map(of=ref(), prompt=text("Q: {q}"))
    plain, chatml, other = tokens("plain", ref()), tokens("chatml", ref()), tokens("plain", mapped)
    assert plain != chatml
    assert plain != other
    assert tokens("plain", ref()) == plain


def test_packed_gsm8k_wastes_few_tokens(tmp_path: Path) -> None:
    """On real lengths, 98% of the tokens are useful; with padding alone, 20%."""
    kind = data.Jsonl(
        path=(str(shared("gsm8k/train.jsonl")),),
        prompt=text("{question}"),
        response=text("{answer}"),
    )
    cut = data.Take(of=ref(), count=1500)
    stream = library(tmp_path, d=kind).stream(cut, seed=0)
    path = str(shared("llama2-tokenizer/tokenizer.model"))
    corpus = tokenise(
        stream,
        open_renderer(models.SentencePiece(path=path, chat="chatml"), tmp_path, cache=tmp_path),
        context=1024,
        cache=tmp_path,
    )
    assert plan(corpus, epochs(), batch=1, packed=True).useful > 0.97
    assert plan(corpus, epochs(), batch=1, packed=False).useful < 0.25
