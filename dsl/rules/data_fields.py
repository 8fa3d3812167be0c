"""The rows of a data expression: its sources, their fields and roles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import DataExpression


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source as they reach a stage or an eval."""

    source: str
    """The name of the declared data."""
    kind: str
    fields: frozenset[str] | None
    """None if they are unknown."""
    roles: frozenset[str]


Fields = dict[str, frozenset[str] | None]
"""Name of declared data -> its fields; None if they are unknown."""


def source_rows(
    expression: DataExpression, program: Program, fields: Fields
) -> Iterator[SourceRows]:
    """Yield each source of an expression; sources that could not be checked are left out."""
    match expression:
        case data.DataRef():
            declared = program.declarations.get(expression.name)
            if declared is None:
                return
            if isinstance(declared.value, data.DataKind):
                kind = declared.kind or ""
                roles = _roles(declared.value, kind)
                yield SourceRows(declared.name, kind, fields.get(declared.name), roles)
            elif isinstance(declared.value, DataExpression):
                yield from source_rows(declared.value, program, fields)
        case data.Mixture():
            for part in expression.parts:
                yield from source_rows(part, program, fields)
        case data.Weighted():
            yield from source_rows(expression.of, program, fields)
        case data.Map():
            new = {role for role in data.ROLES if getattr(expression, role) is not None}
            for source in source_rows(expression.of, program, fields):
                yield replace(source, roles=source.roles | new)
        case data.DataMethod():
            yield from source_rows(expression.of, program, fields)


def _roles(source: data.DataKind, kind: str) -> frozenset[str]:
    """Return the roles that a source declares; those of its kind if it declares none."""
    roles = frozenset(role for role in data.ROLES if getattr(source, role) is not None)
    if roles:
        return roles
    if kind == "procedural":
        return frozenset({"prompt", "response", "target"})
    if isinstance(source, data.Sampled):
        return frozenset({"prompt", "target", *data.sampled_roles(source)})
    return frozenset({"text"}) if kind == "text" else frozenset()


def common_roles(expression: DataExpression, program: Program) -> frozenset[str]:
    """Return the roles that every source of an expression has."""
    roles = [source.roles for source in source_rows(expression, program, {})]
    return frozenset.intersection(*roles) if roles else frozenset()


def declared_names(expression: DataExpression, program: Program) -> set[str]:
    """Return every declared data in an expression: sources, and named expressions on the way."""
    names = {source.source for source in source_rows(expression, program, {})}
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
