"""Turns rows into examples with the roles (prompt, response, messages, ...) that stages read.

A row is what a file holds; an example is what the spec says that the row means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunelang.dsl.vocabulary.base import TextExpression
from tunelang.dsl.vocabulary.data import (
    ROLES,
    DataKind,
    Map,
    Procedural,
    Sampled,
    TemplateText,
    TextFiles,
    sampled_roles,
)
from tunelang.runtime.data.row_errors import WrongTypeError
from tunelang.runtime.data.text_templates import Row, lookup, render, sole_field

SPEAKERS = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One example with the roles that its data gives it; `fields` are those of its row."""

    source: str
    """Name of the declared data that the row comes from."""
    row: int
    """Number of the row in its source."""
    fields: Row
    prompt: str | None = None
    response: str | None = None
    target: str | None = None
    messages: tuple[Message, ...] | None = None
    system: str | None = None
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    margin: str | None = None


@dataclass(frozen=True)
class Roles:
    """Templates of the roles that the data has."""

    templates: Mapping[str, TextExpression]
    nullable: frozenset[str] = frozenset()
    """Roles that a row may leave empty: a problem that many answers solve has no `response`."""

    def with_templates(self, new: Map) -> Roles:
        """Return the roles after `.map(...)`."""
        changes = {role: getattr(new, role) for role in ROLES}
        changed = {role: template for role, template in changes.items() if template is not None}
        return Roles({**self.templates, **changed}, self.nullable - changed.keys())

    def with_response(self, role: str) -> Roles:
        """Return the roles with the template of an answer, such as `chosen`, as the response."""
        if role == "response" or role not in self.templates:
            return self
        return Roles({**self.templates, "response": self.templates[role]}, self.nullable)


def roles_of(kind: DataKind) -> Roles:
    """Return the roles that a source states, or if it states none, those that its kind implies."""
    stated = {role: getattr(kind, role) for role in ROLES}
    templates = {role: template for role, template in stated.items() if template is not None}
    if not templates and isinstance(kind, Procedural):
        answer = TemplateText(text="{answer}")
        question = TemplateText(text="{question}")
        implied = {"prompt": question, "response": answer, "target": answer}
        return Roles(implied, frozenset({"response", "target"}))
    if not templates and isinstance(kind, Sampled):
        names = {role: role for role in ("prompt", "system", "target")} | sampled_roles(kind)
        templates = {role: TemplateText(text=f"{{{name}}}") for role, name in names.items()}
        templates["messages"] = TemplateText(text="{messages}")
        return Roles(templates, frozenset({"prompt", "system", "target", "messages"}))
    if not templates and isinstance(kind, TextFiles):
        return Roles({"text": TemplateText(text="{text}")})
    return Roles(templates)


def example_of(source: str, row: int, fields: Row, roles: Roles) -> Example:
    """Return the example of a row.

    Raises `MissingFieldError` or `WrongTypeError` where a role's template reads a field that the
    row lacks or that has another type.
    """
    values: dict[str, Any] = {}
    for role, template in roles.templates.items():
        name = sole_field(template)
        if role in roles.nullable and name is not None and lookup(name, fields) is None:
            continue
        if role == "messages":
            name = name or "messages"
            values[role] = conversation(name, lookup(name, fields))
        else:
            values[role] = render(template, fields)
    return Example(source=source, row=row, fields=fields, **values)


def texts_of(example: Example) -> Iterator[str]:
    """Yield the texts of an example that a model reads or writes, for fitting a tokenizer."""
    if example.system is not None:
        yield example.system
    if example.messages is not None:
        yield from (message.content for message in example.messages)
    for text in (example.prompt, example.response, example.text):
        if text is not None:
            yield text


def conversation(name: str, value: object) -> tuple[Message, ...]:
    """Return the turns of a conversation, from a list of objects with `role` and `content`.

    Raises `WrongTypeError`.
    """
    if not isinstance(value, list | tuple) or not value:
        raise WrongTypeError(name, "a list of messages", value)
    return tuple(_message(f"{name}[{index}]", item) for index, item in enumerate(value))


def _message(name: str, item: object) -> Message:
    if not isinstance(item, Mapping):
        raise WrongTypeError(name, "an object with `role` and `content`", item)
    role, content = item.get("role"), item.get("content")
    if role not in SPEAKERS:
        raise WrongTypeError(f"{name}.role", " or ".join(f"`{s}`" for s in SPEAKERS), role)
    if not isinstance(content, str):
        raise WrongTypeError(f"{name}.content", "text", content)
    return Message(role, content)
