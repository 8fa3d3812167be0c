"""References between declarations: what a value refers to, and which declarations it reaches."""

from __future__ import annotations

from collections.abc import Iterator

from tunelang.dsl.program import Declared, Program
from tunelang.dsl.vocabulary import data, rewards
from tunelang.dsl.vocabulary.base import Node, Reference

AnyReference = Reference | data.DataRef | rewards.RewardRef


def references_in(value: object, path: str) -> Iterator[tuple[str, AnyReference]]:
    """Yield every reference inside a value, with the path of the attribute that holds it."""
    if isinstance(value, AnyReference):
        yield path, value
    elif isinstance(value, Node):
        for name, field_info in type(value).model_fields.items():
            inner = f"{path}.{field_info.alias or name}"
            yield from references_in(getattr(value, name), inner)
    elif isinstance(value, tuple):
        for item in value:
            yield from references_in(item, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from references_in(item, f"{path}.{key}")


def names_used(declared: Declared) -> set[str]:
    """Return the names that a declaration refers to."""
    return {ref.name for value in declared.values for _, ref in references_in(value, "")}


def reachable(program: Program, names: set[str]) -> dict[str, Declared]:
    """Return the declarations of these names, and those that they and the run block use."""
    wanted = set(names)
    for name in reversed(program.declarations):
        if name in wanted:
            wanted.update(names_used(program.declarations[name]))
    wanted.update(reference.name for _, reference in references_in(program.run, "run"))
    return {name: d for name, d in program.declarations.items() if name in wanted}
