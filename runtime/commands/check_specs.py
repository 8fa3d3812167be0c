"""`tune check`: diagnostics of specs, and a summary line for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer

from tunelang.dsl.check import Checked, check, check_file
from tunelang.dsl.diagnostics import render
from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC
from tunelang.dsl.messages.wording import plural
from tunelang.runtime.commands.terminal import (
    STANDARD_INPUT,
    check_program,
    open_store,
    read_source,
    refuse,
    report,
    reporting_errors,
)


def check_specs(specs: Sequence[str], sets: Sequence[str], show: bool, as_json: bool) -> int:
    """Check specs and report errors; `show` prints resolved specs. Returns the exit code."""
    failed = False
    documents: list[dict[str, object]] = []
    for spec in specs:
        checked = _checked(spec, sets)
        name = STANDARD_INPUT if spec == "-" else spec
        failed = failed or checked is None or checked.program is None
        if checked is None:
            continue
        if as_json:
            documents.append(_document(name, checked, show))
            continue
        report(checked.diagnostics)
        if checked.program is not None and show:
            from tunelang.dsl.reference import resolved_text  # only this option needs it

            typer.echo(resolved_text.show(checked.program), nl=False)
        else:
            typer.echo(f"{name}: {summary(checked)}", err=True)
    if as_json:
        typer.echo(json.dumps(documents, indent=2, ensure_ascii=False))
    return WRONG_SPEC if failed else 0


def summary(checked: Checked) -> str:
    """Summarise a check in a line: `OK, 2 stages, 1 warning`."""
    diagnostics = checked.diagnostics
    warnings = len(diagnostics) + diagnostics.dropped - diagnostics.errors
    if checked.program is None:
        shown = f"; the first {len(diagnostics)} are shown" if diagnostics.dropped else ""
        return render.summary(diagnostics.errors, warnings) + shown
    stages = checked.program.of("stage")
    branches = sum(len(stage.branches) for stage in stages)
    parts = [f"OK, {plural(len(stages), 'stage')}"]
    if branches > len(stages):
        parts[0] += f" in {branches} branches"
    if warnings:
        parts.append(render.summary(0, warnings))
    return ", ".join(parts)


def render_examples(specs: Sequence[str], sets: list[str], data: str, count: int) -> None:
    """Print some examples of declared data, with the tokens that are trained."""
    if len(specs) != 1 or specs[0] == "-":
        refuse("--render takes one spec, in a file")
    spec = Path(specs[0])
    program = check_program(spec, sets)
    from rich.console import Console

    from tunelang.runtime.commands.preview import preview_examples  # JAX is slow to import

    console = Console(highlight=False, markup=False, soft_wrap=True)
    with reporting_errors(program):
        store = open_store(spec, None)
        for text in preview_examples(program, store, data, count, not console.is_terminal):
            console.print(text, end="\n\n")


def _checked(spec: str, sets: Sequence[str]) -> Checked | None:
    if spec != "-":
        return check_file(Path(spec), sets)
    source = read_source(spec)
    return None if source is None else check(source, sets)


def _document(spec: str, checked: Checked, show: bool) -> dict[str, object]:
    document: dict[str, object] = {
        "spec": spec,
        "diagnostics": render.json(checked.diagnostics),
    }
    if show and checked.program is not None:
        document["program"] = checked.program.json()
    return document
