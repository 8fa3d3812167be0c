"""`tune schema`: JSON Schema of a resolved Program, as `tune check --show --json` prints it."""

from __future__ import annotations

from tunelang.dsl.program import plain
from tunelang.dsl.vocabulary import data, rewards, types
from tunelang.dsl.vocabulary.base import (
    Attribute,
    Function,
    KindInfo,
    Node,
    attributes,
    doc_of,
)
from tunelang.dsl.vocabulary.tables import FUNCTIONS, KINDS, NOUNS, RUN
from tunelang.dsl.vocabulary.types import Json

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> Json:
    """Return the schema, with a definition for each kind (`stage.sft`) and function
    (`function.adamw`).
    """
    definitions: Json = {"reference": _object(
        {"noun": {"enum": list(NOUNS)}, "name": {"type": "string"}, "step": {"type": ["integer",
        "null"]}}, ["noun", "name", "step"],
    )}  # fmt: skip
    definitions["run"] = _kind(RUN)
    for noun, table in KINDS.items():
        for word, info in table.items():
            definitions[f"{noun}.{word}"] = _kind(info)
    callables = {**FUNCTIONS, **data.METHODS}
    for word, model in callables.items():
        definitions[f"function.{word}"] = _function(word, model)
    for name, parts in _INTERNAL.items():
        definitions[f"function.{name}"] = _tagged(name, parts)
    for family in types.FAMILIES:
        definitions[f"family.{family}"] = {"anyOf": _members(family)}
    declared = {"type": "object", "additionalProperties": {"anyOf": [*_declarations()]}}
    return {
        "$schema": DRAFT,
        "title": "A resolved .tune Program",
        **_object(
            {"run": {"$ref": "#/$defs/run"}, "declarations": declared}, ["run", "declarations"]
        ),
        "$defs": definitions,
    }


_ANY_REWARD = {"$ref": "#/$defs/family.reward"}
_ANY_DATA = {"$ref": "#/$defs/family.data"}
_ANY_CONDITION = {"$ref": "#/$defs/family.condition"}
_NAME = {"name": {"type": "string"}}

_INTERNAL: dict[str, Json] = {
    "DataRef": _NAME,
    "Weighted": {"of": _ANY_DATA, "weight": {"type": "number"}},
    "Mixture": {"parts": {"type": "array", "items": _ANY_DATA}},
    "TemplateText": {"text": {"type": "string"}},
    "FieldValue": _NAME,
    "Literal": {"value": {}},
    "Operator": {
        "operator": {"type": "string"},
        "operands": {"type": "array", "items": _ANY_CONDITION},
    },
    "RewardRef": _NAME,
    "RewardConstant": {"value": {"type": "number"}},
    "RewardOperator": {
        "operator": {"type": "string"},
        "operands": {"type": "array", "items": _ANY_REWARD},
    },
}
"""Parts of expressions that are written with names and operators, not as calls."""

_INTERNAL_FAMILY: dict[str, tuple[type[Node], ...]] = {
    "data": (data.DataRef, data.Weighted, data.Mixture),
    "text": (data.TemplateText,),
    "condition": (data.FieldValue, data.Literal, data.Operator),
    "reward": (rewards.RewardRef, rewards.RewardConstant, rewards.RewardOperator),
}


def _members(family: str) -> list[Json]:
    names = [model.__name__ for model in _INTERNAL_FAMILY.get(family, ())]
    names += [word for word, model in FUNCTIONS.items() if model.family == family]
    if family == "data":
        names += list(data.METHODS)
    return [{"$ref": f"#/$defs/function.{name}"} for name in names]


def _declarations() -> list[Json]:
    declarations: list[Json] = []
    for noun, table in KINDS.items():
        for word in table:
            value = {"$ref": f"#/$defs/{noun}.{word}"}
            head = {"noun": {"const": noun}, "kind": {"const": word}, "doc": {"type": "string"}}
            if noun == "stage":
                choices = {"type": "object", "additionalProperties": {"type": "string"}}
                branch = _object({"choices": choices, "value": value}, ["choices", "value"])
                branches = {"type": "array", "items": branch, "minItems": 1}
                declarations.append(
                    _object({**head, "branches": branches}, ["noun", "kind", "branches"])
                )
            else:
                declarations.append(_object({**head, "value": value}, ["noun", "kind", "value"]))
    for noun, value in (("data", _ANY_DATA), ("reward", _ANY_REWARD), ("let", {}), ("param", {})):
        head = {"noun": {"const": noun}, "doc": {"type": "string"}}
        declarations.append(_object({**head, "value": value}, ["noun", "value"]))
    return declarations


def _kind(info: KindInfo) -> Json:
    return {"description": info.doc, **_attributes(info.attributes)}


def _function(word: str, model: type[Function]) -> Json:
    known = attributes(model)
    extra: Json = {}
    if issubclass(model, data.DataMethod):
        extra["of"] = _ANY_DATA
    variadic = getattr(model, "variadic", None)
    if variadic is not None:
        values: Json = {"split": {"type": "number"}, "by_source": _ANY_REWARD}
        extra[variadic] = {"type": "object", "additionalProperties": values.get(word, {})}
    if word == "split":
        extra["part"] = {"type": "string"}
    schema_of_fields = _attributes(known)
    properties = {"is": {"const": word}, **extra, **schema_of_fields["properties"]}
    return {"description": doc_of(model), **_object(properties, list(properties))}


def _tagged(name: str, parts: Json) -> Json:
    properties = {"is": {"const": name}, **parts}
    return _object(properties, list(properties))


def _attributes(known: dict[str, Attribute]) -> Json:
    return _object({name: _attribute(a) for name, a in known.items()}, list(known))


def _attribute(a: Attribute) -> Json:
    json = a.type.json()
    if a.optional:
        json = {"anyOf": [json, {"type": "null"}]}
    out = {**json, "description": a.doc, "examples": [a.example], "x-effect": a.effect}
    if isinstance(a.type, types.Amount) and not a.type.measured:
        out["x-unit"] = a.type.units[0]
    if isinstance(a.type, types.Memory):
        out["x-unit"] = "bytes"
    if isinstance(a.type, types.Duration):
        out["x-unit"] = "s"
    if not a.required:
        out["default"] = plain(a.default)
    return out


def _object(properties: Json, required: list[str]) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
