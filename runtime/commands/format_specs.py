"""`tune fmt`: specs in their canonical form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path

import typer

from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.syntax.source import Source
from tunelang.runtime.commands.terminal import read_source, report


def format_specs(specs: Sequence[str], only_check: bool, diff: bool) -> int:
    """Format specs in place, or with an option only say what would change.

    `-` formats standard input to standard output. Returns the exit code.
    """
    failed = False
    for spec in specs:
        source = read_source(spec)
        if source is None:
            failed = True
            continue
        formatted, diagnostics = format_source(source)
        if formatted is None:
            report(diagnostics)
            failed = True
            continue
        changed = formatted != source.text
        if diff and changed:
            typer.echo(_diff(source, formatted), nl=False)
        if only_check and changed:
            failed = True
            typer.echo(f"{spec}: would change", err=True)
        if only_check or diff:
            continue
        if spec == "-":
            typer.echo(formatted, nl=False)
        elif changed:
            _replace(Path(spec), formatted)
            typer.echo(f"{spec}: formatted", err=True)
    return WRONG_SPEC if failed else 0


def _diff(source: Source, formatted: str) -> str:
    before, after = source.text.splitlines(keepends=True), formatted.splitlines(keepends=True)
    return "".join(unified_diff(before, after, source.name, f"{source.name} (formatted)"))


def _replace(path: Path, text: str) -> None:
    """Write a file atomically, with the mode that it had."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, "utf-8", newline="")
        temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
