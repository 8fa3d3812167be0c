"""`tune plan`: prints the plan as text or JSON, and with `--compile` the compiler's report."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from tunelang.compiler.layout.hardware import named
from tunelang.dsl.diagnostics.tune_error import DOES_NOT_FIT
from tunelang.dsl.messages import run_failures
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.models import HardwareKind
from tunelang.runtime.commands import plan_text
from tunelang.runtime.commands.terminal import open_store, refuse, width
from tunelang.runtime.planning.prepare import Prepared, as_json, prepare


@dataclass(frozen=True)
class PlanOptions:
    """Options of the commands that make a plan."""

    spec: Path
    store: Path | None
    only: Sequence[str]
    until: Sequence[str]
    force: Sequence[str]
    on: str | None


def make_plan(program: Program, options: PlanOptions) -> Prepared:
    """Plan a program; raises what `prepare` raises."""
    return prepare(
        program,
        open_store(options.spec, options.store),
        only=options.only,
        until=options.until,
        force=options.force,
        on=None if options.on is None else _hardware(program, options.on),
    )


def _hardware(program: Program, name: str) -> HardwareKind:
    """Return declared hardware, or hardware such as `v5e:4x4`."""
    hardware = {declared.name: declared.value for declared in program.of("hardware")}
    try:
        return hardware[name] if name in hardware else named(name)
    except ValueError as error:
        refuse(run_failures.unknown_hardware(name, str(error), list(hardware)))


def show_plan(program: Program, options: PlanOptions, verbose: bool, json: bool) -> Prepared:
    """Print the plan of a program."""
    prepared = make_plan(program, options)
    if json:
        typer.echo(as_json(prepared))
    else:
        typer.echo(plan_text.show(prepared, verbose=verbose, width=width()), nl=False)
    return prepared


def show_compiled(prepared: Prepared, cache: Path) -> None:
    """Compile the programs of a plan and print what each needs; ends the command with
    `DOES_NOT_FIT` if one does not fit.
    """
    from tunelang.runtime.rehearsal import rehearse  # only this option needs it

    fits = True
    compiled: dict[tuple[object, ...], str] = {}
    for node in prepared.devices:
        key = rehearse.identity(prepared, node)
        if key in compiled:
            typer.echo(f"{node}  the same programs as {compiled[key]}")
            continue
        compiled[key] = node
        for program in rehearse.rehearse(prepared, node, cache):
            typer.echo(plan_text.report_text(prepared, node, program, width()), nl=False)
            if rehearse.fits(prepared, node, program):
                continue
            fits = False
            for remedy in rehearse.remedies(prepared, node, program, cache):
                typer.echo(_indented(f"would fit: {remedy}"))
            break
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


def _indented(text: str) -> str:
    return textwrap.fill(text, width(), initial_indent="    ", subsequent_indent="      ")
