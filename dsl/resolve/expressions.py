"""The evaluator of expressions: looks up names, binds calls, applies operators, fits values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import imports_and_overrides, naming, wrong_values
from tunelang.dsl.messages.attribute_use import Owner
from tunelang.dsl.program import Origin
from tunelang.dsl.resolve import operators
from tunelang.dsl.resolve.binding import Place, bind, bind_call, entries, mark_used, record_place
from tunelang.dsl.resolve.each_calls import each_call, is_each
from tunelang.dsl.resolve.fit import Site, fit
from tunelang.dsl.resolve.scope import Module, Symbol
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data, rewards, types
from tunelang.dsl.vocabulary.base import (
    Attribute,
    DataExpression,
    Reference,
    attributes,
)
from tunelang.dsl.vocabulary.raw_values import INVALID, Invalid, RegexValue, Word
from tunelang.dsl.vocabulary.tables import FORMS, FUNCTIONS, KINDS, functions_of


@cache
def choice_words() -> frozenset[str]:
    """Return every word that is a choice of some attribute, and may be the value of a `let`."""
    kinds = [info.model for table in KINDS.values() for info in table.values()]
    return frozenset(
        word
        for model in [*kinds, *FUNCTIONS.values()]
        for attribute in attributes(model).values()
        if isinstance(attribute.type, types.Choice)
        for word in attribute.type.words
    )


@dataclass
class Evaluator:
    """Evaluates the expressions of one declaration."""

    module: Module
    complain: Callable[[Diagnostic], None]
    declared: Callable[[str], Symbol | None]
    folder: Path = field(default_factory=Path)
    """The folder of the spec."""
    origins: dict[str, Origin] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)
    """Identity of a call's value -> its places, for the rules."""
    choice: dict[Span, int] | None = None
    """Which value each `each` takes in this branch; None where `each` is not allowed."""
    path: list[str] = field(default_factory=list)
    forks: dict[Span, str] = field(default_factory=dict)
    """`each` call -> the attribute that it stands in, without the stage's own name."""

    # Places.

    @contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Evaluate a part of the value: its name is part of the path of origins."""
        self.path.append(part)
        try:
            yield
        finally:
            self.path.pop()

    def site(self, span: Span, want: Attribute | None = None) -> Site:
        """Return the site of a value that an attribute takes."""
        owner = f"`{self.path[-1]}`" if self.path else "this"
        example = want.example if want else ""
        return Site(span, owner, example, self.complain, self.declared, self.folder)

    # Expressions.

    def value(
        self, node: nodes.Expr, want: types.Type, attribute: Attribute | None = None
    ) -> object:
        """Evaluate an expression and fit it to a type; return `INVALID` after a report."""
        match node:
            case nodes.Group():
                return self.value(node.inner, want, attribute)
            case nodes.Conditional():
                test = self.value(node.test, types.Flag())
                both = [self.value(side, want, attribute) for side in (node.then, node.otherwise)]
                return INVALID if test is INVALID or INVALID in both else both[0 if test else 1]
            case nodes.Chain() if is_each(node):
                return self._each(node, want, attribute)
            case nodes.ListOf() if isinstance(want, types.ListOf):
                items = tuple(self.value(item, want.item, attribute) for item in node.items)
                if len(items) < want.low:
                    owner = self.site(node.span).owner
                    self.complain(wrong_values.empty_list(node.span, owner, want))
                    return INVALID
                return INVALID if INVALID in items else items
        if isinstance(want, types.ListOf):
            want_inside: types.Type = want.item
            if not _names_list(node, self.module):
                item = self.value(node, want_inside, attribute)
                return item if item is INVALID else (item,)
        if isinstance(want, types.Metric):
            return self._metric(node)
        if isinstance(want, types.Of) and want.family == "condition":
            test = self._condition(node)
            if isinstance(test, data.Literal | data.FieldValue):  # compares nothing
                self.complain(wrong_values.not_a_condition(node.span))
                return INVALID
            return test
        special = self._word(node, want)
        if special is not None:
            return special
        if isinstance(node, nodes.Constant) and node.value is None:
            if attribute is not None and attribute.optional:
                return None
        raw = self._raw(node, want)
        if raw is None and attribute is not None and attribute.optional:
            return None
        return fit(raw, want, self.site(node.span, attribute))

    def _raw(self, node: nodes.Expr, want: types.Type) -> object:
        match node:
            case nodes.Number():
                return INVALID if node.quantity is None else node.quantity
            case nodes.Text() | nodes.Constant():
                return node.value
            case nodes.Regex():
                return RegexValue(node.pattern, node)
            case nodes.Name():
                return self._name(node, want)
            case nodes.ListOf():
                items = tuple(self.value(item, types.Anything()) for item in node.items)
                return INVALID if INVALID in items else items
            case nodes.Chain():
                return self._chain(node, want)
            case nodes.Unary():
                operand = self.value(node.operand, types.Anything())
                return operators.unary(node.operator, operand, node.span, self.complain)
            case nodes.Operation():
                return self._operation(node)
        raise AssertionError(node)

    def _operation(self, node: nodes.Operation) -> object:
        left = self.value(node.first, types.Anything())
        span = node.first.span
        failed = left is INVALID
        for operator, operand in node.rest:
            right = self.value(operand, types.Anything())
            failed = failed or right is INVALID
            span = span.to(operand.span)
            if not failed:
                left = operators.binary(operator, left, right, span, operand.span, self.complain)
                failed = left is INVALID
        if failed:
            return INVALID
        return operators.finish(left, node.span, self.complain)

    def _word(self, node: nodes.Expr, want: types.Type) -> object:
        """Return the value of a bare word that the type gives a meaning; None for other words."""
        if not isinstance(node, nodes.Name):
            return None
        options = want.options if isinstance(want, types.Either) else (want,)
        for option in options:
            if isinstance(option, types.Choice) and node.text in option.words:
                return node.text
            if isinstance(option, types.Of):
                function = FUNCTIONS.get(node.text)
                if (
                    function is not None
                    and function.family == option.family
                    and hasattr(function, "bare")
                ):
                    return function.unvalidated()
        if node.text not in self.module.names and not self.module.excuses(node.text):
            for option in options:
                if isinstance(option, types.Choice) and option.words:
                    owner = self.site(node.span).owner
                    self.complain(
                        wrong_values.unknown_choice(node.span, owner, node.text, option.words)
                    )
                    return INVALID
        return None

    def _name(self, node: nodes.Name, want: types.Type) -> object:
        symbol = self.module.names.get(node.text)
        if symbol is not None:
            return self._symbol(symbol)
        if self.module.excuses(node.text):
            return INVALID
        if node.text in choice_words() and isinstance(want, types.Anything):
            return Word(node.text)
        self.complain(naming.unknown_name(node.span, node.text, self._candidates(want), want))
        return INVALID

    def _candidates(self, want: types.Type) -> list[str]:
        """Return names to suggest: declarations of the right noun, and functions of the family."""
        nouns: tuple[str, ...] = ()
        if isinstance(want, types.Ref):
            nouns = want.nouns
        elif isinstance(want, types.Of) and want.family in KINDS:
            nouns = (want.family,)
        fitting = [n for n, s in self.module.names.items() if not nouns or s.noun in nouns]
        if isinstance(want, types.Of):
            fitting += functions_of(want.family)
        return fitting

    def _symbol(self, symbol: Symbol) -> object:
        symbol.used = True
        if symbol.value is None or symbol.value is INVALID:
            return INVALID
        match symbol.noun:
            case "let" | "param":
                return None if isinstance(symbol.value, _NoneValue) else symbol.value
            case "data":
                return data.DataRef.unvalidated(name=symbol.name)
            case "reward":
                return rewards.RewardRef.unvalidated(name=symbol.name)
        return Reference.unvalidated(noun=symbol.noun, name=symbol.name)

    # Chains: calls, members, methods.

    def _chain(self, node: nodes.Chain, want: types.Type) -> object:
        links = list(node.links)
        head = node.head
        if isinstance(head, nodes.Name) and isinstance(links[0], nodes.Call):
            value = self._call(head, links.pop(0), want)  # type: ignore[arg-type]
            span = head.span.to(node.links[0].span)
        elif isinstance(head, nodes.Name) and self._is_prefix(head.text):
            member = links.pop(0)
            assert isinstance(member, nodes.Member)
            span = head.span.to(member.span)
            module = self.module.prefixes[head.text]
            symbol = module.names.get(member.name.text)
            if symbol is None:
                if not module.excuses(member.name.text):
                    names = list(module.names)
                    self.complain(
                        imports_and_overrides.unknown_in_import(
                            member.name.span, head.text, member.name.text, names
                        )
                    )
                return INVALID
            value = self._symbol(symbol)
        else:
            value = self.value(head, types.Anything())
            span = head.span
        while links and value is not INVALID:
            link = links.pop(0)
            span = span.to(link.span)
            if isinstance(link, nodes.Call):
                self.complain(naming.not_callable(link.span, value))
                return INVALID
            if links and isinstance(links[0], nodes.Call):
                call = links.pop(0)
                assert isinstance(call, nodes.Call)
                value = self._method(value, link.name, call)
            else:
                value = self._member(value, link.name)
        return value

    def _is_prefix(self, name: str) -> bool:
        return name in self.module.prefixes and name not in self.module.names

    def _method(self, value: object, name: nodes.Name, call: nodes.Call) -> object:
        if isinstance(value, DataExpression):
            if isinstance(value, data.Split) and value.part is None:
                self.complain(wrong_values.split_needs_part(name.span, value))
                return INVALID
            method = data.METHODS.get(name.text)
            if method is None:
                self.complain(
                    naming.unknown_method(name.span, name.text, value, list(data.METHODS))
                )
                return INVALID
            return bind_call(self, method, name, call, {"of": value})
        if isinstance(value, Reference) and value.noun == "stage" and name.text == "step":
            attribute = Attribute(
                "step",
                types.Whole(low=1),
                None,
                True,
                False,
                "",
                "baseline.step(500)",
                "result",
                True,
            )
            bound = bind(
                self, entries(call), {"step": attribute}, Owner("`step`", "function", name.span)
            )
            if isinstance(bound, Invalid):
                return INVALID
            return Reference.unvalidated(noun="stage", name=value.name, step=bound["step"])
        known = ["step"] if isinstance(value, Reference) and value.noun == "stage" else []
        self.complain(naming.unknown_method(name.span, name.text, value, known))
        return INVALID

    def _member(self, value: object, name: nodes.Name) -> object:
        if isinstance(value, data.Split) and value.part is None:
            parts = [*value.parts, "train"]
            if name.text in parts:
                part = value.model_copy(update={"part": name.text})
                return record_place(self, part, name.span, {})
            self.complain(naming.unknown_part(name.span, name.text, parts))
            return INVALID
        known = list(data.METHODS) if isinstance(value, DataExpression) else []
        self.complain(naming.unknown_method(name.span, name.text, value, known))
        return INVALID

    def _call(self, head: nodes.Name, call: nodes.Call, want: types.Type) -> object:
        function = FUNCTIONS.get(head.text)
        if function is None:
            if head.text in FORMS:
                raise AssertionError(head.text)
            symbol = self.module.names.get(head.text)
            if symbol is not None:
                self.complain(naming.not_a_function(head.span, symbol))
            else:
                family = want.family if isinstance(want, types.Of) else None
                near = list(functions_of(family)) if family else list(FUNCTIONS)
                self.complain(naming.unknown_function(head.span, head.text, near, list(FUNCTIONS)))
            for argument in call.arguments:
                mark_used(argument.value, self.module)
            return INVALID
        return bind_call(self, function, head, call, {})

    def origin(self, span: Span) -> None:
        """Record the place of the value at the current path."""
        kind = "override" if span.source.kind == "override" else "spec"
        self.origins[".".join(self.path)] = Origin(kind, span)  # type: ignore[arg-type]

    # Forms.

    def _each(self, node: nodes.Chain, want: types.Type, attribute: Attribute | None) -> object:
        call = each_call(node)
        if self.choice is None:
            self.complain(wrong_values.each_outside(node.span))
            return INVALID
        for argument in call.arguments:
            if argument.name is not None:
                self.complain(wrong_values.each_name(argument.name.span))
                return INVALID
        if len(call.arguments) < 2:
            inside = call.arguments[0].value if call.arguments else None
            listed = inside if isinstance(inside, nodes.ListOf) and len(inside.items) > 1 else None
            self.complain(wrong_values.each_too_few(node.span, len(call.arguments), listed))
            return INVALID
        chosen = call.arguments[self.choice.get(node.span, 0)].value
        self.origin(chosen.span)
        self.forks[node.span] = ".".join(self.path[2:])
        return self.value(chosen, want, attribute)

    def _metric(self, node: nodes.Expr) -> object:
        """Return a metric as `accuracy`, `accuracy.pass_at_k`, `loss` or `math.reward`; the
        rules check it against the stage.
        """
        names: list[str] = []
        if isinstance(node, nodes.Name):
            names = [node.text]
        elif isinstance(node, nodes.Chain) and isinstance(node.head, nodes.Name):
            if all(isinstance(link, nodes.Member) for link in node.links):
                names = [node.head.text, *(link.name.text for link in node.links)]  # type: ignore[union-attr]
        if not names:
            self.complain(wrong_values.not_a_metric(node.span))
            return INVALID
        symbol = self.module.names.get(names[0])
        if symbol is None and len(names) > 1 and self._is_prefix(names[0]):
            symbol = self.module.prefixes[names[0]].names.get(names[1])
            names = names[1:]
        if symbol is not None:
            symbol.used = symbol.used or symbol.noun == "data"
            return ".".join([symbol.name, *names[1:]])
        return ".".join(names)

    def _condition(self, node: nodes.Expr) -> object:
        match node:
            case nodes.Group():
                return self._condition(node.inner)
            case nodes.Name():
                return data.FieldValue.unvalidated(name=node.text)
            case nodes.Chain() if isinstance(node.head, nodes.Name) and all(
                isinstance(link, nodes.Member) for link in node.links
            ):
                parts = [node.head.text, *(link.name.text for link in node.links)]  # type: ignore[union-attr]
                return data.FieldValue.unvalidated(name=".".join(parts))
            case nodes.Number() | nodes.Text() | nodes.Constant():
                raw = self._raw(node, types.Anything())
                value = getattr(raw, "value", raw)
                return INVALID if raw is INVALID else data.Literal.unvalidated(value=value)
            case nodes.Unary():
                operand = self._condition(node.operand)
                if operand is INVALID:
                    return INVALID
                return data.Operator.unvalidated(operator=node.operator, operands=(operand,))
            case nodes.Operation():
                left = self._condition(node.first)
                for operator, operand in node.rest:
                    right = self._condition(operand)
                    if left is INVALID or right is INVALID:
                        return INVALID
                    left = data.Operator.unvalidated(operator=operator, operands=(left, right))
                return left
        self.complain(wrong_values.not_a_condition(node.span))
        return INVALID


class _NoneValue:
    """The value `none` of a `let`, as distinct from a symbol without a value."""


NONE_VALUE = _NoneValue()


def _names_list(node: nodes.Expr, module: Module) -> bool:
    """Return whether an expression is the name of a list, and so is no item of one."""
    if isinstance(node, nodes.Name):
        symbol = module.names.get(node.text)
        return symbol is not None and isinstance(symbol.value, tuple)
    if isinstance(node, nodes.Chain) and isinstance(node.head, nodes.Name):
        other = module.prefixes.get(node.head.text)
        link = node.links[0]
        if other is not None and isinstance(link, nodes.Member):
            symbol = other.names.get(link.name.text)
            return symbol is not None and isinstance(symbol.value, tuple)
    return False
