"""What examples a data expression yields: its sources, their fields and roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import DataExpression


@dataclass(frozen=True)
class Examples:
    """The examples of one source as they reach a stage."""

    source: str
    """The name of the declared data."""
    kind: str
    fields: frozenset[str] | None
    """None where they are not known."""
    roles: frozenset[str]


Fields = dict[str, frozenset[str] | None]
"""Name of declared data -> its fields."""


def examples(expression: DataExpression, program: Program, fields: Fields) -> Iterator[Examples]:
    """Each source of an expression; sources that could not be checked are left out."""
    match expression:
        case data.DataRef():
            declared = program.declarations.get(expression.name)
            if declared is None:
                return
            if isinstance(declared.value, data.DataKind):
                kind = declared.kind or ""
                roles = frozenset(r for r in data.ROLES if getattr(declared.value, r) is not None)
                if not roles and kind == "procedural":
                    roles = frozenset({"prompt", "response", "target"})
                if not roles and isinstance(declared.value, data.Sampled):
                    roles = frozenset({"prompt", "target", *data.sampled_roles(declared.value)})
                if not roles and kind == "text":
                    roles = frozenset({"text"})
                yield Examples(declared.name, kind, fields.get(declared.name), roles)
            elif isinstance(declared.value, DataExpression):
                yield from examples(declared.value, program, fields)
        case data.Mixture():
            for part in expression.parts:
                yield from examples(part, program, fields)
        case data.Weighted():
            yield from examples(expression.of, program, fields)
        case data.Map():
            new = {role for role in data.ROLES if getattr(expression, role) is not None}
            for found in examples(expression.of, program, fields):
                yield replace(found, roles=found.roles | new)
        case data.DataMethod():
            yield from examples(expression.of, program, fields)


def common_roles(expression: DataExpression, program: Program) -> frozenset[str]:
    """Return the roles that every source of an expression has."""
    roles = [source.roles for source in examples(expression, program, {})]
    return frozenset.intersection(*roles) if roles else frozenset()


def declared_names(expression: DataExpression, program: Program) -> set[str]:
    """Every declared data that takes part: sources, and named expressions on the way to them."""
    names = {found.source for found in examples(expression, program, {})}
    pending: list[DataExpression] = [expression]
    while pending:
        node = pending.pop()
        if isinstance(node, data.DataRef):
            names.add(node.name)
            declared = program.declarations.get(node.name)
            if declared is not None and isinstance(declared.value, DataExpression):
                pending.append(declared.value)
        elif isinstance(node, data.Mixture):
            pending += node.parts
        elif isinstance(node, data.Weighted | data.DataMethod):
            pending.append(node.of)
    return names
