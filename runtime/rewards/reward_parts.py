"""The parts of a reward: each word of the language as a function over rows.

A scorer returns for each row a number or the reason why there is none; it does not raise. Functions
of the user, verifiers and regular expressions may take for ever, so they run in processes
(`worker_pool.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunelang.dsl.vocabulary.base import RewardExpression, TextExpression
from tunelang.dsl.vocabulary.custom import COMPLETION_TOKENS, Python
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
from tunelang.runtime.workers.worker_process import Arguments

TIMEOUT = 10.0
"""Seconds for one verifier or regular expression; a `python` reward has its own `timeout`."""


@dataclass(frozen=True)
class CompletionRow:
    """A completion and the fields that a reward can read."""

    fields: Arguments
    """The fields of the data and the roles, `completion` among them."""
    source: str
    """The name of the data that the prompt came from."""
    tokens: int
    """Number of tokens of the completion, the stop token included."""
    token_texts: Callable[[], list[str]] = list
    """Returns the texts of those tokens, which join to the completion."""


Scorer = Callable[[Sequence[CompletionRow]], Sequence[Result]]
"""Returns for each row its value, the values of its tokens, or the reason why it has none."""


@dataclass(frozen=True)
class RewardContext:
    """The declarations and sizes of a spec that a reward refers to."""

    declared: Mapping[str, RewardExpression] = field(default_factory=dict)
    """Declared reward -> its expression."""
    scorers: Mapping[str, Callable[[], Scorer]] = field(default_factory=dict)
    """Declared reward of a kind of its own (a rubric) -> a function that makes its scorer."""
    on_error: Mapping[str, float] = field(default_factory=dict)
    """Declared reward of a kind of its own -> its value where it fails."""
    on_devices: frozenset[str] = frozenset()
    """Declared rewards that a model on the devices scores."""
    generators: Mapping[str, Procedural] = field(default_factory=dict)
    """Procedural data by name, for `verified`."""
    folder: Path = Path()
    """The folder of the spec, to which paths of `python` rewards are relative."""
    max_tokens: int = 0
    """Tokens of the longest completion, for `overlong`."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes for each part that needs some."""


class Pools:
    """The processes of one reward, shared by its parts."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pools: dict[tuple[str, float], Workers] = {}

    def get(self, target: Target, timeout: float) -> Workers:
        """Return the pool that calls a target; `timeout` is in seconds."""
        key = (repr(target), timeout)
        if key not in self._pools:
            self._pools[key] = Workers(target, timeout, self._workers)
        return self._pools[key]

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()


def scorer(leaf: RewardExpression, context: RewardContext, pools: Pools) -> Scorer:
    """Make the scorer of one part of a reward.

    Raises `LoadError` for a Python function or a generator that cannot be loaded, `ValueError` for
    an `overlong` whose buffer is longer than the longest completion.
    """
    match leaf:
        case NumericMatch():
            return _row_by_row(lambda row: _numeric_match(leaf, row))
        case Exact():
            return _row_by_row(lambda row: _exact(leaf, row))
        case Contains():
            return _row_by_row(lambda row: _contains(leaf, row))
        case Length():
            return _row_by_row(lambda row: float(row.tokens))
        case Overlong():
            if leaf.buffer > context.max_tokens:
                raise ValueError(f"overlong({leaf.buffer}) of at most {context.max_tokens} tokens")
            return _row_by_row(lambda row: overlong(row.tokens, context.max_tokens, leaf.buffer))
        case Matches():
            return _matches(leaf, pools)
        case Verified():
            return _verified(leaf, context.generators, pools)
        case Python():
            return _python(leaf, context.folder, pools)
    raise TypeError(f"{type(leaf).__name__} is not a part of a reward")


def overlong(tokens: int, max_tokens: int, buffer: int) -> float:
    """Return DAPO's soft penalty on long completions (arXiv:2503.14476, equation 13).

    0 up to `max_tokens - buffer`, then linear to -1 at `max_tokens`, and -1 beyond.
    """
    return max(-1.0, min(0.0, (max_tokens - buffer - tokens) / buffer))


def _row_by_row(score_row: Callable[[CompletionRow], Result]) -> Scorer:
    def score(row: CompletionRow) -> Result:
        try:
            return score_row(row)
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
    text = _text(leaf.text, row, leaf.ignore_case)
    target = _text(leaf.target, row, leaf.ignore_case)
    return float(text.strip() == target.strip())


def _contains(leaf: Contains, row: CompletionRow) -> Result:
    text, part = _text(leaf.text, row, leaf.ignore_case), _text(leaf.part, row, leaf.ignore_case)
    # Every text contains the empty one: a reward for nothing.
    return float(part in text) if part else "the text to look for is empty"


def _text(template: TextExpression, row: CompletionRow, ignore_case: bool) -> str:
    text = render(template, row.fields)
    return text.casefold() if ignore_case else text


def _matches(leaf: Matches, pools: Pools) -> Scorer:
    def arguments(row: CompletionRow) -> Arguments:
        return {"text": render(leaf.text, row.fields)}

    return lambda rows: _call(pools.get(("pattern", leaf.pattern), TIMEOUT), rows, arguments)


def _python(leaf: Python, folder: Path, pools: Pools) -> Scorer:
    pool = pools.get(function_of(leaf, folder), leaf.timeout)
    # Starting it now reports a function that cannot be loaded before the first batch.
    reads_tokens = COMPLETION_TOKENS in pool.start()[0]

    def arguments(row: CompletionRow) -> Arguments:
        return {**row.fields, COMPLETION_TOKENS: row.token_texts()} if reads_tokens else row.fields

    return lambda rows: _call(pool, rows, arguments)


def function_of(leaf: Python, folder: Path) -> Target:
    """Return the target that a worker loads for a function; its path is relative to `folder`."""
    path, _, function = leaf.reference.rpartition(":")
    return ("function", str((folder / Path(path).expanduser()).resolve()), function)


def _verified(leaf: Verified, generators: Mapping[str, Procedural], pools: Pools) -> Scorer:
    verifiers = {name: pools.get(_generator(data), TIMEOUT) for name, data in generators.items()}
    for pool in verifiers.values():
        pool.start()

    def arguments(row: CompletionRow) -> Arguments:
        entry = {name: lookup(name, row.fields) for name in ("question", "answer", "metadata")}
        return {**entry, "text": render(leaf.text, row.fields)}

    def score(rows: Sequence[CompletionRow]) -> Sequence[Result]:
        results: list[Result] = [f"`{row.source}` is not procedural data" for row in rows]
        for source, pool in verifiers.items():
            indices = [index for index, row in enumerate(rows) if row.source == source]
            if indices:
                values = _call(pool, [rows[index] for index in indices], arguments)
                for index, result in zip(indices, values, strict=True):
                    results[index] = result
        return results

    return score


def _generator(data: Procedural) -> Target:
    settings = dict(data.settings.values) if data.settings is not None else {}
    return ("verifier", data.task, {**settings, "size": data.size, "seed": data.seed})


def _call(
    pool: Workers,
    rows: Sequence[CompletionRow],
    arguments: Callable[[CompletionRow], Arguments],
) -> Sequence[Result]:
    """Call a pool with each row; a row whose arguments cannot be read gets the reason instead."""
    results: list[Result] = [""] * len(rows)
    sent: dict[int, Arguments] = {}
    for index, row in enumerate(rows):
        try:
            sent[index] = arguments(row)
        except (MissingFieldError, WrongTypeError) as error:
            results[index] = str(error)
    for index, result in zip(sent, pool.call_all(list(sent.values())), strict=True):
        results[index] = result
    return results
