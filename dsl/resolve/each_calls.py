"""Calls of `each`, which fan a stage out into branches."""

from __future__ import annotations

from tunelang.dsl.syntax import nodes


def each_call(node: nodes.Chain) -> nodes.Call:
    """Return the call of an `each(...)`."""
    call = node.links[0]
    assert isinstance(call, nodes.Call)
    return call


def is_each(node: nodes.Chain) -> bool:
    """Return whether an expression is an `each(...)`."""
    return (
        isinstance(node.head, nodes.Name)
        and node.head.text == "each"
        and isinstance(node.links[0], nodes.Call)
    )


def each_nodes(expressions: list[nodes.Expr]) -> list[tuple[nodes.Chain, list[nodes.Expr]]]:
    """Return the `each(...)` calls inside expressions and their values, in textual order."""
    return [
        (node, [argument.value for argument in each_call(node).arguments])
        for expression in expressions
        for node in nodes.walk(expression)
        if isinstance(node, nodes.Chain) and is_each(node)
    ]
