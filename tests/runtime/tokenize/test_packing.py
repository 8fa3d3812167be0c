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


def corpus(
    folder: Path, count: int = 60, context: int = 64, seed: int = 1, **settings: Any
) -> Corpus:
    name = write_jsonl(folder / "d.jsonl", questions(count))
    stream = library(folder, d=jsonl(name, **settings)).stream(ref(), seed=seed)
    return tokenise(stream, bytes_renderer(), context=context, cache=folder / "cache")


def epochs(value: float = 1) -> Measure:
    return Measure(value=value, unit="epochs")


def segments(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The examples of a batch as ids and mask, with the invariants of each checked."""
    found = []
    for row in range(len(batch.tokens)):
        numbers = batch.segments[row]
        used = int((numbers > 0).sum())
        assert (numbers[used:] == 0).all()
        assert not batch.mask[row, used:].any()
        assert (np.diff(numbers[:used]) >= 0).all()
        for number in range(1, int(numbers.max()) + 1):
            own = numbers == number
            assert np.array_equal(batch.positions[row, own], np.arange(own.sum()))
            assert not batch.mask[row, own][0]
            ids, mask = batch.tokens[row, own].tolist(), batch.mask[row, own].tolist()
            found.append((tuple(ids), tuple(mask)))
    return found


def whole(corpus: Corpus, positions: int) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    pairs = corpus.tokens(np.arange(positions))
    return [(tuple(ids.tolist()), tuple(mask.tolist())) for ((ids, mask),) in pairs]


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=80), capacity=st.integers(50, 120))
def test_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    bins, count = first_fit_decreasing(lengths, capacity)
    loads = np.bincount(bins, lengths, count) if lengths else np.zeros(0)
    assert (loads <= capacity).all()
    assert (loads > 0).all()
    # As a plain search does it.
    rooms: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        fitting = [at for at, room in enumerate(rooms) if room >= lengths[item]]
        at = fitting[0] if fitting else len(rooms)
        rooms += [capacity] if at == len(rooms) else []
        rooms[at] -= lengths[item]
        assert bins[item] == at
    assert count == len(rooms)


def test_items_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="an item of 9 for bins of 8"):
        first_fit_decreasing([9], 8)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [7, 60, 1000])
def test_nothing_is_lost(tmp_path: Path, packed: bool, window: int) -> None:
    made = corpus(tmp_path)
    table = plan(made, epochs(), batch=1, packed=packed, longest=100, window=window)
    found = [item for step in range(table.steps) for item in segments(batch_of(table, made, step))]
    assert sorted(found) == sorted(whole(made, 60))
    assert sorted(table.items.tolist()) == list(range(60))
    assert table.useful == pytest.approx(made.lengths(np.arange(60)).sum() / table.steps / 100)
    if not packed:
        assert table.steps == 60
        assert found == whole(made, 60)


@pytest.mark.parametrize("packed", [True, False])
def test_random_access_and_resume(tmp_path: Path, packed: bool) -> None:
    made = corpus(tmp_path)
    table = plan(made, epochs(3), batch=4, packed=packed, window=16)
    sequence = [batch_of(table, made, step) for step in range(table.steps)]
    again = plan(corpus(tmp_path), epochs(3), batch=4, packed=packed, window=16)
    for step in (table.steps - 1, 2, 0):
        resumed = batch_of(again, made, step)
        for name in ("tokens", "mask", "segments", "positions"):
            assert np.array_equal(getattr(resumed, name), getattr(sequence[step], name))
    other = corpus(tmp_path, seed=2)
    moved = plan(other, epochs(3), batch=4, packed=packed, window=16)
    assert not np.array_equal(batch_of(moved, other, 0).tokens, sequence[0].tokens)


def test_shape_and_types(tmp_path: Path) -> None:
    made = corpus(tmp_path)
    table = plan(made, epochs(), batch=3, packed=True, longest=128)
    batch = batch_of(table, made, 0)
    for name, dtype in (("tokens", "int32"), ("mask", "bool"), ("segments", "int32")):
        assert getattr(batch, name).shape == (3, 128)
        assert getattr(batch, name).dtype == dtype
    with pytest.raises(IndexError):
        batch_of(table, made, table.steps)


def test_a_batch_in_tokens() -> None:
    assert sequences_of(Measure(value=1_000_000, unit="tokens"), 2048) == 488
    assert sequences_of(Measure(value=64, unit="sequences"), 2048) == 64
    with pytest.raises(ValueError, match="1000 tokens"):
        sequences_of(Measure(value=1000, unit="tokens"), 2048)


def test_lengths(tmp_path: Path) -> None:
    made = corpus(tmp_path)

    def table(value: float, unit: str) -> Table:
        return plan(made, Measure(value=value, unit=unit), batch=4, packed=True, window=20)

    assert table(9, "steps").steps == 9
    one, two = table(1, "epochs"), table(2, "epochs")
    assert set(one.items) >= set(range(60))
    assert set(two.items) >= set(range(120))
    needed = table(5000, "tokens")
    used = needed.tokens.reshape(-1, 4).sum(1).cumsum()
    assert used[-1] >= 5000 > used[-2]


def test_bins_of_a_window_are_not_sorted_by_length(tmp_path: Path) -> None:
    """First-fit decreasing puts the long examples in front: a curriculum that nobody asked for."""
    made = corpus(tmp_path, count=200)
    table = plan(made, epochs(), batch=1, packed=True)
    longest = [
        made.lengths(table.items[a:b]).max()
        for a, b in zip(table.starts, table.starts[1:], strict=False)
    ]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


def test_the_shares_of_a_mixture_after_packing(tmp_path: Path) -> None:
    kinds = {
        name: jsonl(write_jsonl(tmp_path / f"{name}.jsonl", questions(50, name))) for name in "ab"
    }
    parts = tuple(
        data.Weighted(of=ref(name), weight=weight) for name, weight in (("a", 0.8), ("b", 0.2))
    )
    stream = library(tmp_path, **kinds).stream(data.Mixture(parts=parts), seed=0)
    made = tokenise(stream, bytes_renderer(), context=64, cache=tmp_path)
    table = plan(made, epochs(4), batch=8, packed=True)
    sources, _ = made.order.locate(table.items)
    assert abs((sources == 0).mean() - 0.8) < 0.02


# The context.


@pytest.mark.parametrize("policy", ["drop", "cut", "stop"])
def test_long_rows(tmp_path: Path, policy: str) -> None:
    if policy == "stop":
        with pytest.raises(BadRowError) as caught:
            corpus(tmp_path, context=20, on_long_row=policy)
        assert caught.value.row == "d.jsonl:4"
        return
    made = corpus(tmp_path, context=20, on_long_row=policy)
    lengths = made.lengths(np.arange(made.order.epoch))
    assert lengths.max() <= 20
    kept = [n for n in range(60) if len(f"{n}?\n" + "yes " * (n % 7 + 1)) + 2 <= 20]
    assert made.order.epoch == (60 if policy == "cut" else len(kept))
    assert made.bad.counts["TooLongError"] == (0 if policy == "cut" else 60 - len(kept))


def test_a_cut_that_leaves_no_answer_drops_the_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x" * 40, "a": "y"}, {"q": "x", "a": "y" * 40}])
    stream = library(tmp_path, d=jsonl("d.jsonl", on_long_row="cut")).stream(ref(), seed=0)
    made = tokenise(stream, bytes_renderer(), context=20, cache=tmp_path)
    [(_, mask)] = whole(made, made.order.epoch)
    assert any(mask)


def test_plain_text_is_cut_into_pieces_that_predict_every_token_once(tmp_path: Path) -> None:
    body = "".join(chr(97 + n % 26) for n in range(333))
    (tmp_path / "a.txt").write_text(body)
    stream = library(tmp_path, d=data.TextFiles(path=("a.txt",))).stream(ref(), seed=0)
    renderer = bytes_renderer()
    made = tokenise(stream, renderer, context=32, cache=tmp_path)
    predicted = {}
    for ((ids, mask),) in made.tokens(np.arange(made.order.epoch)):
        assert len(ids) <= 32
        assert not mask[0]
        assert mask[1:].all()
        predicted[tuple(ids.tolist())] = ids[1:].tolist()
    tokens = renderer.tokens(next(stream.once()))
    assert sum(map(len, predicted.values())) == len(tokens) - 1
    flat = [id for ids in predicted.values() for id in ids]
    assert sorted(flat) == sorted(tokens.ids[1:])


def test_plain_text_under_the_other_policies(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 50)

    def made(policy: str) -> Corpus:
        kind = data.TextFiles(path=("a.txt",), on_long_row=policy)
        stream = library(tmp_path, d=kind).stream(ref(), seed=0)
        return tokenise(stream, bytes_renderer(), context=32, cache=tmp_path)

    cut = made("cut")
    assert cut.order.epoch == 1
    assert cut.lengths(np.arange(1)).tolist() == [32]
    with pytest.raises(BadRowError):
        made("stop")


def test_rows_without_an_answer_are_dropped_each_time(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x", "a": " "}, {"q": "x", "a": "y"}])
    for _ in range(2):  # the second time from the cache
        stream = library(tmp_path, d=jsonl("d.jsonl")).stream(ref(), seed=0)
        made = tokenise(stream, bytes_renderer(), context=20, cache=tmp_path)
        assert made.order.epoch == 1
        assert made.bad.counts == {"EmptyMaskError": 1}
        assert made.bad.shown[0].row == "d.jsonl:1"


def test_no_row_with_an_answer_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x", "a": " "}])
    stream = library(tmp_path, d=jsonl("d.jsonl")).stream(ref(), seed=0)
    with pytest.raises(NoRowsError) as caught:
        tokenise(stream, bytes_renderer(), context=20, cache=tmp_path)
    assert caught.value.dropped.counts == {"EmptyMaskError": 1}


def test_a_template_that_fails_names_the_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"q": "x", "a": "y"}])
    stream = library(tmp_path, d=jsonl("d.jsonl")).stream(ref(), seed=0)
    failing = open_renderer(models.Bytes(chat="{{ nothing.at.all }}"), Path(), cache=Path())
    with pytest.raises(BadRowError) as caught:
        tokenise(stream, failing, context=20, cache=tmp_path)
    assert (caught.value.source, caught.value.row) == ("d", "d.jsonl:1")


def test_the_cache_follows_the_template(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", questions(3))

    def tokens(chat: str, expression: DataExpression) -> list[Any]:
        stream = library(tmp_path, d=jsonl("d.jsonl")).stream(expression, seed=0, shuffled=False)
        made = open_renderer(models.Bytes(chat=chat), Path(), cache=Path())
        return whole(tokenise(stream, made, context=200, cache=tmp_path), 3)

    mapped = data.Map(of=ref(), prompt=text("Q: {q}"))
    plain, chatml, other = tokens("plain", ref()), tokens("chatml", ref()), tokens("plain", mapped)
    assert plain != chatml
    assert plain != other
    assert tokens("plain", ref()) == plain


def test_gsm8k(tmp_path: Path) -> None:
    """On real lengths: over 98% useful, where padding alone leaves 20%."""
    kind = data.Jsonl(
        path=(str(shared("gsm8k/train.jsonl")),),
        prompt=text("{question}"),
        response=text("{answer}"),
    )
    cut = data.Take(of=ref(), count=1500)
    stream = library(tmp_path, d=kind).stream(cut, seed=0)
    path = str(shared("llama2-tokenizer/tokenizer.model"))
    made = tokenise(
        stream,
        open_renderer(models.SentencePiece(path=path, chat="chatml"), tmp_path, cache=tmp_path),
        context=1024,
        cache=tmp_path,
    )
    assert plan(made, epochs(), batch=1, packed=True).useful > 0.97
    assert plan(made, epochs(), batch=1, packed=False).useful < 0.25
