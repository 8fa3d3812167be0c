"""What an expression may be worth before it is fitted to the type of an attribute."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tunelang.dsl.syntax import units
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import (
    Condition,
    DataExpression,
    Function,
    Reference,
    RewardExpression,
    TextExpression,
)

if TYPE_CHECKING:
    from tunelang.dsl.syntax import nodes


class Invalid:
    """The value of what was reported already: nothing that depends on it is reported again."""


INVALID: Final = Invalid()


@dataclass(frozen=True, slots=True)
class Word:
    """A bare word that is a choice somewhere, as the value of a `let`."""

    text: str


@dataclass(frozen=True, slots=True)
class RegexValue:
    """A regular expression and the place of its literal."""

    pattern: str
    node: nodes.Regex = field(compare=False)


def describe(value: Any) -> str:
    """How a message calls a value: `text`, `a percentage`, `a reward`."""
    match value:
        case units.Quantity():
            return units.DIMENSION_NAMES.get(value.dimension, "a number")
        case bool():
            return "`true`" if value else "`false`"
        case None:
            return "`none`"
        case str():
            return "text"
        case Word():
            return f"the word `{value.text}`"
        case RegexValue():
            return "a regular expression"
        case tuple():
            return "a list"
        case Reference():
            return article(str(value.noun))
        case data.Split() if value.part is None:
            return "a split, of which no part is named"
        case data.Weighted():
            return f"{units.show(value.weight, '%')} of some data"
        case DataExpression():
            return "data"
        case RewardExpression():
            return "a reward"
        case TextExpression():
            return "text"
        case Condition():
            return "a condition"
        case Function():
            return f"{article(value.family)}" if value.family != "winner" else "a choice of winner"
    return "something else"


def article(word: str) -> str:
    """`an eval`, `a stage`; `data` and `hardware` take none."""
    if word in ("data", "hardware", "settings", "experts", "text", "sampling"):
        return word
    spoken_with_vowel = word in ("sft", "rloo", "sgd") or word[0] in "aeiou"
    return f"{'an' if spoken_with_vowel else 'a'} {word}"


_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_fields(text: str) -> tuple[list[tuple[str, int]], int | None]:
    """The fields of a template with their offsets, and the offset of a brace that has no
    partner.
    """
    fields: list[tuple[str, int]] = []
    for match in _FIELD.finditer(text):
        if match.group() in ("{", "}"):
            return fields, match.start()
        if match.group(1) is not None:
            fields.append((match.group(1), match.start()))
    return fields, None
