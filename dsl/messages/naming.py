"""Messages about names: unknown, missing, repeated, taken, of the wrong noun, unused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit, Label
from tunelang.dsl.messages.wording import (
    KNOWN_AFTER,
    article,
    choose,
    describe,
    error,
    listed,
    nearest,
    quoted,
    replace_fix,
)
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import foreign, types
from tunelang.dsl.vocabulary.base import KindInfo
from tunelang.dsl.vocabulary.tables import FUNCTIONS, NOUNS


class NamedDeclaration(Protocol):
    """The facts of a declaration that these messages mention."""

    @property
    def noun(self) -> str:
        """`data`, `stage`, ..."""

    @property
    def name(self) -> str:
        """The qualified name: `base.math`."""

    @property
    def local_name(self) -> str:
        """The name as its own file declares it: `math`."""

    @property
    def span(self) -> Span:
        """The place of the name in its declaration."""


# Declarations.


def unknown_noun(
    item: nodes.Declaration, nouns: list[str], kinds: Mapping[str, Mapping[str, object]]
) -> Diagnostic:
    """Say that a noun does not exist, as in `modle gemma : pretrained`."""
    word, span = item.noun.text, item.noun.span
    meant = foreign.NOUNS.get(word) or nearest(word, nouns)
    if meant is None and item.kind is not None:
        meant = next((noun for noun, table in kinds.items() if item.kind.text in table), None)
    if meant is None:
        return error(
            "unknown-noun",
            f"{quoted(word)} is not a noun of the language",
            span,
            help=f"the nouns are {listed(nouns)}",
        )
    return error(
        "unknown-noun",
        f"{quoted(word)} is not a noun of the language",
        span,
        help=f"did you mean `{meant}`?",
        fix=Edit(span, meant),
    )


def unknown_kind(
    item: nodes.Declaration, kind: nodes.Name, kinds: Mapping[str, Mapping[str, object]]
) -> Diagnostic:
    """Say that a noun has no such kind, as in `stage s : stf`."""
    noun, word = item.noun.text, kind.text
    title = f"{quoted(word)} is not a kind of {noun}"
    kinds_of_noun = list(kinds.get(noun, {}))
    if not kinds_of_noun:
        return error(
            "unknown-kind",
            f"`{noun}` has no kinds",
            kind.span,
            help=f"write `{noun} {item.name.text} = ...`",
        )
    for other, table in kinds.items():
        if word in table and other != noun:
            return error(
                "unknown-kind",
                title,
                kind.span,
                f"a kind of {other}",
                help=f"the kinds of {noun} are {listed(kinds_of_noun)}",
            )
    meant = foreign.KINDS.get(word)
    if meant in kinds_of_noun:
        return error(
            "unknown-kind",
            title,
            kind.span,
            help=f"it is called `{meant}` here",
            fix=Edit(kind.span, meant),
        )
    help = (
        choose(word, kinds_of_noun, "the kinds are")
        or f"the kinds of {noun} are {listed(kinds_of_noun)}"
    )
    return error(
        "unknown-kind", title, kind.span, help=help, fix=replace_fix(kind.span, word, kinds_of_noun)
    )


def needs_kind(item: nodes.Declaration, kinds: Mapping[str, KindInfo]) -> Diagnostic:
    """Say that a declaration lacks its kind, as in `model m = gemma`."""
    noun, name = item.noun.text, item.name.text
    return error(
        "missing-kind",
        f"{article(noun)} needs a kind",
        item.name.span,
        help=f"write `{noun} {name} : KIND {{ ... }}`; the kinds are {listed(list(kinds))}",
    )


def name_taken(span: Span, taken: NamedDeclaration) -> Diagnostic:
    """Say that a name is declared twice."""
    return error(
        "name-taken",
        f"{quoted(taken.local_name)} is already declared",
        span,
        "declared again",
        seconds=[Label(taken.span, f"first declared here, as {article(taken.noun)}")],
    )


def name_taken_by_import(
    span: Span, taken: NamedDeclaration, other: NamedDeclaration
) -> Diagnostic:
    """Say that an import brings in a name that is already declared."""
    name = taken.local_name
    return error(
        "name-taken",
        f"this import brings in a second `{name}`",
        span,
        seconds=[Label(taken.span, "declared here"), Label(other.span, "and in the imported file")],
        help='give the import a prefix: `import "..." as base`',
    )


def cycle(symbols: Sequence[NamedDeclaration], spans: Sequence[Span]) -> Diagnostic:
    """Say that declarations depend on each other."""
    names = [symbol.name for symbol in symbols]
    path = " → ".join([*names, names[0]])
    nouns = {symbol.noun for symbol in symbols}
    what = f"{nouns.pop()} " if len(nouns) == 1 else ""
    if len(symbols) == 1:
        title = f"{what}`{names[0]}` uses itself"
    elif len(symbols) <= 5:
        title = f"{what}{listed(names)} depend on each other"
    else:
        title = f"{len(symbols)} declarations depend on each other"
    seconds = [
        Label(span, f"`{names[index]}` uses `{names[(index + 1) % len(names)]}`")
        for index, span in enumerate(spans[:6])
    ]
    shown = path if len(names) <= 8 else f"{' → '.join(names[:6])} → … → {names[0]}"
    return error(
        "cycle",
        title,
        seconds[0].span,
        seconds[0].text,
        seconds=seconds[1:],
        notes=[f"the cycle: {shown}"],
    )


def second_run(span: Span, first: Span) -> Diagnostic:
    """Say that a spec has two `run` blocks."""
    head = Span(span.source, span.start, span.start + 3)
    return error(
        "name-taken",
        "a spec can have only one `run` block",
        head,
        "the second",
        seconds=[Label(Span(first.source, first.start, first.start + 3), "the first")],
    )


def unused(symbol: NamedDeclaration) -> Diagnostic:
    """Warn that a declaration is never used."""
    return error(
        "unused",
        f"{symbol.noun} {quoted(symbol.local_name)} is never used",
        symbol.span,
        severity="warning",
        help={
            "hardware": f"a stage or the `run` block uses it by `on = {symbol.name}`",
            "eval": f"a stage uses it by `evals = [{symbol.name}]`",
        }.get(symbol.noun),
    )


# References.


def unknown_name(span: Span, name: str, names: list[str], want: types.Type) -> Diagnostic:
    """Say that a name is not declared."""
    title = f"{quoted(name)} is not declared"
    value = foreign.NAMES.get(name)
    if isinstance(want, types.Of) and want.family == "text":
        return error(
            "unknown-name",
            title,
            span,
            help=f'a field is written in braces and quotes: `"{{{name}}}"`',
            fix=Edit(span, f'"{{{name}}}"'),
        )
    if isinstance(want, types.Text | types.Path):
        return error("unknown-name", title, span, help=f'text is written in quotes: `"{name}"`')
    if name in NOUNS:
        return error(
            "unknown-name",
            title,
            span,
            help=f"refer to a declaration by its name alone, without `{name}.`",
        )
    if value in ("true", "false", "none"):
        return error(
            "unknown-name",
            title,
            span,
            help=f"in a spec it is written `{value}`",
            fix=Edit(span, value),
        )
    if name in FUNCTIONS:
        example = f"{name}(...)"
        return error(
            "missing-call",
            f"`{name}` is a function",
            span,
            "its arguments are missing",
            help=f"write `{example}`",
        )
    if name == "each":
        return error(
            "missing-call", "`each` takes the values in parentheses", span, help="`each(a, b)`"
        )
    known = [n for n in names if n not in FUNCTIONS] or names
    help = choose(name, known, "declared are")
    if help is None and isinstance(want, types.Ref):
        help = f"{' or '.join(article(noun) for noun in want.nouns)} is wanted here"
    return error("unknown-name", title, span, help=help, fix=replace_fix(span, name, known))


def wrong_noun(
    span: Span, owner: str, symbol: NamedDeclaration, nouns: Sequence[str]
) -> Diagnostic:
    """Say that a name has the wrong noun: a `reward` where `data` is needed."""
    wanted = " or ".join(article(noun) for noun in nouns)
    return error(
        "wrong-noun",
        f"{owner} must be {wanted}, not {article(symbol.noun)}",
        span,
        f"`{symbol.name}` is {article(symbol.noun)}",
        seconds=[Label(symbol.span, f"declared as {article(symbol.noun)} here")],
        notes=[KNOWN_AFTER] if symbol.noun == "eval" else [],
    )


def unknown_function(span: Span, name: str, near: list[str], every: list[str]) -> Diagnostic:
    """Say that a function does not exist, as in `adamw2(lr = 1)`."""
    meant = foreign.FUNCTIONS.get(name)
    title = f"there is no function {quoted(name)}"
    if name in foreign.ADVICE:
        return error("unknown-function", title, span, help=foreign.ADVICE[name])
    if meant is not None:
        return error(
            "unknown-function",
            title,
            span,
            help=f"it is called `{meant}` here",
            fix=Edit(span, meant),
        )
    help = choose(name, near, "functions that fit here are") or choose(name, every, "")
    return error("unknown-function", title, span, help=help, fix=replace_fix(span, name, near))


def not_a_function(span: Span, symbol: NamedDeclaration) -> Diagnostic:
    """Say that a declared name is called, as in `math(1)`."""
    return error(
        "unknown-function",
        f"`{symbol.name}` is {article(symbol.noun)}, not a function",
        span,
        seconds=[Label(symbol.span, "declared here")],
    )


def not_callable(span: Span, value: object) -> Diagnostic:
    """Say that a value is called, as in `f(1)(2)`."""
    return error("unexpected-token", f"{describe(value)} takes no arguments", span)


def unknown_method(span: Span, name: str, value: object, methods: list[str]) -> Diagnostic:
    """Say that a value has no such method, as in `math.tkae(3)`."""
    help = choose(name, methods, "there is")
    if help is None and methods:
        help = f"there is {listed(methods)}"
    if name in methods:
        help = f"it takes arguments: `.{name}(...)`"
    return error(
        "unknown-method",
        f"{describe(value)} has no {quoted('.' + name)}",
        span,
        help=help,
        fix=replace_fix(span, name, methods) if name not in methods else (),
    )


def unknown_part(span: Span, name: str, parts: list[str]) -> Diagnostic:
    """Say that a split has no such part, as in `.split(test = 5%).valid`."""
    return error(
        "unknown-method",
        f"this split has no part {quoted(name)}",
        span,
        help=choose(name, parts, "its parts are"),
        fix=replace_fix(span, name, parts),
    )
