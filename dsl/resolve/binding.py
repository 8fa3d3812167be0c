"""Match arguments and attributes with what a function or kind takes, and evaluate them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import attribute_use, wrong_values
from tunelang.dsl.messages.attribute_use import Owner
from tunelang.dsl.resolve.scope import Module
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data, types
from tunelang.dsl.vocabulary.base import Attribute, Function, Node, attributes
from tunelang.dsl.vocabulary.raw_values import INVALID, Word

Entry = tuple[nodes.Name | None, nodes.Expr, Span]
"""Name, value and place of an argument or attribute."""


@dataclass(frozen=True)
class Place:
    """Where a call stands, and each of its arguments. Holds the value, so that its identity stays
    its own.
    """

    value: Node
    span: Span
    arguments: dict[str, Span]


class Evaluation(Protocol):
    """The evaluator of the expressions of one declaration, as binding uses it."""

    module: Module
    places: dict[int, Place]

    @property
    def complain(self) -> Callable[[Diagnostic], None]:
        """Report a diagnostic."""

    def at(self, part: str) -> AbstractContextManager[None]:
        """Enter a part of the value under evaluation."""

    def origin(self, span: Span) -> None:
        """Record where the value at the current path was written."""

    def value(self, node: nodes.Expr, want: types.Type, attribute: Attribute | None = None) -> Any:
        """Evaluate an expression; return `INVALID` after a report."""


def bind_call(
    evaluator: Evaluation,
    function: type[Function],
    head: nodes.Name,
    call: nodes.Call,
    given: dict[str, Any],
) -> Any:
    """The value of a call: `given` fields, and its arguments; `INVALID` after reports."""
    variadic = getattr(function, "variadic", None)
    if variadic is not None:
        return _bind_variadic(evaluator, function, variadic, head, call, given)
    owner = Owner(f"`{head.text}`", "function", head.span.to(call.span))
    spans: dict[str, Span] = {}
    bound = bind(evaluator, entries(call), attributes(function), owner, spans)
    if bound is INVALID:
        return INVALID
    return placed(evaluator, function.unvalidated(**given, **bound), owner.span, spans)


def placed(evaluator: Evaluation, value: Node, span: Span, arguments: dict[str, Span]) -> Node:
    """Remember where a value stands, for the rules."""
    evaluator.places[id(value)] = Place(value, span, arguments)
    return value


def _bind_variadic(
    evaluator: Evaluation,
    function: type[Function],
    into: str,
    head: nodes.Name,
    call: nodes.Call,
    given: dict[str, Any],
) -> Any:
    """Functions that take any names: `settings`, `split`, `by_source`."""
    want: types.Type = {
        "settings": types.Anything(), "split": types.Share(), "by_source": types.Of("reward")
    }[function.word]  # fmt: skip
    values: dict[str, Any] = {}
    spans: dict[str, Span] = {}
    failed = False
    for argument in call.arguments:
        if argument.name is None:
            evaluator.complain(attribute_use.needs_names(argument.span, function.word))
            failed = True
            continue
        name = argument.name.text
        if name in values:
            evaluator.complain(attribute_use.repeated(argument.name.span, name, head.text))
            failed = True
        spans[name] = argument.name.span
        with evaluator.at(name):
            evaluator.origin(argument.span)
            values[name] = evaluator.value(argument.value, want)
        if isinstance(want, types.Anything):
            values[name] = _setting(values[name])
    if failed or INVALID in values.values():
        return INVALID
    if not values:
        evaluator.complain(attribute_use.needs_names(head.span.to(call.span), function.word))
        return INVALID
    if function is data.Split and (sum(values.values()) >= 1 or "train" in values):
        evaluator.complain(wrong_values.split_too_large(call.span, values))
        return INVALID
    return placed(
        evaluator, function.unvalidated(**given, **{into: values}), head.span.to(call.span), spans
    )


def bind(
    evaluator: Evaluation,
    entries: list[Entry],
    known: dict[str, Attribute],
    owner: Owner,
    spans: dict[str, Span] | None = None,
) -> Any:
    """Match names with attributes and evaluate: field -> value, or `INVALID` after reports.

    Everything that is wrong is reported: unknown, repeated and missing names, and each value.
    """
    bound: dict[str, Any] = {}
    seen: dict[str, Span] = {}
    values_at = {} if spans is None else spans
    failed = False
    places = [attribute for attribute in known.values() if attribute.positional]
    unknown: list[str] = []
    nameless = False
    given = {name.text for name, _, _ in entries if name is not None}
    for name, node, span in entries:
        attribute: Attribute | None
        if name is None:
            attribute = places.pop(0) if places else None
            if attribute is None:
                nameless = True
                open_ = [a for a in known.values() if a.name not in given]
                evaluator.complain(attribute_use.needs_name(span, owner.title, open_))
        else:
            attribute = known.get(name.text)
            if attribute is None:
                unknown.append(name.text)
                evaluator.complain(
                    attribute_use.unknown_attribute(
                        name.span, name.text, node.span, owner, known, given
                    )
                )
                meant = attribute_use.misspelt(name.text, owner, list(known))
                if meant is not None and meant not in given:
                    attribute = known[meant]  # go on as if it were written right
            if attribute in places:
                places.remove(attribute)
        if attribute is None:
            failed = True
            mark_used(node, evaluator.module)
            continue
        if attribute.name in seen:
            evaluator.complain(
                attribute_use.repeated(span, attribute.name, owner.title, seen[attribute.name])
            )
            failed = True
            continue
        seen[attribute.name] = span
        values_at[attribute.name] = node.span
        with evaluator.at(attribute.name):
            evaluator.origin(node.span)
            value = evaluator.value(node, attribute.type, attribute)
        failed = failed or value is INVALID
        bound[attribute.name] = value
    missing = [a for a in known.values() if a.required and a.name not in seen]
    if missing:
        failed = True
        taken_over = attribute_use.meant_by(unknown, owner)
        missing = [a for a in missing if a.name not in taken_over]
        if owner.noun == "function" and len(unknown) >= len(missing):
            missing = []  # misnamed rather than missing
        if missing and not owner.damaged and not nameless:
            evaluator.complain(attribute_use.missing_attribute(owner, missing))
    return INVALID if failed else bound


def entries(call: nodes.Call) -> list[Entry]:
    """The arguments of a call."""
    return [(a.name, a.value, a.span) for a in call.arguments]


def _setting(value: Any) -> Any:
    """The value of a generator's setting as plain data."""
    if isinstance(value, tuple):
        return tuple(_setting(item) for item in value)
    if isinstance(value, Word):
        return value.text
    return getattr(value, "value", value)


def mark_used(node: nodes.Expr, module: Module) -> None:
    """Names in an expression that is not evaluated are used all the same: no cascades."""
    for part in nodes.walk(node):
        if isinstance(part, nodes.Name):
            symbol = module.names.get(part.text)
            if symbol is not None:
                symbol.used = True
