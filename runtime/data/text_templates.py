"""Renders text templates, the `TextExpression`s of the language, for rows of data.

A field is written `{name}`, or `{outer.inner}` for a field of an object inside a row; `{{` and `}}`
stand for braces. Numbers and truth values read as JSON writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from tunelang.dsl.vocabulary.base import TextExpression
from tunelang.dsl.vocabulary.data import After, Before, Between, TemplateText
from tunelang.runtime.data.row_errors import MissingFieldError, WrongTypeError

Row = Mapping[str, Any]
"""Fields of a row by name."""

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def lookup(name: str, row: Row) -> object:
    """Return the value of a field.

    Dots lead into objects by key and into lists by number, from 0; a column whose name itself has
    dots takes precedence. Raises `MissingFieldError`.
    """
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, Mapping) or part not in value:
            known = tuple(map(str, value)) if isinstance(value, Mapping) else ()
            raise MissingFieldError(name, known)
        value = value[part]
    return value


def render(expression: TextExpression, row: Row) -> str:
    """Return the text of an expression for a row.

    Raises `MissingFieldError`, and `WrongTypeError` for a field that is null, a list or an object.
    """
    match expression:
        case TemplateText():
            return "".join(
                part if name is None else as_text(name, lookup(name, row))
                for part, name in _parse(expression.text)
            )
        case After():
            _, marker, tail = render(expression.text, row).rpartition(expression.marker)
            return tail.strip() if marker else ""
        case Before():
            return render(expression.text, row).partition(expression.marker)[0].strip()
        case Between():
            return _between(render(expression.text, row), expression.start, expression.end)
    raise TypeError(f"not a text expression: {type(expression).__name__}")


def _between(text: str, start: str, end: str) -> str:
    """Return the text between the last `start` that is followed by `end`, and that `end`."""
    stop = text.rfind(end)
    while stop >= 0:
        begin = text.rfind(start, 0, stop)
        if begin < 0:
            return ""
        # The nearest `end` behind this `start`: with `<a>x</a></a>` the answer is x.
        inner = begin + len(start)
        first = text.find(end, inner)
        if first >= 0:
            return text[inner:first].strip()
        stop = text.rfind(end, 0, stop)
    return ""


def as_text(name: str, value: object) -> str:
    """Return a field's value as text; `WrongTypeError` for null, lists, objects and bytes."""
    # Subclasses of str and of numbers occur: NumPy scalars in generated problems.
    if isinstance(value, str):
        return str(value)
    value = python_scalar(value)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise WrongTypeError(name, "text or a number", value)


def python_scalar(value: object) -> object:
    """Return a zero-dimensional array as a number of Python; any other value as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def fields(expression: TextExpression) -> Iterator[str]:
    """Yield the names of the fields that an expression reads, in order of occurrence."""
    match expression:
        case TemplateText():
            yield from (name for _, name in _parse(expression.text) if name is not None)
        case After() | Before() | Between():
            yield from fields(expression.text)


def sole_field(expression: TextExpression) -> str | None:
    """Return the field's name where an expression is one field and nothing else: `{messages}`."""
    if isinstance(expression, TemplateText):
        parts = _parse(expression.text)
        if len(parts) == 1:
            return parts[0][1]
    return None


@lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template into parts `(text, None)` and `("", field)`."""
    parts: list[tuple[str, str | None]] = []
    plain: list[str] = []
    position = 0
    for match in _TOKEN.finditer(text):
        plain.append(text[position : match.start()])
        position = match.end()
        if match.group(1) is None:
            plain.append(match.group()[0])
            continue
        if any(plain):
            parts.append(("".join(plain), None))
        plain = []
        parts.append(("", match.group(1)))
    plain.append(text[position:])
    if any(plain):
        parts.append(("".join(plain), None))
    return tuple(parts)
