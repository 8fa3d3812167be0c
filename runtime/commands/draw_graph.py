"""`tune graph`: a picture of the stages."""

from __future__ import annotations

from pathlib import Path

import typer

from tunelang.compiler import graph
from tunelang.compiler.drawing import draw, svg
from tunelang.dsl.messages.wording import listed
from tunelang.dsl.program import Program
from tunelang.runtime.commands.terminal import refuse, width

_FORMS = {
    "text": lambda picture: draw.tree(picture, width()),
    "mermaid": draw.mermaid,
    "dot": draw.dot,
    "svg": svg.svg,
}
_SUFFIXES = {".svg": "svg", ".mmd": "mermaid", ".dot": "dot"}


def draw_graph(program: Program, form: str, output: Path | None) -> None:
    """Print the picture in a form, or write it to a file, whose suffix may name the form."""
    if output is not None and form == "text":
        form = _SUFFIXES.get(output.suffix, form)
    if form not in _FORMS:
        refuse(f"no format is called `{form}`: the formats are {listed(list(_FORMS))}")
    text = _FORMS[form](draw.picture(graph.build(program)))
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")
