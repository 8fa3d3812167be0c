"""Values of expressions that no Program holds: words, regular expressions, the invalid value."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

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


_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def template_fields(text: str) -> tuple[list[tuple[str, int]], int | None]:
    """Return the fields of a template with their offsets, and the offset of a brace that has
    no partner.
    """
    fields: list[tuple[str, int]] = []
    for match in _FIELD.finditer(text):
        if match.group() in ("{", "}"):
            return fields, match.start()
        if match.group(1) is not None:
            fields.append((match.group(1), match.start()))
    return fields, None
