"""Templates over the fields of a row."""

from typing import Any

import pytest

from tests.runtime.data_helpers import text
from tunelang.dsl.vocabulary.base import TextExpression
from tunelang.dsl.vocabulary.data import After, Before, Between
from tunelang.runtime.data.row_errors import MissingFieldError, WrongTypeError
from tunelang.runtime.data.text_templates import fields, render, sole_field

ROW = {
    "q": "Why?",
    "n": 3,
    "x": 0.5,
    "ok": True,
    "meta": {"level": "hard"},
    "a.b": "dot",
    "none": None,
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Q: {q}", "Q: Why?"),
        ("{{q}} {q} {{{q}}}", "{q} Why? {Why?}"),
        ("{n} {x} {ok}", "3 0.5 true"),
        ("{meta.level} {a.b}", "hard dot"),
        ("", ""),
        ("no fields", "no fields"),
    ],
)
def test_templates_render_fields_of_a_row(template: str, expected: str) -> None:
    assert render(text(template), ROW) == expected


def test_braces_in_a_row_are_no_template() -> None:
    assert render(text("{q}"), {"q": "{n} {{"}) == "{n} {{"


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (After(marker="####", text=text("a #### 1 #### 2 ")), "2"),
        (After(marker="####", text=text("nothing")), ""),
        (Before(marker="####", text=text(" a #### b #### c")), "a"),
        (Before(marker="####", text=text(" all ")), "all"),
        (Between(start="<a>", end="</a>", text=text("<a>1</a> <a> 2 </a>")), "2"),
        (Between(start="<a>", end="</a>", text=text("<a>1</a> <a>open")), "1"),
        (Between(start="<a>", end="</a>", text=text("1</a>")), ""),
        (Between(start="$", end="$", text=text("$1$ and $2$")), "2"),
        (After(marker=":", text=Before(marker=";", text=text("x: y; z: w"))), "y"),
    ],
)
def test_text_functions_cut_at_markers(expression: TextExpression, expected: str) -> None:
    assert render(expression, {}) == expected


def test_missing_field_raises_with_its_name() -> None:
    with pytest.raises(MissingFieldError) as caught:
        render(text("{meta.depth}"), ROW)
    assert (caught.value.name, caught.value.known) == ("meta.depth", ("level",))


@pytest.mark.parametrize("name", ["none", "meta"])
def test_value_that_is_no_text_raises_with_its_field(name: str) -> None:
    with pytest.raises(WrongTypeError) as caught:
        render(text(f"{{{name}}}"), ROW)
    value: Any = ROW[name]
    assert (caught.value.name, caught.value.value) == (name, value)


def test_fields_lists_the_fields_of_an_expression() -> None:
    assert list(fields(After(marker="#", text=text("{a} {{b}} {c.d}")))) == ["a", "c.d"]
    assert sole_field(text("{messages}")) == "messages"
    assert sole_field(text("{messages} ")) is None
