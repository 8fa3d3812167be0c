"""Conditions of `where(...)` on one example: arithmetic, comparison and logic over its fields."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeGuard

from tunelang.dsl.vocabulary.base import Condition
from tunelang.dsl.vocabulary.data import FieldValue, Literal, Operator
from tunelang.runtime.data.examples import Example
from tunelang.runtime.data.row_errors import WrongTypeError
from tunelang.runtime.data.text_templates import lookup, python_scalar

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def condition_holds(
    condition: Condition, example: Example, measure: Callable[[Example], int] | None = None
) -> bool:
    """Return whether a condition holds; `measure` counts the tokens of an example, for `length`.

    Raises `MissingFieldError`, and `WrongTypeError` where an operator does not take a field's
    value.
    """
    value = _value(condition, example, measure)
    if not isinstance(value, bool):
        raise WrongTypeError(_describe(condition), "true or false", value)
    return value


def _value(
    condition: Condition, example: Example, measure: Callable[[Example], int] | None
) -> object:
    match condition:
        case Literal():
            return condition.value
        case FieldValue(name="length"):
            if measure is None:
                raise TypeError("`length` needs a tokenizer, and this use of the data has none")
            return measure(example)
        case FieldValue():
            return python_scalar(lookup(condition.name, example.fields))
        case Operator(operator=sign, operands=(operand,)):
            inner = _value(operand, example, measure)
            if sign == "not":
                return not _truth(operand, inner)
            number = _number(operand, inner)
            return -number if sign == "-" else number
        case Operator(operator="and" | "or" as sign, operands=(left, right)):
            # The right side may ask for a field that the left side makes sure of.
            first = _truth(left, _value(left, example, measure))
            if first is (sign == "or"):
                return first
            return _truth(right, _value(right, example, measure))
        case Operator(operator=sign, operands=(left, right)):
            one = _value(left, example, measure)
            other = _value(right, example, measure)
            return _binary(sign, (left, one), (right, other))
    raise TypeError(f"not a condition: {type(condition).__name__}")


def _binary(sign: str, left: tuple[Condition, object], right: tuple[Condition, object]) -> object:
    one, other = left[1], right[1]
    # CSV has no numbers, only text that reads as one.
    if isinstance(one, str) and _is_number(other):
        one = _as_number(one)
    elif isinstance(other, str) and _is_number(one):
        other = _as_number(other)
    if sign in ("==", "!="):
        return (one == other) is (sign == "==")
    if isinstance(one, str) and isinstance(other, str) and sign not in ("-", "*", "/"):
        return _BINARY[sign](one, other)
    first, second = _number(left[0], one), _number(right[0], other)
    if sign == "/" and second == 0:
        raise WrongTypeError(_describe(right[0]), "a number other than 0", other)
    return _BINARY[sign](first, second)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _number(condition: Condition, value: object) -> int | float:
    if not _is_number(value):
        raise WrongTypeError(_describe(condition), "a number", value)
    return value


def _truth(condition: Condition, value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongTypeError(_describe(condition), "true or false", value)
    return value


def _describe(condition: Condition) -> str:
    """Name the field that a condition reads first, for the report of a bad row."""
    match condition:
        case FieldValue():
            return condition.name
        case Literal():
            return repr(condition.value)
        case Operator():
            return _describe(condition.operands[0])
    return "the condition"
