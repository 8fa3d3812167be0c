"""The command `tune`. Each command imports what it needs: `tune check` must answer at once."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

# Both make a short command start in half the time: pydantic looks for plug-ins in the metadata of
# every installed package, and collections find nothing while classes and a spec's tree are made.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
gc.disable()

import typer

from tunelang.dsl import render
from tunelang.dsl.check import check, check_file
from tunelang.dsl.diagnostics import Diagnostic, Diagnostics
from tunelang.dsl.load import read
from tunelang.dsl.source import Source

WRONG_SPEC = 1
WRONG_COMMAND = 2

app = typer.Typer(
    name="tune",
    help="Declarative post-training of language models on JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC...", help="`.tune` files; `-` reads standard input.")
]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=EXPRESSION",
        help="Override a parameter (`lr=3e-6`) or an attribute"
        " (`stage.baseline.batch=32 sequences`)."
        " Paths in it are relative to the current folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]


def main() -> None:
    """Entry point of the command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # slow to import

        typer.echo(version("tunelang"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Declarative post-training of language models on JAX."""


@app.command("check")
def check_command(
    specs: Specs,
    sets: Sets = [],  # noqa: B006  (typer reads the default, nobody changes it)
    show: Annotated[
        bool,
        typer.Option("--show", help="Print the resolved spec, and where each value came from."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check specs without running anything. Exit code 1 if one of them is wrong."""
    failed = False
    documents: list[dict[str, object]] = []
    for spec in specs:
        checked = check(_stdin(), sets) if spec == "-" else check_file(Path(spec), sets)
        failed = failed or checked.program is None
        spec = "<standard input>" if spec == "-" else spec
        if as_json:
            document: dict[str, object] = {
                "spec": spec,
                "diagnostics": render.json(checked.diagnostics),
            }
            if show and checked.program is not None:
                document["program"] = checked.program.json()
            documents.append(document)
            continue
        report(checked.diagnostics)
        if checked.program is not None and show:
            from tunelang.dsl.show import show as show_program  # only this flag needs it

            typer.echo(show_program(checked.program), nl=False)
        elif checked.program is not None:
            stages = checked.program.of("stage")
            branches = sum(len(stage.branches) for stage in stages)
            fan = f" in {branches} branches" if branches > len(stages) else ""
            count = f"{len(stages)} stage{'' if len(stages) == 1 else 's'}{fan}"
            warned = len(checked.diagnostics) - checked.diagnostics.errors
            tail = f", {render.summary(0, warned)}" if warned else ""
            typer.echo(f"{spec}: right, {count}{tail}", err=True)
        else:
            found = checked.diagnostics
            warnings = len(found) + found.dropped - found.errors
            shown = f"; the first {len(found)} are shown" if found.dropped else ""
            typer.echo(f"{spec}: {render.summary(found.errors, warnings)}{shown}", err=True)
    if as_json:
        typer.echo(json.dumps(documents, indent=2, ensure_ascii=False))
    raise typer.Exit(WRONG_SPEC if failed else 0)


@app.command("fmt")
def fmt_command(
    specs: Specs,
    only_check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 1 if a file would change.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Change nothing; print what would change.")
    ] = False,
) -> None:
    """Bring specs into their canonical form, in place; `-` formats standard input to standard
    output.
    """
    from tunelang.dsl.format import format_source  # only this command needs it

    failed = False
    for spec in specs:
        source = _stdin() if spec == "-" else _read(spec)
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
        if only_check or diff:
            failed = failed or (only_check and changed)
            if only_check and changed:
                typer.echo(f"{spec}: would change", err=True)
        elif spec == "-":
            typer.echo(formatted, nl=False)
        elif changed:
            _replace(Path(spec), formatted)
            typer.echo(f"{spec}: formatted", err=True)
    raise typer.Exit(WRONG_SPEC if failed else 0)


@app.command("explain")
def explain_command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A noun, kind, attribute (`grpo.clip`), function, unit or diagnostic code."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the whole reference as Markdown.")
    ] = False,
) -> None:
    """Say what a word of the language means, or what a diagnostic code is about."""
    from tunelang.dsl import explain  # only this command needs it
    from tunelang.dsl.messages.wording import nearest

    if everything or name is None:
        _page(explain.reference() if everything else explain.overview())
        return
    text = explain.explain(name)
    if text is None:
        near = nearest(name, explain.topics())
        hint = f"; did you mean `{near}`?" if near else "; `tune explain` lists what there is"
        typer.echo(f"nothing is called `{name}`{hint}", err=True)
        raise typer.Exit(WRONG_COMMAND)
    _page(text)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a resolved spec, as `tune check --show --json` prints it."""
    from tunelang.dsl.schema import schema  # only this command needs it

    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


def report(diagnostics: Iterable[Diagnostic]) -> None:
    """Print diagnostics to standard error, in colour on a terminal unless `NO_COLOR` is set."""
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = render.text(diagnostics, color)
    if text:
        sys.stderr.write(text)


def _stdin() -> Source:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(Source("<standard input>", ""), error)
        raise typer.Exit(WRONG_SPEC) from None
    return Source("<standard input>", text, Path())


def _read(spec: str) -> Source | None:
    try:
        return read(Path(spec))
    except (OSError, ValueError) as error:
        _refuse(Source(spec, ""), error)
        return None


def _refuse(source: Source, error: Exception) -> None:
    from tunelang.dsl import messages

    diagnostics = Diagnostics()
    diagnostics.add(messages.unreadable(source, error))
    report(diagnostics)


def _diff(source: Source, formatted: str) -> str:
    from difflib import unified_diff  # slow to import

    before, after = source.text.splitlines(keepends=True), formatted.splitlines(keepends=True)
    return "".join(unified_diff(before, after, source.name, f"{source.name} (formatted)"))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the mode that it had."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, "utf-8", newline="")
        beside.chmod(path.stat().st_mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _page(markdown: str) -> None:
    """Print Markdown, rendered on a terminal."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console  # slow to import
        from rich.markdown import Markdown

        Console().print(Markdown(markdown))
    else:
        typer.echo(markdown, nl=not markdown.endswith("\n"))
