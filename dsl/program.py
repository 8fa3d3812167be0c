"""The result of checking: a frozen, fully resolved Program, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary.base import Kind, Node
from tunelang.dsl.vocabulary.stages import Run


@dataclass(frozen=True)
class Origin:
    """The place in which a value was written. Values without an origin are defaults."""

    kind: Literal["spec", "override"]
    span: Span


@dataclass(frozen=True)
class Branch:
    """One branch of a stage that fans out, or the only one of a stage that does not.

    `choices` holds, for each `each` of the stage in the order of the text, the path of the
    attribute that it stands in and the value that this branch takes, as written: `("optimizer.lr",
    "1e-6")`.
    """

    choices: tuple[tuple[str, str], ...]
    value: Kind


@dataclass(frozen=True)
class Declared:
    """One declaration, resolved."""

    noun: str
    name: str
    """Qualified with the prefixes of the imports that it came through: `base.math`."""
    kind: str | None
    """None for `noun name = expression`."""
    value: Any
    """A `Kind`; an expression's value; for a stage, None (see `branches`)."""
    doc: str
    branches: tuple[Branch, ...] = ()
    span: Span | None = field(default=None, compare=False)
    """The place of the declared name."""
    damaged: bool = field(default=False, compare=False)
    """A syntax error took something away: no Program that is returned has such a declaration."""

    @property
    def values(self) -> list[Any]:
        """Return the value; for a stage, that of each branch."""
        return [branch.value for branch in self.branches] or [self.value]

    @property
    def title(self) -> str:
        """Return the noun and the name: `data math`."""
        return f"{self.noun} {self.name}"

    @property
    def fans_out(self) -> bool:
        """Return whether the stage has more than one branch of its own."""
        return len(self.branches) > 1


@dataclass(frozen=True)
class Program:
    """A whole spec with its imports: declarations by name in an order in which each follows what
    it uses.

    Two Programs are equal if they mean the same; places, comments and layout do not count.
    """

    declarations: dict[str, Declared]
    run: Run
    folder: Path = field(compare=False)
    """The folder of the spec: what the Program's paths are relative to."""
    origins: dict[str, Origin] = field(compare=False)
    """Path of a value, such as `stage.baseline.optimizer.lr`, to where it came from."""

    def of(self, noun: str) -> list[Declared]:
        """Return the declarations of one noun."""
        return [declared for declared in self.declarations.values() if declared.noun == noun]

    def json(self) -> dict[str, object]:
        """Return the Program as plain data, valid by `tune schema`."""
        return {
            "run": plain(self.run),
            "declarations": {name: _declared(d) for name, d in self.declarations.items()},
        }


def _declared(declared: Declared) -> dict[str, object]:
    out: dict[str, object] = {"noun": declared.noun}
    if declared.kind is not None:
        out["kind"] = declared.kind
    if declared.doc:
        out["doc"] = declared.doc
    if declared.branches:
        out["branches"] = [
            {"choices": dict(branch.choices), "value": plain(branch.value)}
            for branch in declared.branches
        ]
    else:
        out["value"] = plain(declared.value)
    return out


def plain(value: object) -> Any:
    """Return a value as JSON. Calls carry their word under `is`."""
    if isinstance(value, Node):
        word = getattr(value, "word", None)
        tag = {"is": word or type(value).__name__} if word is not None else {}
        fields = type(value).model_fields
        return tag | {fields[name].alias or name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Quantity):
        unit = {"unit": value.dimension} if value.dimension else {}
        return {"value": value.value} | unit if unit else value.value
    return value
