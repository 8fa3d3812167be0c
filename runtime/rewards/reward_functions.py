"""Reward expressions, compiled to one function over a batch of completions.

Every completion gets a finite number: where a part has no value for it (a function raises, hangs or
returns no number, a field is missing, a division by zero), the value of `on_error` is used, and an
`Event` says which completion and why. Every part is also logged alone, under its declared name or
its word in the language.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from types import TracebackType
from typing import Self

import numpy as np
from jaxtyping import Float64, Int

from tunelang.dsl.vocabulary.base import RewardExpression
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.rewards import (
    BySource,
    RewardConstant,
    RewardOperator,
    RewardRef,
)
from tunelang.runtime.rewards.reward_parts import (
    CompletionRow,
    Pools,
    RewardContext,
    Scorer,
    scorer,
)

_Indices = Int[np.ndarray, " selected"]
"""Indices of rows of a batch."""

ON_ERROR = 0.0
"""The value of a part that fails and has no `on_error`."""


@dataclass(frozen=True)
class Event:
    """A part had no value for a completion."""

    part: str
    row: int
    """Index in the batch."""
    why: str
    value: float
    """The value used in its place."""


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch."""

    values: Float64[np.ndarray, " rows"]
    """The reward; finite."""
    parts: Mapping[str, Float64[np.ndarray, " rows"]]
    """Part -> its values; NaN where it does not apply to the source of the completion."""
    events: tuple[Event, ...]
    credit: Float64[np.ndarray, "rows tokens"] | None = None
    """The share of the reward that each token has, where a function returns one; the remainder
    belongs to the last token."""

    def metrics(self) -> dict[str, float]:
        """Return mean and standard deviation of the reward and its parts, and the event count."""
        metrics = {"reward_events": float(len(self.events))}
        parts = {f"reward/{name}": values for name, values in self.parts.items()}
        for name, values in {"reward": self.values, **parts}.items():
            known = values[~np.isnan(values)]
            if known.size:
                metrics[name] = float(known.mean())
                metrics[f"{name}_std"] = float(known.std())
        return metrics


@dataclass(frozen=True)
class _Batch:
    """A batch that is being scored, with the values so far."""

    rows: Sequence[CompletionRow]
    parts: dict[str, Float64[np.ndarray, " rows"]]
    credit: dict[str, Float64[np.ndarray, "rows tokens"]]
    """Part -> the value of each token, for parts that score tokens."""
    events: list[Event]

    def record_failure(self, part: str, row: int, why: str, value: float) -> float:
        """Record that a part has no value for a row; returns the value used in its place."""
        self.events.append(Event(part, row, why, value))
        return value


@dataclass(frozen=True)
class _RowValues:
    """The values of an expression, and their distribution over tokens (`Scores.credit`)."""

    values: Float64[np.ndarray, " selected"]
    credit: Float64[np.ndarray, "selected tokens"] | None = None


_Evaluate = Callable[[_Batch, _Indices], _RowValues]
"""Computes the values of an expression for some rows of a batch."""

_OPERATORS: dict[str, np.ufunc] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "==": np.equal,
    "!=": np.not_equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}


class CompiledReward:
    """A compiled reward; as a context manager it ends its processes on exit.

    The constructor raises `LoadError` for a Python function or a generator that cannot be loaded,
    before the run starts, and `KeyError` for the name of a reward that the context does not have.
    """

    def __init__(self, expression: RewardExpression, context: RewardContext) -> None:
        self._context = context
        self._pools = Pools(context.workers)
        self._declared: dict[str, _Evaluate] = {}
        self._names = {*context.declared, *context.scorers}
        self._driver = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        try:
            self._evaluate = self._compile(expression, None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def score(self, rows: Sequence[CompletionRow]) -> Scores:
        """Score each completion; no completion, whatever its text, makes this raise."""
        batch = _Batch(rows, {}, {}, [])
        result = self._evaluate(batch, np.arange(len(rows)))
        return Scores(result.values, batch.parts, tuple(batch.events), result.credit)

    def submit(self, rows: Sequence[CompletionRow]) -> Future[Scores]:
        """Score in a thread, so that the host scores while the devices sample.

        A reward that uses a model on the devices is scored at once: programs over several devices
        that two threads launch may reach them in different orders, and wait for each other.
        """
        if self._context.on_devices.isdisjoint(self._declared):
            return self._driver.submit(self.score, rows)
        done: Future[Scores] = Future()
        done.set_result(self.score(rows))
        return done

    def close(self) -> None:
        """End all processes and wait for the threads."""
        self._driver.shutdown(wait=False, cancel_futures=True)
        self._pools.close()
        self._driver.shutdown()

    def _compile(self, node: RewardExpression, name: str | None) -> _Evaluate:
        """Make the function of an expression; with a name it logs its values."""
        match node:
            case RewardConstant():
                evaluate = _constant(node.value)
            case RewardRef():
                evaluate = self._reference(node.name)
            case RewardOperator():
                operands = [self._compile(operand, None) for operand in node.operands]
                evaluate = _operation(node.operator, operands, name or node.operator)
            case BySource():
                parts = {s: self._compile(part, None) for s, part in node.sources.items()}
                evaluate = _by_source(parts, name or node.word)
            case _:
                name = name or self._free_name(node)
                on_error = node.on_error if isinstance(node, Python) else ON_ERROR
                evaluate = _leaf(scorer(node, self._context, self._pools), name, on_error)
        return evaluate if name is None else _logged(name, evaluate)

    def _reference(self, name: str) -> _Evaluate:
        """Return the function of a declared reward, made at the first reference."""
        if name not in self._declared:
            make_scorer = self._context.scorers.get(name)
            if make_scorer is None:
                self._declared[name] = self._compile(self._context.declared[name], name)
            else:
                on_error = self._context.on_error.get(name, ON_ERROR)
                self._declared[name] = _logged(name, _leaf(make_scorer(), name, on_error))
        return self._declared[name]

    def _free_name(self, node: RewardExpression) -> str:
        """Return an unused name: `exact`, then `exact_2`; for a Python function the function's."""
        word = node.word
        if isinstance(node, Python):
            word = node.name
        name, count = word, 1
        while name in self._names:
            count += 1
            name = f"{word}_{count}"
        self._names.add(name)
        return name


def _constant(value: float) -> _Evaluate:
    return lambda _, indices: _RowValues(np.full(len(indices), value, np.float64))


def _logged(name: str, evaluate: _Evaluate) -> _Evaluate:
    """Store the values of a part in the batch, so that the part scores each row once."""

    def run(batch: _Batch, indices: _Indices) -> _RowValues:
        values = batch.parts.setdefault(name, np.full(len(batch.rows), math.nan))
        new = indices[np.isnan(values[indices])]
        if new.size:
            result = evaluate(batch, new)
            values[new] = result.values
            if result.credit is not None:
                shape = len(batch.rows), result.credit.shape[1]
                batch.credit.setdefault(name, np.zeros(shape))[new] = result.credit
        credit = batch.credit.get(name)
        return _RowValues(values[indices], None if credit is None else credit[indices])

    return run


def _leaf(score: Scorer, name: str, on_error: float) -> _Evaluate:
    def run(batch: _Batch, indices: _Indices) -> _RowValues:
        results = score([batch.rows[row] for row in indices])
        values, credit = np.empty(len(indices)), None
        for index, (row, result) in enumerate(zip(indices.tolist(), results, strict=True)):
            tokens = batch.rows[row].tokens
            if isinstance(result, list) and len(result) != tokens:
                result = f"it returned {len(result)} numbers for {tokens} tokens"
            if not isinstance(result, str) and not math.isfinite(total := np.sum(result)):
                result = f"it returned {total}"
            if isinstance(result, str):
                result = batch.record_failure(name, row, result, on_error)
            if isinstance(result, list):
                if credit is None:
                    credit = np.zeros((len(indices), max(row.tokens for row in batch.rows)))
                credit[index, :tokens] = result
            values[index] = np.sum(result)
        return _RowValues(values, credit)

    return run


def _operation(operator: str, operands: Sequence[_Evaluate], name: str) -> _Evaluate:
    def run(batch: _Batch, indices: _Indices) -> _RowValues:
        values = [operand(batch, indices) for operand in operands]
        with np.errstate(all="ignore"):
            result = reduce(partial(_combined, operator), values)
        why = "a division by zero" if operator == "/" else "the result is too large"
        for index in np.flatnonzero(~np.isfinite(result.values)):
            result.values[index] = batch.record_failure(name, int(indices[index]), why, ON_ERROR)
            if result.credit is not None:
                result.credit[index] = 0
        return result

    return run


def _combined(operator: str, left: _RowValues, right: _RowValues) -> _RowValues:
    """Combine two operands.

    Credit of tokens adds up, and is scaled by the value of a completion; a product of two parts
    with credit, or a comparison, has none.
    """
    values = np.asarray(_OPERATORS[operator](left.values, right.values), np.float64)
    left_credit = 0.0 if left.credit is None else left.credit
    right_credit = 0.0 if right.credit is None else right.credit
    if left.credit is None and right.credit is None:
        return _RowValues(values)
    credit = None
    if operator in ("+", "-"):
        credit = _OPERATORS[operator](left_credit, right_credit)
    elif operator == "*" and (left.credit is None or right.credit is None):
        credit = left_credit * right.values[:, None] + right_credit * left.values[:, None]
    elif operator == "/" and right.credit is None:
        credit = left_credit / right.values[:, None]
    return _RowValues(values, credit)


def _by_source(parts: Mapping[str, _Evaluate], name: str) -> _Evaluate:
    def run(batch: _Batch, indices: _Indices) -> _RowValues:
        values, credit = np.full(len(indices), math.nan), None
        sources = np.array([batch.rows[row].source for row in indices], dtype=object)
        for source, evaluate in parts.items():
            selected = np.flatnonzero(sources == source)
            if selected.size:
                result = evaluate(batch, indices[selected])
                values[selected] = result.values
                if result.credit is not None:
                    if credit is None:
                        credit = np.zeros((len(indices), result.credit.shape[1]))
                    credit[selected] = result.credit
        for index in np.flatnonzero(np.isnan(values)):
            why = f"no reward for the source `{sources[index]}`"
            values[index] = batch.record_failure(name, int(indices[index]), why, ON_ERROR)
        return _RowValues(values, credit)

    return run
