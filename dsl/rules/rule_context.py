"""The state that all rules share: the Program, the places of its values, the diagnostics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Diagnostics
from tunelang.dsl.program import Declared, Program
from tunelang.dsl.resolve.binding import Place
from tunelang.dsl.rules.data_fields import Fields, SourceRows, source_rows
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import DataExpression, Kind, Node, Reference
from tunelang.dsl.vocabulary.raw_values import template_fields


@dataclass
class RuleContext:
    """A Program under check. The rules read it, and report to it."""

    program: Program
    places: dict[int, Place]
    """Identity of a call's value -> its places."""
    diagnostics: Diagnostics
    elsewhere: bool
    """Whether the spec is checked for other hardware than its own."""
    fields: Fields = field(default_factory=dict)
    context_lengths: dict[str, int] = field(default_factory=dict)
    """Model -> its context in tokens, from its configuration file."""
    base_models: dict[str, Kind | None] = field(default_factory=dict)
    """Model or stage -> the model at the start of its chain; filled on demand."""
    model_owners: dict[int, Declared] = field(default_factory=dict)
    """Identity of a model's value -> its declaration; filled on demand."""

    def report(self, diagnostic: Diagnostic) -> None:
        """Add a diagnostic."""
        self.diagnostics.add(diagnostic)

    def span(self, declared: Declared, path: str = "") -> Span:
        """Return the place of an attribute; of what contains it, or of the declaration's name, if
        the attribute has its default.
        """
        parts = [declared.noun, declared.name, *path.split(".")] if path else []
        while len(parts) > 2:
            origin = self.program.origins.get(".".join(parts))
            if origin is not None:
                return origin.span
            parts.pop()
        assert declared.span is not None
        return declared.span

    def argument(self, value: object, name: str, otherwise: Span) -> Span:
        """Return the place of an argument of a call; of the call if the argument is not written,
        `otherwise` if the call is not.
        """
        place = self.places.get(id(value))
        return place.arguments.get(name, place.span) if place else otherwise

    def declared(self, name: str) -> Declared | None:
        """Return a declaration; None if it was invalid."""
        return self.program.declarations.get(name)

    def model_owner(self, model: Kind) -> Declared | None:
        """Return the declaration of a model."""
        if not self.model_owners:
            self.model_owners = {id(owner.value): owner for owner in self.program.of("model")}
        return self.model_owners.get(id(model))

    def base_model(self, reference: Reference) -> Kind | None:
        """Return the model at the start of a chain of stages."""
        chain: list[str] = []
        model: Kind | None = None
        while reference.name not in self.base_models:
            chain.append(reference.name)
            declared = self.declared(reference.name)
            if declared is None or declared.noun == "model":
                model = declared.value if declared else None
                break
            start = getattr(declared.values[0], "from_", None)
            if not isinstance(start, Reference):
                break
            reference = start
        else:
            model = self.base_models[reference.name]
        self.base_models.update(dict.fromkeys(chain, model))
        return model

    def source_rows(self, expression: DataExpression) -> list[SourceRows]:
        """Return the sources of a data expression with their fields and roles."""
        return list(source_rows(expression, self.program, self.fields))

    def template_places(self, template: Node, span: Span) -> Iterator[tuple[str, Span]]:
        """Yield the fields of a text expression with their places in the spec."""
        if isinstance(template, data.TemplateText):
            for name, _ in template_fields(template.text)[0]:
                yield name, place_in(span, f"{{{name}}}")
        else:
            for name in type(template).model_fields:
                inner = getattr(template, name)
                if isinstance(inner, Node):
                    yield from self.template_places(inner, self.argument(template, name, span))


def place_in(span: Span, text: str) -> Span:
    """Return the place of a text inside a span; the span if the text is written otherwise."""
    match = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", span.text)
    if match is None:
        return span
    return Span(span.source, span.start + match.start(), span.start + match.end())
