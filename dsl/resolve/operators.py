"""Operators over numbers with units, text, rewards and data."""

from __future__ import annotations

from collections.abc import Callable

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import malformed, wrong_values
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary import data, rewards
from tunelang.dsl.vocabulary.base import DataExpression, RewardExpression
from tunelang.dsl.vocabulary.raw_values import INVALID

Complain = Callable[[Diagnostic], None]
_COMPARE = ("==", "!=", "<", "<=", ">", ">=")


class _Sum(DataExpression):
    """Data added up so far; `finish` makes a mixture of it."""

    word = ""
    parts: tuple[object, ...]
    spans: tuple[object, ...]


def unary(operator: str, value: object, span: Span, complain: Complain) -> object:
    """Apply `-x`, `+x` or `not x`."""
    if value is INVALID:
        return INVALID
    if operator == "not" and isinstance(value, bool):
        return not value
    if operator in "+-" and isinstance(value, Quantity):
        sign = -1 if operator == "-" else 1
        return Quantity(sign * value.value, value.dimension)
    if operator in "+-" and isinstance(value, RewardExpression):
        if operator == "+":
            return value
        minus = rewards.RewardConstant.unvalidated(value=-1.0)
        return rewards.RewardOperator.unvalidated(operator="*", operands=(minus, value))
    complain(wrong_values.wrong_operand(span, operator, (value,)))
    return INVALID


def binary(
    operator: str, left: object, right: object, span: Span, right_span: Span, complain: Complain
) -> object:
    """Apply `left operator right`; return the value, or `INVALID` after a report."""
    if operator in ("and", "or"):
        if isinstance(left, bool) and isinstance(right, bool):
            return (left and right) if operator == "and" else (left or right)
    elif isinstance(left, Quantity) and isinstance(right, Quantity):
        return _numbers(operator, left, right, span, right_span, complain)
    elif isinstance(left, RewardExpression) or isinstance(right, RewardExpression):
        return _rewards(operator, left, right, span, complain)
    elif isinstance(left, DataExpression) or isinstance(right, DataExpression):
        return _data(operator, left, right, span, right_span, complain)
    elif operator in ("==", "!=") and type(left) is type(right):
        return (left == right) is (operator == "==")
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        return left + right
    complain(wrong_values.wrong_operand(span, operator, (left, right)))
    return INVALID


def _numbers(
    operator: str, left: Quantity, right: Quantity, span: Span, right_span: Span, complain: Complain
) -> object:
    a, b = left.value, right.value
    one, other = left.dimension, right.dimension
    if operator in ("+", "-") or operator in _COMPARE:
        if one != other:
            complain(wrong_values.unit_mismatch(span, operator, left, right))
            return INVALID
        if operator in _COMPARE:
            return {"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[
                operator
            ]
        return Quantity(a + b if operator == "+" else a - b, one)
    if operator == "/":
        if b == 0:
            complain(wrong_values.division_by_zero(right_span))
            return INVALID
        if other not in (None, "%", one):
            complain(wrong_values.unit_mismatch(span, operator, left, right))
            return INVALID
        ratio = a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b
        return Quantity(ratio, None if one == other else one)
    if one not in (None, "%") and other not in (None, "%"):
        complain(wrong_values.unit_mismatch(span, operator, left, right))
        return INVALID
    dimension = one if one not in (None, "%") else other if other not in (None, "%") else None
    if one == "%" and other == "%":
        dimension = "%"
    product = a * b
    if isinstance(product, float) and (product != product or abs(product) > 1e300):
        complain(malformed.number_too_large(span))
        return INVALID
    if isinstance(product, int) and abs(product) > 10**300:
        complain(malformed.number_too_large(span))
        return INVALID
    if (
        isinstance(product, float)
        and dimension is not None
        and abs(product - round(product)) < 1e-9
    ):
        product = round(product)
    return Quantity(product, dimension)


def _rewards(operator: str, left: object, right: object, span: Span, complain: Complain) -> object:
    operands: list[RewardExpression] = []
    for value in (left, right):
        if isinstance(value, Quantity) and value.dimension in (None, "%"):
            operands.append(rewards.RewardConstant.unvalidated(value=float(value.value)))
        elif isinstance(value, RewardExpression):
            operands.append(value)
    if len(operands) < 2:
        complain(wrong_values.wrong_operand(span, operator, (left, right)))
        return INVALID
    if operator == "/" and operands[1] == rewards.RewardConstant.unvalidated(value=0.0):
        complain(wrong_values.division_by_zero(span))
        return INVALID
    first = operands[0]
    if (
        operator in ("+", "*")
        and isinstance(first, rewards.RewardOperator)
        and first.operator == operator
    ):
        return rewards.RewardOperator.unvalidated(
            operator=operator, operands=(*first.operands, operands[1])
        )
    return rewards.RewardOperator.unvalidated(operator=operator, operands=tuple(operands))


def _data(
    operator: str, left: object, right: object, span: Span, right_span: Span, complain: Complain
) -> object:
    if operator == "*":
        weight, of = (left, right) if isinstance(left, Quantity) else (right, left)
        if isinstance(weight, Quantity) and isinstance(of, DataExpression):
            if weight.dimension != "%":
                complain(wrong_values.weight_not_percent(span, weight))
                return INVALID
            if not 0 < weight.value <= 1:
                complain(wrong_values.share_out_of_range(span, "a weight", weight))
                return INVALID
            if isinstance(of, data.Split) and of.part is None:
                complain(wrong_values.split_needs_part(right_span, of))
                return INVALID
            return data.Weighted.unvalidated(of=of, weight=float(weight.value))
    if operator == "+" and isinstance(left, DataExpression) and isinstance(right, DataExpression):
        if isinstance(left, _Sum):
            return _Sum.unvalidated(parts=(*left.parts, right), spans=(*left.spans, right_span))
        first = Span(span.source, span.start, right_span.start)
        return _Sum.unvalidated(parts=(left, right), spans=(first, right_span))
    complain(wrong_values.wrong_operand(span, operator, (left, right)))
    return INVALID


def finish(value: object, span: Span, complain: Complain) -> object:
    """Return the value of a sequence of operators; data that was added needs weights, which
    sum to 100%.
    """
    if not isinstance(value, _Sum):
        return value
    weights = [part.weight if isinstance(part, data.Weighted) else None for part in value.parts]
    if None in weights:
        complain(wrong_values.mixture_without_weights(span, len(weights), any(weights)))
        return INVALID
    if abs(sum(weights) - 1) > 1e-9:  # type: ignore[arg-type]
        complain(wrong_values.weights(span, weights))  # type: ignore[arg-type]
        return INVALID
    return data.Mixture.unvalidated(parts=value.parts)
