"""Messages about imports of other specs, and about overrides by `--set`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages.naming import NamedDeclaration
from tunelang.dsl.messages.wording import (
    article,
    choose,
    error,
    listed,
    nearest,
    quoted,
    replace_fix,
)
from tunelang.dsl.syntax.source import Span

# Imports.


def import_cycle(span: Span, names: Sequence[str]) -> Diagnostic:
    """Say that files import each other."""
    return error(
        "import-cycle",
        "this import leads back to this file",
        span,
        notes=[f"the cycle: {' → '.join(names)}"],
    )


def unreadable_import(span: Span, path: Path, problem: Exception) -> Diagnostic:
    """Say that an imported file does not exist or is no text."""
    if isinstance(problem, FileNotFoundError):
        try:
            neighbours = [p.name for p in path.parent.iterdir() if p.suffix == ".tune"]
        except OSError:
            neighbours = []
        near = nearest(path.name, neighbours)
        written = Path(span.text.strip('"'))
        help = f"did you mean `{written.with_name(near)}`?" if near else None
        return error("missing-file", "the imported file does not exist", span, help=help)
    what = "is not UTF-8 text" if isinstance(problem, UnicodeDecodeError) else "cannot be read"
    return error("unreadable-file", f"the imported file {what}", span)


def run_in_import(span: Span) -> Diagnostic:
    """Warn that the `run` block of an imported file does not apply."""
    return error(
        "run-in-import",
        "the `run` block of an imported file does not apply",
        Span(span.source, span.start, span.start + 3),
        severity="warning",
        help="the `run` block of the importing file applies",
    )


def nameless_parameter(span: Span, params: list[str]) -> Diagnostic:
    """Say that a parameter of an import has no name, as in `import ... with (1)`."""
    help = f"its parameters are {listed(params)}" if params else "it declares no `param`"
    return error(
        "needs-name", "parameters of an import must be named", span, "which one?", help=help
    )


def unknown_parameter(span: Span, name: str, params: list[str]) -> Diagnostic:
    """Say that an imported file has no such parameter, as in `import ... with (nmae = 1)`."""
    help = choose(name, params, "its parameters are") or "it declares no `param`"
    return error(
        "unknown-attribute",
        f"the imported file has no parameter {quoted(name)}",
        span,
        help=help,
        fix=replace_fix(span, name, params),
    )


def unknown_in_import(span: Span, prefix: str, name: str, names: list[str]) -> Diagnostic:
    """Say that an import declares no such name, as in `base.nothing`."""
    help = choose(name, names, f"`{prefix}` has")
    return error(
        "unknown-name",
        f"the import `{prefix}` declares no {quoted(name)}",
        span,
        help=help,
        fix=replace_fix(span, name, names),
    )


# Overrides.


def bad_override(span: Span) -> Diagnostic:
    """Say that a `--set` has no `name=`."""
    return error(
        "bad-override",
        "an override is `NAME=EXPRESSION`",
        span,
        help="such as `--set lr=3e-6` or `--set stage.baseline.optimizer.lr=1e-5`",
    )


def override_needs_quotes(span: Span, path: str) -> Diagnostic:
    """Say that text needs quotes, as in `--set model.gemma.path=google/gemma-2b`: the shell
    may have removed them.
    """
    text = span.text.strip().strip("'")
    return error(
        "bad-override",
        "text must be in quotes, and the shell removes one pair",
        span,
        help=f"write `--set '{path}=\"{text}\"'`",
    )


def unknown_override(span: Span, path: str, noun: str, names: list[str]) -> Diagnostic:
    """Say that nothing has the path of a `--set`."""
    last = path.split(".")[1] if noun != "param" and "." in path else path
    help = choose(last, names, "there is")
    if help is None and noun == "param":
        help = "an attribute is set by noun and name: `stage.baseline.batch`"
    return error("bad-override", f"there is no {noun} {quoted(last)}", span, help=help)


def override_needs_noun(span: Span, symbol: NamedDeclaration, rest: list[str]) -> Diagnostic:
    """Say that a path lacks its noun, as in `--set baseline.batch=...`."""
    path = ".".join([symbol.noun, symbol.name, *rest])
    what = "only a `param` is set by its bare name"
    return error(
        "bad-override",
        f"`{symbol.name}` is {article(symbol.noun)}: {what}",
        span,
        help=f"write `{path}=...`",
    )


def override_needs_attribute(span: Span, symbol: NamedDeclaration) -> Diagnostic:
    """Say that a path names a block, as in `--set stage.baseline=...`."""
    path = f"{symbol.noun}.{symbol.name}"
    return error(
        "bad-override",
        f"`{path}` is a block, not a value",
        span,
        help=f"name an attribute: `{path}.NAME=...`",
    )


def override_of_expression(span: Span, symbol: NamedDeclaration) -> Diagnostic:
    """Say that an expression has no attributes, as in `--set data.general.path=...`."""
    path = f"{symbol.noun}.{symbol.name}"
    return error(
        "bad-override",
        f"`{path}` is an expression without attributes",
        span,
        help=f"replace it: `{path}=...`",
    )


def override_needs_call(span: Span, name: str) -> Diagnostic:
    """Say that a value is no call, as in `--set stage.x.optimizer.lr=...` for an optimizer
    that is a name.
    """
    return error("bad-override", f"there is no call here whose {quoted(name)} could be set", span)
