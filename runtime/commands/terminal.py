"""Input and output that the commands share: specs in, diagnostics and texts out, exit codes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from tunelang.dsl.check import check_file
from tunelang.dsl.diagnostics import render
from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.diagnostics.tune_error import WRONG_COMMAND, WRONG_SPEC, CommandError
from tunelang.dsl.messages import malformed
from tunelang.dsl.program import Program
from tunelang.dsl.resolve.load import read
from tunelang.dsl.syntax.source import Source

if TYPE_CHECKING:
    from tunelang.runtime.store.run_store import Store

STANDARD_INPUT = "<standard input>"


def report(diagnostics: Iterable[Diagnostic]) -> None:
    """Print diagnostics to standard error, in colour on a terminal unless `NO_COLOR` is set."""
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = render.text(diagnostics, color)
    if text:
        sys.stderr.write(text)


def refuse(message: str) -> NoReturn:
    """End the command with a sentence about the command line."""
    typer.echo(message, err=True)
    raise typer.Exit(WRONG_COMMAND)


def width() -> int:
    """Return the columns that a table may take."""
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 160))


def page(markdown: str) -> None:
    """Print Markdown, rendered on a terminal."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console  # slow to import
        from rich.markdown import Markdown

        Console().print(Markdown(markdown))
    else:
        typer.echo(markdown, nl=not markdown.endswith("\n"))


def read_source(spec: str) -> Source | None:
    """Return a spec's text, `-` from standard input; reports and returns None if that fails."""
    name = STANDARD_INPUT if spec == "-" else spec
    try:
        if spec != "-":
            return read(Path(spec))
        return Source(name, sys.stdin.buffer.read().decode("utf-8-sig"), Path())
    except (OSError, ValueError) as error:
        report([malformed.unreadable(Source(name, ""), error)])
        return None


def check_program(spec: Path, sets: list[str], on: str | None = None) -> Program:
    """Return the program of a spec; ends the command if the spec has errors."""
    checked = check_file(spec, sets, elsewhere=on is not None)
    report(checked.diagnostics)
    if checked.program is None:
        raise typer.Exit(WRONG_SPEC)
    return checked.program


def open_store(spec: Path, folder: Path | None) -> Store:
    """Open the store of a spec, in a folder if one is given."""
    from tunelang.runtime.store.run_store import Store, root  # `tune check` does without

    return Store(root(spec, folder, os.environ))


@contextmanager
def reporting_errors(program: Program, traceback: bool = False) -> Iterator[None]:
    """Report any error at the line of the spec it is about, and end with the exit code for it."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if traceback:
            raise
        if isinstance(error, CommandError):
            refuse(str(error))
        from tunelang.runtime.commands.diagnose import diagnose  # only where something failed

        diagnostic, code = diagnose(error, program)
        report([diagnostic])
        raise typer.Exit(code) from None
