"""Reward expressions, compiled to one function over a batch of completions.

Every completion gets a finite number, whatever happens: where a part has no value for it (a
function raises, hangs or returns no number, a field is missing, a division by zero), a stated
value stands in, and an `Event` says which completion and why. Every part is also logged by
itself, under the name that it was declared by, or its own word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

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

Values = NDArray[np.float64]
Positions = NDArray[np.intp]

ON_ERROR = 0.0
"""What stands in for the value of a part that states none of its own (`on_error`)."""


@dataclass(frozen=True)
class Event:
    """A part had no value for a completion."""

    part: str
    row: int
    """Position in the batch."""
    why: str
    value: float
    """What stands in for it."""


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch."""

    values: Values
    """`[rows]`, the reward; finite."""
    parts: Mapping[str, Values]
    """Part -> `[rows]`; NaN where it was not asked, which is for another source's completion."""
    events: tuple[Event, ...]
    credit: Values | None = None
    """`[rows, tokens]`, how much of the reward each token has, where a function says; the rest is
    the last token's.
    """

    def metrics(self) -> dict[str, float]:
        """Mean and standard deviation of the reward and of each part, and the number of events."""
        metrics = {"reward_events": float(len(self.events))}
        for name, values in {"reward": self.values, **_prefixed(self.parts)}.items():
            asked = values[~np.isnan(values)]
            if asked.size:
                metrics[name] = float(asked.mean())
                metrics[f"{name}_std"] = float(asked.std())
        return metrics


@dataclass(frozen=True)
class _Batch:
    """A batch while it is scored."""

    rows: Sequence[CompletionRow]
    parts: dict[str, Values]
    credit: dict[str, Values]
    """Part -> `[rows, tokens]`, for parts that give each token its own."""
    events: list[Event]

    def stand_in(self, part: str, row: int, why: str, value: float) -> float:
        self.events.append(Event(part, row, why, value))
        return value


@dataclass(frozen=True)
class _Found:
    """The values `[rows]` of an expression, and what of them is of single tokens
    (`Scores.credit`).
    """

    values: Values
    credit: Values | None = None


_Evaluate = Callable[[_Batch, Positions], _Found]
"""Gives the values of an expression for some rows of a batch."""

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
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
    """A compiled reward; as a context manager it ends its processes when left.

    Making one raises `LoadError` (`workers.py`) for a Python function or a generator that cannot be
    loaded, so that it is known before the run, and `KeyError` for the name of a reward that is not
    among the surroundings.
    """

    def __init__(self, expression: RewardExpression, around: RewardContext) -> None:
        self._around = around
        self._pools = Pools(around.workers)
        self._declared: dict[str, _Evaluate] = {}
        self._names = {*around.declared, *around.scorers}
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
        at: TracebackType | None,
    ) -> None:
        self.close()

    def score(self, rows: Sequence[CompletionRow]) -> Scores:
        """Score each completion. Raises for nothing that a completion brings about."""
        batch = _Batch(rows, {}, {}, [])
        found = self._evaluate(batch, np.arange(len(rows)))
        return Scores(found.values, batch.parts, tuple(batch.events), found.credit)

    def submit(self, rows: Sequence[CompletionRow]) -> Future[Scores]:
        """`score` in a thread, so that the host scores while the devices sample. What a model on
        the devices scores is scored at once: programs over several devices that two threads launch
        may come to them in different orders, and wait for each other.
        """
        if self._around.on_devices.isdisjoint(self._declared):
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
        """Make the function of an expression, which logs under `name` if it was declared."""
        match node:
            case RewardConstant():
                evaluate: _Evaluate = lambda _, at: _Found(np.full(len(at), node.value))  # noqa: E731
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
                stated = node.on_error if isinstance(node, Python) else ON_ERROR
                evaluate = _leaf(scorer(node, self._around, self._pools), name, stated)
        return evaluate if name is None else _logged(name, evaluate)

    def _reference(self, name: str) -> _Evaluate:
        """Make the function of a declared reward once."""
        if name not in self._declared:
            make_scorer = self._around.scorers.get(name)
            if make_scorer is None:
                self._declared[name] = self._compile(self._around.declared[name], name)
            else:
                stated = self._around.on_error.get(name, ON_ERROR)
                self._declared[name] = _logged(name, _leaf(make_scorer(), name, stated))
        return self._declared[name]

    def _free_name(self, node: RewardExpression) -> str:
        """`exact`, then `exact_2`; for a Python function its own name."""
        word = node.word
        if isinstance(node, Python):
            word = node.name
        name, count = word, 1
        while name in self._names:
            count += 1
            name = f"{word}_{count}"
        self._names.add(name)
        return name


def _logged(name: str, evaluate: _Evaluate) -> _Evaluate:
    """Keep the values of a part in the batch, so that each row is scored by it once."""

    def run(batch: _Batch, at: Positions) -> _Found:
        values = batch.parts.setdefault(name, np.full(len(batch.rows), math.nan))
        new = at[np.isnan(values[at])]
        if new.size:
            found = evaluate(batch, new)
            values[new] = found.values
            if found.credit is not None:
                shape = len(batch.rows), found.credit.shape[1]
                batch.credit.setdefault(name, np.zeros(shape))[new] = found.credit
        credit = batch.credit.get(name)
        return _Found(values[at], None if credit is None else credit[at])

    return run


def _leaf(score: Scorer, name: str, stated: float) -> _Evaluate:
    def run(batch: _Batch, at: Positions) -> _Found:
        results = score([batch.rows[row] for row in at])
        values, credit = np.empty(len(at)), None
        for index, (row, result) in enumerate(zip(at.tolist(), results, strict=True)):
            tokens = batch.rows[row].tokens
            if isinstance(result, list) and len(result) != tokens:
                result = f"it returned {len(result)} numbers for {tokens} tokens"
            if not isinstance(result, str) and not math.isfinite(total := np.sum(result)):
                result = f"it returned {total}"
            if isinstance(result, str):
                result = batch.stand_in(name, row, result, stated)
            if isinstance(result, list):
                if credit is None:
                    credit = np.zeros((len(at), max(each.tokens for each in batch.rows)))
                credit[index, :tokens] = result
            values[index] = np.sum(result)
        return _Found(values, credit)

    return run


def _operation(operator: str, operands: Sequence[_Evaluate], name: str) -> _Evaluate:
    def run(batch: _Batch, at: Positions) -> _Found:
        values = [operand(batch, at) for operand in operands]
        with np.errstate(all="ignore"):
            found = reduce(partial(_combined, operator), values)
        why = "a division by zero" if operator == "/" else "the result is too large"
        for index in np.flatnonzero(~np.isfinite(found.values)):
            found.values[index] = batch.stand_in(name, int(at[index]), why, ON_ERROR)
            if found.credit is not None:
                found.credit[index] = 0
        return found

    return run


def _combined(operator: str, one: _Found, other: _Found) -> _Found:
    """Combine two operands. What tokens have adds up, and is scaled by the value of a completion;
    of the product of two such parts, or a comparison, nothing can be said for single tokens.
    """
    values = np.asarray(_OPERATORS[operator](one.values, other.values), np.float64)
    first, second = (0.0 if each.credit is None else each.credit for each in (one, other))
    credit: Any = None
    if one.credit is None and other.credit is None:
        pass
    elif operator in ("+", "-"):
        credit = _OPERATORS[operator](first, second)
    elif operator == "*" and (one.credit is None or other.credit is None):
        credit = first * other.values[:, None] + second * one.values[:, None]
    elif operator == "/" and other.credit is None:
        credit = first / other.values[:, None]
    return _Found(values, credit)


def _by_source(parts: Mapping[str, _Evaluate], name: str) -> _Evaluate:
    def run(batch: _Batch, at: Positions) -> _Found:
        values, credit = np.full(len(at), math.nan), None
        sources = np.array([batch.rows[row].source for row in at], dtype=object)
        for source, evaluate in parts.items():
            of = np.flatnonzero(sources == source)
            if of.size:
                found = evaluate(batch, at[of])
                values[of] = found.values
                if found.credit is not None:
                    if credit is None:
                        credit = np.zeros((len(at), found.credit.shape[1]))
                    credit[of] = found.credit
        for index in np.flatnonzero(np.isnan(values)):
            why = f"no reward for the source `{sources[index]}`"
            values[index] = batch.stand_in(name, int(at[index]), why, ON_ERROR)
        return _Found(values, credit)

    return run


def _prefixed(parts: Mapping[str, Values]) -> dict[str, Values]:
    return {f"reward/{name}": values for name, values in parts.items()}
