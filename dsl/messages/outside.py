"""Messages about what a spec names outside itself: files, fields, functions, generators."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Label
from tunelang.dsl.messages.wording import (
    SHORT_LIST,
    choose,
    error,
    listed,
    nearest,
    quoted,
    replace_fix,
)
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary.data import ROLES

Use = tuple[Span, str] | None
"""Where a reward is used, and by what."""


def _seconds(used: Use) -> list[Label]:
    return [Label(*used)] if used is not None else []


# Files.


def missing_file(span: Span, name: str, path: Path, neighbours: Sequence[str]) -> Diagnostic:
    """Say that a file does not exist."""
    return error(
        "missing-file",
        f"there is no file {quoted(name, 60)}",
        span,
        help=_near(name, path, neighbours),
    )


def missing_folder(span: Span, name: str, path: Path, neighbours: Sequence[str]) -> Diagnostic:
    """Say that a model folder does not exist."""
    help = _near(name, path, neighbours) or "a model on the hub is `organisation/name`"
    return error("missing-file", f"there is no folder {quoted(name, 60)}", span, help=help)


def _near(name: str, path: Path, neighbours: Sequence[str]) -> str | None:
    """Return the nearest name in the folder, or the first missing folder of the path."""
    if not path.parent.is_dir():
        missing = path.parent
        while missing.parent != missing and not missing.parent.is_dir():
            missing = missing.parent
        near = nearest(missing.name, neighbours)
        what = f"there is no folder `{missing.name}`"
        return f"{what}; did you mean `{near}`?" if near else what
    near = nearest(path.name, neighbours)
    if near is None:
        same = [other for other in neighbours if Path(other).stem == path.stem]
        near = same[0] if same else None
    if near is not None:
        return f"did you mean `{Path(name).with_name(near)}`?"
    return (
        f"the folder contains {listed(list(neighbours))}"
        if 0 < len(neighbours) <= SHORT_LIST
        else None
    )


def not_a_file(span: Span, name: str, path: Path) -> Diagnostic:
    """Say that a path names a folder and not a file."""
    inside = sorted(p.name for p in path.iterdir())[:SHORT_LIST] if path.is_dir() else []
    return error(
        "missing-file",
        f"{quoted(name, 60)} is a folder",
        span,
        help=f"it contains {listed(inside)}" if inside else None,
    )


def bad_file(span: Span, name: str, problem: str, line: int | None) -> Diagnostic:
    """Say that a file has the wrong content."""
    where = f", line {line}" if line is not None else ""
    return error("bad-file", f"{quoted(name, 60)}{where}: {problem}", span)


def context_too_long(span: Span, longest: int) -> Diagnostic:
    """Say that a context is longer than the model supports."""
    return error(
        "beyond-context",
        "the context is longer than the model was trained for",
        span,
        f"the model's configuration says {longest:,} tokens",
    )


def divided_turns(span: Span) -> Diagnostic:
    """Say that `on_long_row = divide` cannot divide prompts and answers."""
    return error(
        "unknown-choice",
        "only plain text can be divided",
        span,
        "this data has prompts",
        help="write `drop` or `cut`",
    )


# Fields.


def unknown_field(span: Span, name: str, fields: list[str], data: str, used: Use) -> Diagnostic:
    """Say that the data has no such field."""
    fields = sorted(fields)
    shown = listed(fields) if len(fields) <= 12 else f"{listed(fields[:12])}, ..."
    near = nearest(name, fields)
    notes = [f"`{data}` has {shown}" if fields else f"`{data}` has no fields"]
    text = span.text
    fix = replace_fix(span, name, fields) if text == name else ()
    if text == f"{{{name}}}" and near:
        inner = Span(span.source, span.start + 1, span.end - 1)
        fix = replace_fix(inner, name, fields)
    return error(
        "unknown-field",
        f"there is no field {quoted(name)}",
        span,
        seconds=_seconds(used),
        notes=notes,
        help=f"did you mean `{near}`?" if near else None,
        fix=fix,
    )


def role_not_there(
    span: Span, role: str, source: str, roles: frozenset[str], used: Use
) -> Diagnostic:
    """Say that a reward reads a role such as `{target}` that the data lacks."""
    has = listed([r for r in ROLES if r in roles]) or "none"
    return error(
        "unknown-field",
        f"`{source}` has no `{role}`",
        span,
        seconds=_seconds(used),
        notes=[f"its roles are {has}"],
        help=f'declare it: `{role} = "{{...}}"`',
    )


def constant_template(span: Span, role: str) -> Diagnostic:
    """Say that a template reads no field, as in `prompt = "{{question}}"`."""
    doubled = "{{" in span.text
    return error(
        "bad-template",
        f"every row would have the same {role}: no field is named",
        span,
        help="a field has single braces; doubled braces are text"
        if doubled
        else "such as `{question}`",
    )


def instructions_lack(span: Span, name: str) -> Diagnostic:
    """Say that a rubric's instructions lack a field to judge."""
    return error("bad-template", f"these instructions do not contain `{{{name}}}`", span)


# Rewards.


def needs_procedural(span: Span, source: str, used: Use) -> Diagnostic:
    """Say that `verified()` scores data that no generator made."""
    return error(
        "needs-procedural",
        f"`verified()` cannot score `{source}`, which is not from a generator",
        span,
        seconds=_seconds(used),
        help="give each source its own reward: `by_source(a = verified(), b = ...)`",
    )


def unknown_source(span: Span, name: str, names: list[str], used: Use) -> Diagnostic:
    """Say that `by_source` names data that is not in the mixture."""
    return error(
        "unknown-source",
        f"{quoted(name)} is not a source of this data",
        span,
        seconds=_seconds(used),
        help=choose(name, names, "its sources are"),
        fix=replace_fix(span, name, names),
    )


def source_without_reward(span: Span, names: list[str], used: Use) -> Diagnostic:
    """Say that `by_source` omits a source of the mixture."""
    return error(
        "unknown-source",
        f"{listed(names)} would have no reward",
        span,
        seconds=_seconds(used),
        help=f"add `{names[0]} = ...`",
    )


def unknown_python_function(span: Span, name: str, file: str, functions: list[str]) -> Diagnostic:
    """Say that a Python file has no such function."""
    help = choose(name, functions, "it has")
    return error(
        "python-function", f"{quoted(file, 50)} has no function {quoted(name)}", span, help=help
    )


def awaited_function(span: Span, name: str) -> Diagnostic:
    """Say that a function is `async def` or a generator."""
    return error(
        "python-function",
        f"calling {quoted(name, 50)} does not return a value",
        span,
        "it is `async` or a generator",
        help="use an ordinary function; rewards already run in parallel processes",
    )


def no_completion_parameter(span: Span, name: str, parameters: list[str]) -> Diagnostic:
    """Say that a reward function takes no completion."""
    takes = f"it takes {listed(parameters)}" if parameters else "it takes nothing"
    return error(
        "python-function",
        f"{quoted(name, 50)} has no parameter `completion`",
        span,
        takes,
        help="a reward is called with the fields that its parameters name",
    )


def unknown_parameter_field(
    span: Span, name: str, parameter: str, known: list[str], used: Use
) -> Diagnostic:
    """Say that no field fills a parameter of a reward function."""
    return error(
        "python-function",
        f"no value for the parameter `{parameter}` of {quoted(name, 40)}",
        span,
        seconds=_seconds(used),
        notes=[f"there is {listed(known)}"],
        help="give it a default, or name a field of the data",
    )


def unfilled_parameter(span: Span, name: str, parameter: str, supplied: list[str]) -> Diagnostic:
    """Say that a parameter of a function receives no value."""
    return error(
        "python-function",
        f"no value for the parameter `{parameter}` of {quoted(name, 40)}",
        span,
        notes=[f"there is {listed(supplied)}"] if supplied else [],
        help="give it a default" if supplied else f"`settings = settings({parameter} = ...)`",
    )


def unknown_argument_of(span: Span, name: str, function: str, known: list[str]) -> Diagnostic:
    """Say that a function does not take a setting."""
    title = f"{quoted(function, 40)} has no parameter `{name}`"
    return error("python-function", title, span, help=choose(name, known, "it has"))


def only_of_rewards(span: Span, name: str) -> Diagnostic:
    """Say that a function in a compiled program has no `timeout`."""
    title = f"`{name}` has no effect here"
    label = "the function is compiled into the step"
    return error("python-function", title, span, label, help=f"leave `{name}` out")


# Generators.


def no_generators(span: Span) -> Diagnostic:
    """Say that reasoning-gym is not installed."""
    return error(
        "missing-package",
        "procedural data needs the package `reasoning-gym`",
        span,
        help="install it: `pip install reasoning-gym`",
    )


def unknown_task(span: Span, name: str, tasks: list[str]) -> Diagnostic:
    """Say that a generator does not exist."""
    near = nearest(name, tasks)
    parts = [p for p in name.split("_") if len(p) > 3]
    related = sorted(t for t in tasks if any(p in t for p in parts))[:SHORT_LIST]
    help = f"did you mean `{near}`?" if near else f"there is {listed(related)}" if related else None
    return error(
        "unknown-task",
        f"reasoning-gym has no generator {quoted(name)}",
        span,
        help=help or f"it has {len(tasks)}, such as {listed(sorted(tasks)[:5])}",
    )


def unknown_setting(span: Span, name: str, task: str, known: list[str]) -> Diagnostic:
    """Say that a generator has no such setting."""
    if name in ("size", "seed"):
        return error(
            "unknown-attribute",
            f"`{name}` is an attribute of the data itself",
            span,
            help=f"write `{name} = ...` in the block",
        )
    help = choose(name, known, "its settings are") or f"its settings are {listed(known)}"
    return error(
        "unknown-attribute",
        f"the generator `{task}` has no setting {quoted(name)}",
        span,
        help=help,
        fix=replace_fix(span, name, known),
    )
