"""The parts of a reward: each word of the language as a function over rows.

A scorer gives each row a number, or says why it has none; it raises for neither. What the user
wrote, verifiers and regular expressions may take for ever and run in processes (`workers.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunelang.dsl.vocabulary.base import RewardExpression, TextExpression
from tunelang.dsl.vocabulary.custom import PIECES, Python
from tunelang.dsl.vocabulary.data import Procedural
from tunelang.dsl.vocabulary.rewards import (
    Contains,
    Exact,
    Length,
    Matches,
    NumericMatch,
    Overlong,
    Verified,
)
from tunelang.runtime.data.row_errors import MissingFieldError, WrongTypeError
from tunelang.runtime.data.text_templates import lookup, render
from tunelang.runtime.rewards import number_match
from tunelang.runtime.workers.worker_pool import Result, Target, Workers

TIMEOUT = 10.0
"""Seconds for one verifier or regular expression; a `python` reward states its own."""


@dataclass(frozen=True)
class CompletionRow:
    """A completion with what a reward may ask about it."""

    fields: Mapping[str, Any]
    """The fields of the data and the roles, `completion` among them."""
    source: str
    """The name of the data that the prompt came from."""
    tokens: int
    """Number of tokens of the completion, the stop token included."""
    pieces: Callable[[], list[str]] = list
    """The texts of those tokens, which join to the completion."""


Scorer = Callable[[Sequence[CompletionRow]], Sequence[Result]]
"""For each row its value, or those of its tokens, or why it has none."""


@dataclass(frozen=True)
class RewardContext:
    """What a reward refers to outside itself."""

    declared: Mapping[str, RewardExpression] = field(default_factory=dict)
    """Declared reward -> its expression."""
    scorers: Mapping[str, Callable[[], Scorer]] = field(default_factory=dict)
    """Declared reward of a kind of its own (a rubric) -> what makes what scores it."""
    on_error: Mapping[str, float] = field(default_factory=dict)
    """Declared reward of a kind of its own -> what stands in for a value that it has not."""
    on_devices: frozenset[str] = frozenset()
    """Declared rewards that a model on the devices scores."""
    generators: Mapping[str, Procedural] = field(default_factory=dict)
    """Procedural data by name, for `verified`."""
    folder: Path = Path()
    """What the paths of `python` rewards are relative to: the folder of the spec."""
    max_tokens: int = 0
    """The longest completion, for `overlong`."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes for each part that needs some."""


class Pools:
    """The processes of one reward, shared by its parts."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pools: dict[tuple[str, float], Workers] = {}

    def get(self, target: Target, timeout: float) -> Workers:
        """Find or make the pool that calls a target with a time-out in seconds."""
        key = (repr(target), timeout)
        if key not in self._pools:
            self._pools[key] = Workers(target, timeout, self._workers)
        return self._pools[key]

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()


def scorer(leaf: RewardExpression, around: RewardContext, pools: Pools) -> Scorer:
    """Make the scorer of one part.

    Raises `LoadError` for a Python function or a generator that cannot be loaded, `ValueError` for
    an `overlong` whose buffer is longer than the longest completion.
    """
    match leaf:
        case NumericMatch():
            return _each(lambda row: _numeric_match(leaf, row))
        case Exact():
            return _each(lambda row: _exact(leaf, row))
        case Contains():
            return _each(lambda row: _contains(leaf, row))
        case Length():
            return _each(lambda row: float(row.tokens))
        case Overlong():
            if leaf.buffer > around.max_tokens:
                raise ValueError(f"overlong({leaf.buffer}) of at most {around.max_tokens} tokens")
            return _each(lambda row: overlong(row.tokens, around.max_tokens, leaf.buffer))
        case Matches():
            return _matches(leaf, pools)
        case Verified():
            return _verified(leaf, around.generators, pools)
        case Python():
            return _python(leaf, around.folder, pools)
    raise TypeError(f"{type(leaf).__name__} is not a part of a reward")


def overlong(tokens: int, max_tokens: int, buffer: int) -> float:
    """Give DAPO's soft penalty on a completion of `tokens` tokens (arXiv:2503.14476, equation 13).

    0 up to `max_tokens - buffer`, then linear to -1 at `max_tokens`, and -1 beyond.
    """
    return max(-1.0, min(0.0, (max_tokens - buffer - tokens) / buffer))


def _each(one: Callable[[CompletionRow], Result]) -> Scorer:
    def score(row: CompletionRow) -> Result:
        try:
            return one(row)
        except (MissingFieldError, WrongTypeError) as error:
            return str(error)

    return lambda rows: [score(row) for row in rows]


def _numeric_match(leaf: NumericMatch, row: CompletionRow) -> Result:
    target = number_match.last_number(render(leaf.target, row.fields))
    if target is None:
        return "there is no number in the target"
    answer = number_match.last_number(render(leaf.text, row.fields))
    return float(answer is not None and number_match.equal(answer, target, leaf.tolerance))


def _exact(leaf: Exact, row: CompletionRow) -> Result:
    text, target = (_text(each, row, leaf.ignore_case) for each in (leaf.text, leaf.target))
    return float(text.strip() == target.strip())


def _contains(leaf: Contains, row: CompletionRow) -> Result:
    text, part = (_text(each, row, leaf.ignore_case) for each in (leaf.text, leaf.part))
    # Every text contains the empty one: a reward for nothing.
    return float(part in text) if part else "the text to look for is empty"


def _text(template: TextExpression, row: CompletionRow, ignore_case: bool) -> str:
    text = render(template, row.fields)
    return text.casefold() if ignore_case else text


def _matches(leaf: Matches, pools: Pools) -> Scorer:
    def arguments(row: CompletionRow) -> Mapping[str, Any]:
        return {"text": render(leaf.text, row.fields)}

    return lambda rows: _call(pools.get(("pattern", leaf.pattern), TIMEOUT), rows, arguments)


def _python(leaf: Python, folder: Path, pools: Pools) -> Scorer:
    pool = pools.get(function_of(leaf, folder), leaf.timeout)
    # A function that cannot be loaded is an error now, not at the first batch.
    asked = PIECES in pool.start()[0]

    def arguments(row: CompletionRow) -> Mapping[str, Any]:
        return {**row.fields, PIECES: row.pieces()} if asked else row.fields

    return lambda rows: _call(pool, rows, arguments)


def function_of(leaf: Python, folder: Path) -> Target:
    """Return what a worker loads for a function, whose path is relative to `folder`."""
    path, _, function = leaf.reference.rpartition(":")
    return ("function", str((folder / Path(path).expanduser()).resolve()), function)


def _verified(leaf: Verified, generators: Mapping[str, Procedural], pools: Pools) -> Scorer:
    verifiers = {name: pools.get(_generator(data), TIMEOUT) for name, data in generators.items()}
    for pool in verifiers.values():
        pool.start()

    def arguments(row: CompletionRow) -> Mapping[str, Any]:
        entry = {name: lookup(name, row.fields) for name in ("question", "answer", "metadata")}
        return {**entry, "text": render(leaf.text, row.fields)}

    def score(rows: Sequence[CompletionRow]) -> Sequence[Result]:
        results: list[Result] = [f"`{row.source}` is not procedural data" for row in rows]
        for source, pool in verifiers.items():
            at = [index for index, row in enumerate(rows) if row.source == source]
            if at:
                found = _call(pool, [rows[index] for index in at], arguments)
                for index, result in zip(at, found, strict=True):
                    results[index] = result
        return results

    return score


def _generator(data: Procedural) -> Target:
    settings = dict(data.settings.values) if data.settings is not None else {}
    return ("verifier", data.task, {**settings, "size": data.size, "seed": data.seed})


def _call(
    pool: Workers,
    rows: Sequence[CompletionRow],
    arguments: Callable[[CompletionRow], Mapping[str, Any]],
) -> Sequence[Result]:
    """Ask a pool about each row; one without arguments is not sent."""
    results: list[Result] = [""] * len(rows)
    sent: dict[int, Mapping[str, Any]] = {}
    for at, row in enumerate(rows):
        try:
            sent[at] = arguments(row)
        except (MissingFieldError, WrongTypeError) as error:
            results[at] = str(error)
    for at, result in zip(sent, pool.call_all(list(sent.values())), strict=True):
        results[at] = result
    return results
