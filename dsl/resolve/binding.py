"""Match arguments and attributes with what a function or kind takes, and evaluate them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import attribute_use, wrong_values
from tunelang.dsl.messages.attribute_use import Owner
from tunelang.dsl.resolve.scope import Module
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data, types
from tunelang.dsl.vocabulary.base import Attribute, Function, Node, attributes
from tunelang.dsl.vocabulary.raw_values import INVALID, Invalid, Word

Entry = tuple[nodes.Name | None, nodes.Expr, Span]
"""Name, value and place of an argument or attribute."""


@dataclass(frozen=True)
class Place:
    """The place of a call and of each of its arguments.

    Keeps the value alive, so that no other value gets its identity.
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

    def value(
        self, node: nodes.Expr, want: types.Type, attribute: Attribute | None = None
    ) -> object:
        """Evaluate an expression; return `INVALID` after a report."""


def bind_call(
    evaluator: Evaluation,
    function: type[Function],
    head: nodes.Name,
    call: nodes.Call,
    receiver: dict[str, object],
) -> Node | Invalid:
    """Return the value of a call; `INVALID` after a report.

    `receiver` has the field that a method's left side becomes.
    """
    variadic = getattr(function, "variadic", None)
    if variadic is not None:
        return _bind_variadic(evaluator, function, variadic, head, call, receiver)
    owner = Owner(f"`{head.text}`", "function", head.span.to(call.span))
    spans: dict[str, Span] = {}
    bound = bind(evaluator, entries(call), attributes(function), owner, spans)
    if isinstance(bound, Invalid):
        return INVALID
    return record_place(evaluator, function.unvalidated(**receiver, **bound), owner.span, spans)


def record_place(
    evaluator: Evaluation, value: Node, span: Span, arguments: dict[str, Span]
) -> Node:
    """Record the place of a value for the rules, and return the value."""
    evaluator.places[id(value)] = Place(value, span, arguments)
    return value


_VARIADIC: dict[str, types.Type] = {
    "settings": types.Anything(), "split": types.Share(), "by_source": types.Of("reward"),
}  # fmt: skip
"""Function that takes any names -> the type of its arguments."""


def _bind_variadic(
    evaluator: Evaluation,
    function: type[Function],
    field: str,
    head: nodes.Name,
    call: nodes.Call,
    receiver: dict[str, object],
) -> Node | Invalid:
    """Bind a function that takes any names; its `field` holds them."""
    want = _VARIADIC[function.word]
    values: dict[str, object] = {}
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
            values[name] = _plain_setting(values[name])
    if failed or INVALID in values.values():
        return INVALID
    span = head.span.to(call.span)
    if not values:
        evaluator.complain(attribute_use.needs_names(span, function.word))
        return INVALID
    if function is data.Split:
        shares = {name: share for name, share in values.items() if isinstance(share, float)}
        if sum(shares.values()) >= 1 or "train" in shares:
            evaluator.complain(wrong_values.split_too_large(call.span, shares))
            return INVALID
    return record_place(evaluator, function.unvalidated(**receiver, **{field: values}), span, spans)


def bind(
    evaluator: Evaluation,
    entries: list[Entry],
    known: dict[str, Attribute],
    owner: Owner,
    spans: dict[str, Span] | None = None,
) -> dict[str, object] | Invalid:
    """Match entries with attributes and evaluate them: field -> value; `INVALID` after reports.

    Every error is reported: unknown, repeated and missing names, and each value. `spans` receives
    the place of each value.
    """
    binding = _Binding(evaluator, entries, known, owner, {} if spans is None else spans)
    for name, node, span in entries:
        attribute = binding.match(name, node, span)
        if attribute is None:
            binding.failed = True
            mark_used(node, evaluator.module)
        else:
            binding.bind(attribute, node, span)
    binding.check_missing()
    return INVALID if binding.failed else binding.values


class _Binding:
    """The attributes of one owner, as far as they are bound."""

    def __init__(
        self,
        evaluator: Evaluation,
        entries: list[Entry],
        known: dict[str, Attribute],
        owner: Owner,
        spans: dict[str, Span],
    ) -> None:
        self.evaluator, self.known, self.owner, self.spans = evaluator, known, owner, spans
        self.written = {name.text for name, _, _ in entries if name is not None}
        self.positional = [attribute for attribute in known.values() if attribute.positional]
        self.values: dict[str, object] = {}
        self.entries: dict[str, Span] = {}
        self.unknown: list[str] = []
        self.unnamed = False
        self.failed = False

    def match(self, name: nodes.Name | None, node: nodes.Expr, span: Span) -> Attribute | None:
        """Return the attribute that an entry is for; None after a report."""
        if name is None:
            if self.positional:
                return self.positional.pop(0)
            self.unnamed = True
            free = [a for a in self.known.values() if a.name not in self.written]
            self.evaluator.complain(attribute_use.needs_name(span, self.owner.title, free))
            return None
        attribute = self.known.get(name.text)
        if attribute is None:
            self.unknown.append(name.text)
            self.evaluator.complain(
                attribute_use.unknown_attribute(
                    name.span, name.text, node.span, self.owner, self.known, self.written
                )
            )
            meant = attribute_use.misspelt(name.text, self.owner, list(self.known))
            if meant is not None and meant not in self.written:
                attribute = self.known[meant]  # continue as if it were spelt correctly
        if attribute in self.positional:
            self.positional.remove(attribute)
        return attribute

    def bind(self, attribute: Attribute, node: nodes.Expr, span: Span) -> None:
        """Evaluate an entry for its attribute."""
        name = attribute.name
        if name in self.entries:
            first = self.entries[name]
            self.evaluator.complain(attribute_use.repeated(span, name, self.owner.title, first))
            self.failed = True
            return
        self.entries[name] = span
        self.spans[name] = node.span
        with self.evaluator.at(name):
            self.evaluator.origin(node.span)
            value = self.evaluator.value(node, attribute.type, attribute)
        self.failed = self.failed or value is INVALID
        self.values[name] = value

    def check_missing(self) -> None:
        """Report required attributes that no entry binds, unless another error explains them."""
        missing = [a for a in self.known.values() if a.required and a.name not in self.entries]
        if not missing:
            return
        self.failed = True
        renamed = attribute_use.meant_by(self.unknown, self.owner)
        missing = [attribute for attribute in missing if attribute.name not in renamed]
        if self.owner.noun == "function" and len(self.unknown) >= len(missing):
            return  # misnamed, not missing
        if missing and not self.owner.damaged and not self.unnamed:
            self.evaluator.complain(attribute_use.missing_attribute(self.owner, missing))


def entries(call: nodes.Call) -> list[Entry]:
    """Return the arguments of a call."""
    return [(a.name, a.value, a.span) for a in call.arguments]


def _plain_setting(value: object) -> object:
    """Return the value of a setting as plain data: without units and words."""
    if isinstance(value, tuple):
        return tuple(_plain_setting(item) for item in value)
    if isinstance(value, Word):
        return value.text
    return getattr(value, "value", value)


def mark_used(node: nodes.Expr, module: Module) -> None:
    """Count the names in an expression as used that is not evaluated after an error."""
    for part in nodes.walk(node):
        if isinstance(part, nodes.Name):
            symbol = module.names.get(part.text)
            if symbol is not None:
                symbol.used = True
