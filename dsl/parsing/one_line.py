"""Expressions on one line, and the brackets inside them."""

from __future__ import annotations

from typing import TypeAlias

from tunelang.dsl.syntax import nodes, units
from tunelang.dsl.syntax.source import Span

Item: TypeAlias = nodes.Argument | nodes.Expr
"""An item of a bracket: an argument of a call, or an expression in a list."""


def inline_item(item: Item) -> str:
    """Return an item of a bracket on one line."""
    if isinstance(item, nodes.Argument):
        value = inline(item.value)
        return f"{item.name.text} = {value}" if item.name else value
    return inline(item)


def inline_call(call: nodes.Call) -> str:
    """Return the arguments of a call on one line, with their brackets."""
    return "(" + ", ".join(inline_item(a) for a in call.arguments) + ")"


def inline(node: nodes.Expr) -> str:
    """Return an expression on one line; text of several lines keeps them."""
    match node:
        case nodes.Name():
            return node.text
        case nodes.Number():
            return units.tidy(node.span.text)
        case nodes.ListOf():
            return "[" + ", ".join(inline(item) for item in node.items) + "]"
        case nodes.Group():
            return f"({inline(node.inner)})"
        case nodes.Chain():
            text = inline(node.head)
            for link in node.links:
                text += (
                    f".{link.name.text}" if isinstance(link, nodes.Member) else inline_call(link)
                )
            return text
        case nodes.Unary():
            gap = " " if node.operator == "not" else ""
            return f"{node.operator}{gap}{inline(node.operand)}"
        case nodes.Operation():
            operations = "".join(
                f" {operator} {inline(operand)}" for operator, operand in node.rest
            )
            return inline(node.first) + operations
        case nodes.Conditional():
            parts = [inline(part) for part in (node.then, node.test, node.otherwise)]
            return f"{parts[0]} if {parts[1]} else {parts[2]}"
    return node.span.text


def value_of(item: Item) -> nodes.Expr:
    """Return the expression of an item: an argument's value, or the item itself."""
    return item.value if isinstance(item, nodes.Argument) else item


def brackets(node: nodes.Expr) -> list[Span]:
    """Return the spans of all brackets inside an expression."""
    pairs: list[Span] = []
    for part in nodes.walk(node):
        if isinstance(part, nodes.ListOf | nodes.Group):
            pairs.append(part.span)
        elif isinstance(part, nodes.Chain):
            pairs += [link.span for link in part.links if isinstance(link, nodes.Call)]
    return pairs


def inner_brackets(call: nodes.Call) -> list[Span]:
    """Return the spans of all brackets inside the arguments of a call."""
    return [span for argument in call.arguments for span in brackets(argument.value)]
