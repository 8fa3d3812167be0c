"""The vocabulary: every attribute is documented, its example is right, values fit their models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tunelang.dsl.check import check
from tunelang.dsl.diagnostics.codes import PRELUDE
from tunelang.dsl.parsing.file_parser import parse
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.reference.explain import explain, reference, topics
from tunelang.dsl.reference.schema import schema
from tunelang.dsl.resolve.fit import Site, fit
from tunelang.dsl.syntax.nodes import Declaration
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.vocabulary import data, types
from tunelang.dsl.vocabulary.base import EFFECTS, Attribute, Node, attributes, doc_of
from tunelang.dsl.vocabulary.foreign import BY_NOUN, FUNCTION
from tunelang.dsl.vocabulary.optimizer_kinds import Optimizer
from tunelang.dsl.vocabulary.tables import FUNCTIONS, KINDS, NOUNS, RUN

UI = Path(__file__).parents[2] / "ui"


def every_attribute() -> Iterator[tuple[str, Attribute]]:
    for table in KINDS.values():
        for word, info in table.items():
            yield from ((f"{word}.{name}", a) for name, a in info.attributes.items())
    yield from ((f"run.{name}", a) for name, a in RUN.attributes.items())
    for word, model in {**FUNCTIONS, **data.METHODS}.items():
        yield from ((f"{word}.{name}", a) for name, a in attributes(model).items())


ATTRIBUTES = dict(every_attribute())


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_is_documented(name: str) -> None:
    a = ATTRIBUTES[name]
    assert a.doc.endswith(".")
    assert a.doc[0].isupper() or a.doc[0] in "`0123456789"
    assert a.effect in EFFECTS
    assert a.type.describe()
    assert re.search(rf"\b{a.name}\b", a.example) or a.positional or a.name in ("seed", "metric")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_example_has_the_right_form(name: str) -> None:
    example = ATTRIBUTES[name].example
    text = example if re.match(r"\w+ = ", example) else f"x = {example}"
    tree, diagnostics = parse(Source("example", f"let {text}"))
    assert not diagnostics
    assert isinstance(tree.items[0], Declaration)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_default_fits_its_type(name: str) -> None:
    a = ATTRIBUTES[name]
    if a.required or (a.default is None and a.optional):
        return
    text = explain(name)
    assert text is not None
    complaints: list[Any] = []
    span = Span(Source("", ""), 0, 0)
    site = Site(span, name, "", complaints.append, lambda _: None, Path())
    leaf = isinstance(a.type, types.Flag | types.Choice | types.Text)
    if leaf and isinstance(a.default, bool | str) and not isinstance(a.type, types.Choice):
        assert fit(a.default, a.type, site) == a.default
    if isinstance(a.type, types.Number):
        assert a.type.admits(a.default)
    if isinstance(a.type, types.Choice):
        assert a.default in a.type.words


def test_every_field_of_a_model_has_its_effect() -> None:
    """A field without a mark is part of an expression, not an attribute."""
    internal = {"of", "part", "parts", "values", "sources", "name", "weight", "value", "operator"}
    internal |= {"operands", "text"}
    models = [info.model for table in KINDS.values() for info in table.values()]
    models += [RUN.model, *FUNCTIONS.values(), *data.METHODS.values()]
    for model in models:
        marked = {field.alias or name for name, field in model.model_fields.items()}
        assert marked - set(attributes(model)) <= internal, model


def test_optional_attributes_default_to_none_or_say_so() -> None:
    for name, a in ATTRIBUTES.items():
        if not a.required and a.default is None:
            assert a.optional, name


def test_everything_is_explained() -> None:
    for topic in topics():
        assert explain(topic), topic
    text = reference()
    for noun in NOUNS:
        assert f"## `{noun}`" in text
    assert "None" not in text
    assert "PydanticUndefined" not in text


def test_models_are_documented() -> None:
    for table in KINDS.values():
        for info in table.values():
            assert info.doc.endswith("."), info.word
    for model in FUNCTIONS.values():
        assert doc_of(model).endswith("."), model


def test_foreign_words_lead_to_words_of_the_language() -> None:
    """A word of another tool must not be one of ours, and its line must be."""
    for noun, table in BY_NOUN.items():
        infos = [RUN] if noun == "run" else list(KINDS[noun].values())
        for word, entry in table.items():
            assert any(word not in info.attributes for info in infos), word
            if entry.replaces_attribute:
                name = entry.line.split(" =")[0]
                assert any(name in info.attributes for info in infos), word
    for word, entry in FUNCTION.items():
        if entry.replaces_attribute:
            name = entry.line.split(" =")[0]
            assert any(name in attributes(model) for model in FUNCTIONS.values()), word


RIGHT = sorted([*UI.glob("right/*.tune"), *UI.glob("show/*.tune"), *UI.glob("fmt/neigh*.tune")])


def nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
        for name in type(value).model_fields:
            yield from nodes(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from nodes(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from nodes(item)


@pytest.mark.parametrize("path", RIGHT, ids=lambda p: p.stem)
def test_programs_fit_their_models_and_schema(path: Path) -> None:
    """The checker builds values without pydantic's validation: here pydantic has its say."""
    program = check(Source(path.name, path.read_text("utf-8"), UI / "workspace")).program
    assert program is not None
    for declared in program.declarations.values():
        for value in [branch.value for branch in declared.branches] or [declared.value]:
            for node in nodes(value):
                fields = {name: getattr(node, name) for name in type(node).model_fields}
                assert type(node).model_validate(fields) == node
    jsonschema.validate(program.json(), schema())


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_the_prelude_of_the_examples_is_formatted() -> None:
    assert format_source(Source("prelude", PRELUDE))[0] == PRELUDE


def test_every_optimizer_declares_its_number_of_moments() -> None:
    """The planner sizes the state of an optimizer by them."""
    kinds = [function for function in FUNCTIONS.values() if function.family == "optimizer"]
    moments = {kind.word: kind.moments for kind in kinds if issubclass(kind, Optimizer)}
    assert moments == {"adamw": 2, "muon": 2, "sgd": 1, "lion": 1}
