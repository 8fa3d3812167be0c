"""Turns an error of planning or running into a diagnostic at its place in the spec."""

from __future__ import annotations

from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.diagnostics.tune_error import FAILED, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.messages.wording import error as diagnostic
from tunelang.dsl.program import Program
from tunelang.dsl.syntax.source import Source, Span
from tunelang.runtime.errors import StageFailed


def diagnose(error: Exception, program: Program) -> tuple[Diagnostic, int]:
    """Return the diagnostic of an error, and the exit code of the command."""
    stage = ""
    while isinstance(error, StageFailed) and isinstance(error.__cause__, Exception):
        stage, error = error.stage, error.__cause__
    code, exit_code, place = "stage-fails", FAILED, SpecPlace()
    if isinstance(error, TuneError):
        code, exit_code, place = error.code, error.exit_code, error.place()
        text = error.text(stage)
    elif isinstance(error, OSError):
        code, text = "store-fails", run_failures.unreadable(error.filename, error.strerror)
    else:
        text = run_failures.unexpected(type(error).__name__, str(error))
    shown = diagnostic(
        code, text.title, find(program, place, stage), text.label, notes=text.notes, help=text.help
    )
    return shown, exit_code


def find(program: Program, place: SpecPlace, stage: str) -> Span:
    """Return the span of a place in the spec; without one, that of the stage's name."""
    if place.attribute:
        for name in (f"stage.{stage}.{place.attribute}", f"run.{place.attribute}"):
            if name in program.origins:
                return program.origins[name].span
    if place.file is not None:
        for declared in program.declarations.values():
            path = getattr(declared.value, "path", None)
            named = f"{declared.noun}.{declared.name}.path"
            if isinstance(path, str) and named in program.origins:
                if place.file in (Path(path), program.folder / path):
                    return program.origins[named].span
    if place.quoted:
        for origin in program.origins.values():
            if place.quoted in origin.span.text:
                return origin.span
    for name in (place.declaration, stage):
        declaration = program.declarations.get(name)
        if declaration is not None and declaration.span is not None:
            return declaration.span
    return Span(Source("<run>", ""), 0, 0)
