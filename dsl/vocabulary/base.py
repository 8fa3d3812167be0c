"""Base classes of kinds and functions: pydantic models whose fields carry everything.

A field's annotation names its Python type and its language type; `result`, `placement` or
`observe` gives the documentation, an example, the default and the *effect*: whether a change
makes a finished stage stale (`result`), or not (`placement`: where it runs, `observe`: what is
shown). The checker, `tune explain`, `tune schema` and the reference all read these fields.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny
from pydantic_core import PydanticUndefined

from tunelang.dsl.vocabulary import types

Effect = Literal["result", "placement", "observe"]
EFFECTS: dict[Effect, str] = {
    "result": "changes the result: a finished stage runs again",
    "placement": "changes only where and how it runs: a finished stage stays finished",
    "observe": "changes only what is shown: a finished stage stays finished",
}


class Node(BaseModel):
    """Base of everything in a Program: frozen, strict, closed."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", defer_build=True, populate_by_name=True
    )

    @classmethod
    def unvalidated(cls, **values: Any) -> Self:
        """Build a value from parts that are known to be valid: the checker's, and defaults.

        Pydantic would build a validator for the class first, which takes longer than checking a
        spec. The tests validate what comes out.
        """
        return cast(Self, cls.model_construct(**values))


class Measure(Node):
    """A number with the unit that it counts: `2 epochs`, `64 prompts`, `3%`."""

    value: int | float
    unit: str


class Reference(Node):
    """A declaration of the Program, by name; `step` picks a checkpoint of a stage."""

    noun: str
    name: str
    step: int | None = None


class Function(Node):
    """Base of everything written as a call. The family is what it may stand for."""

    family: ClassVar[str]
    word: ClassVar[str]


class TextExpression(Function):
    """Text made from the fields of an example."""

    family = "text"


class DataExpression(Function):
    """A stream of examples."""

    family = "data"


class RewardExpression(Function):
    """A function that gives each completion a number."""

    family = "reward"


class Condition(Function):
    """A test of one example."""

    family = "condition"


Yields = Literal["model", "scores", "rows", "files", "figures"]


class Kind(Node):
    """Base of the value of a declaration `noun name : kind { ... }`."""

    reads: ClassVar[dict[str, tuple[Yields, ...]]] = {}
    """Attribute -> what a stage that stands there has to yield; elsewhere a model."""
    yields: ClassVar[Yields] = "model"
    """The value of a stage where a spec refers to it."""


def _attribute(
    effect: Effect, doc: str, example: str, default: object, positional: bool, alias: str | None
) -> Any:
    extra: dict[str, Any] = {"effect": effect, "positional": positional}
    return Field(default, description=doc, examples=[example], json_schema_extra=extra, alias=alias)


def result(
    doc: str,
    example: str,
    default: object = ...,
    *,
    positional: bool = False,
    alias: str | None = None,
) -> Any:
    """Declare a field that changes what a stage computes."""
    return _attribute("result", doc, example, default, positional, alias)


def placement(doc: str, example: str, default: object = ..., *, positional: bool = False) -> Any:
    """Declare a field that changes where or how a stage runs, not what it computes."""
    return _attribute("placement", doc, example, default, positional, None)


def observe(doc: str, example: str, default: object = ..., *, positional: bool = False) -> Any:
    """Declare a field that changes what is logged or shown."""
    return _attribute("observe", doc, example, default, positional, None)


@dataclass(frozen=True)
class Attribute:
    """One attribute or argument, as the tools read it."""

    name: str
    type: types.Type
    default: object
    required: bool
    optional: bool
    """Whether `none` is accepted."""
    doc: str
    example: str
    effect: Effect
    positional: bool


@cache
def attributes(model: type[Node]) -> dict[str, Attribute]:
    """Return the attributes of a model by the name that a spec uses, in order of declaration."""
    by_name: dict[str, Attribute] = {}
    for name, field in model.model_fields.items():
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "effect" not in extra:
            continue
        kind = next(item for item in field.metadata if isinstance(item, types.Type))
        required = field.default is PydanticUndefined
        word = field.alias or name
        by_name[word] = Attribute(
            name=word,
            type=kind,
            default=None if required else field.default,
            required=required,
            optional=type(None) in get_args(field.annotation),
            doc=field.description or "",
            example=str((field.examples or [""])[0]),
            effect=extra["effect"],  # type: ignore[arg-type]
            positional=bool(extra["positional"]),
        )
    return by_name


@dataclass(frozen=True)
class KindInfo:
    """A kind of a noun: its model, and for a preset the defaults that differ from the model's."""

    noun: str
    word: str
    model: type[Kind]
    doc: str
    presets: tuple[tuple[str, object], ...] = ()

    @cached_property
    def attributes(self) -> dict[str, Attribute]:
        """Return the attributes, with the defaults of this kind."""
        table = dict(attributes(self.model))
        for name, default in self.presets:
            table[name] = _with_default(table[name], default)
        return table


def _with_default(attribute: Attribute, default: object) -> Attribute:
    changed = dict(attribute.__dict__, default=default, required=False)
    return Attribute(**changed)


def doc_of(model: type[Node]) -> str:
    """Return the documentation of a model: its docstring, unwrapped into paragraphs."""
    text = inspect.getdoc(model) or ""
    return "\n\n".join(re.sub(r"\s*\n\s*", " ", part) for part in text.split("\n\n"))


# Annotations used in many places. A comment names the Python value.
Tokens = Annotated[int, types.count("tokens")]
Flag = Annotated[bool, types.Flag()]
Positive = Annotated[float, types.Number(above=0)]
NonNegative = Annotated[float, types.Number(low=0)]
Share = Annotated[float, types.Share()]
Count = Annotated[int, types.Whole(low=1)]
MaybeCount = Annotated[int | None, types.Whole(low=1)]
Words = Annotated[str, types.Text()]
Template = Annotated[SerializeAsAny[TextExpression], types.Of("text")]
MaybeTemplate = Annotated[SerializeAsAny[TextExpression] | None, types.Of("text")]
Data = Annotated[SerializeAsAny[DataExpression], types.Of("data")]
Reward = Annotated[SerializeAsAny[RewardExpression], types.Of("reward")]
MaybeReward = Annotated[SerializeAsAny[RewardExpression] | None, types.Of("reward")]
Evals = Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("eval",)))]
TokenizerRef = Annotated[Reference, types.Ref(("tokenizer",))]
ModelRef = Annotated[Reference, types.Ref(("model", "stage"))]
HardwareRef = Annotated[Reference | None, types.Ref(("hardware",))]
