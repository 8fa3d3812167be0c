"""Messages about the form of a spec: characters, brackets, what may follow what."""

from __future__ import annotations

import re
import unicodedata

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit
from tunelang.dsl.messages.wording import error, listed, nearest, quoted
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.tokens import LOOKALIKES
from tunelang.dsl.syntax.units import BYTES, COUNTED, SCALES, SECONDS, UNITS

_NAMES = {
    "{": "brace",
    "(": "parenthesis",
    "[": "bracket",
    "}": "brace",
    ")": "parenthesis",
    "]": "bracket",
}
_PARTNER = {"{": "}", "(": ")", "[": "]", "}": "{", ")": "(", "]": "["}


def unreadable(source: Source, problem: Exception) -> Diagnostic:
    """Say that the spec cannot be read."""
    if isinstance(problem, UnicodeDecodeError):
        what = f"it is not UTF-8 text (byte {problem.start + 1})"
    elif isinstance(problem, OSError) and problem.strerror:
        what = problem.strerror.lower()
    else:
        what = "it cannot be read"
    return error("unreadable-file", f"{quoted(source.name, 50)}: {what}", Span(source, 0, 0))


def stray_character(span: Span) -> Diagnostic:
    """Say that no token starts with a character."""
    character = span.text
    shown = character if character.isprintable() else f"U+{ord(character):04X}"
    if character == ";":
        return error(
            "unexpected-character",
            "lines do not end with `;`",
            span,
            "not needed",
            fix=Edit(span, ""),
            help="a line end or a comma separates attributes",
        )
    if character in LOOKALIKES:
        plain = LOOKALIKES[character]
        return error(
            "unexpected-character",
            f"`{shown}` is not the character `{plain}`",
            span,
            help=f"write `{plain}`",
            fix=Edit(span, plain),
        )
    try:
        name = unicodedata.name(character).lower()
    except ValueError:
        name = "a control character"
    return error("unexpected-character", f"`{shown}` has no meaning here", span, name)


def unclosed_text(span: Span) -> Diagnostic:
    """Say that a text literal has no end."""
    if span.text.startswith('"""'):
        return error("unclosed-text", 'this text has no closing `"""`', span, "opened here")
    return error(
        "unclosed-text",
        "this text is not closed on its line",
        span,
        'no `"` follows',
        help='text of several lines is written between `"""` and `"""`',
    )


def other_quotes(span: Span) -> Diagnostic:
    """Say that text is in single or typographic quotes."""
    body = span.text[1:-1].replace('"', '\\"')
    single = span.text[0] == "'"
    code = "single-quotes" if single else "unexpected-character"
    title = (
        "text must be in double quotes" if single else f'`{span.text[0]}` is not the character `"`'
    )
    return error(code, title, span, fix=Edit(span, f'"{body}"'))


def unknown_escape(span: Span, escape: str) -> Diagnostic:
    """Say that a backslash precedes an unknown letter in text."""
    offset = span.text.find(escape)
    place = Span(
        span.source, span.start + max(offset, 0), span.start + max(offset, 0) + len(escape)
    )
    return error(
        "unknown-escape",
        f"`{escape}` is not an escape",
        place,
        help='escapes are `\\n`, `\\t`, `\\r`, `\\"`, `\\\\` and `\\u`'
        " with four hexadecimal digits",
    )


def other_comment(span: Span) -> Diagnostic:
    """Say that a comment is written `// text` or `/* text */`."""
    fix: tuple[Edit, ...] = ()
    if span.text.startswith("//"):
        fix = (Edit(Span(span.source, span.start, span.start + 2), "#"),)
    return error("unexpected-character", "a comment starts with `#`", span, fix=fix)


_UNIT_WORDS = {
    "sec": "s", "secs": "s", "seconds": "s", "second": "s", "min": "m", "mins": "m", "minutes": "m",
    "hour": "h", "hours": "h", "hr": "h", "days": "d", "day": "d", "percent": "%", "pct": "%",
    "toks": "tokens", "tok": "tokens", "examples": "sequences", "samples": "sequences",
    "iterations": "steps", "iters": "steps", "K": "k", "gb": "GB", "mb": "MB",
}  # fmt: skip


def unknown_unit(span: Span, word: str) -> Diagnostic:
    """Say that a number is followed by a word that is no unit."""
    parts = re.match(r"([\d._]+)[ \t]*(%?)[ \t]*(.*)", span.text)
    if parts is not None and parts.group(2) and parts.group(3):
        named = f"{parts.group(1)}% * {parts.group(3)}"
        return error(
            "unknown-unit",
            f"a share is written as a product: `{named}`",
            span,
            "`*` is missing",
            fix=Edit(span, named),
        )
    if word in _UNIT_WORDS and parts is not None:
        unit = _UNIT_WORDS[word]
        gap = " " if len(unit) > 2 else ""
        fixed = f"{parts.group(1)}{gap}{unit}"
        return error(
            "unknown-unit",
            f"`{word}` is not a unit",
            span,
            help=f"write `{fixed}`" if word != "K" else "thousands are `k`, 1,024s are `Ki`",
            fix=Edit(span, fixed),
        )
    offset = span.text.rfind(word)
    place = Span(span.source, span.start + offset, span.end) if offset >= 0 else span
    near = nearest(word, [*SCALES, *UNITS])
    folded = {unit.lower(): unit for unit in [*BYTES, *SCALES]}.get(word.lower())
    near = folded or near
    help = (
        f"did you mean `{near}`?"
        if near
        else f"numbers scale with {listed(list(SCALES))}; units are `%`, {listed(COUNTED)},"
        f" {listed(list(BYTES))}, {listed(list(SECONDS))}"
    )
    fix = Edit(Span(span.source, place.start, place.start + len(word)), near) if near else ()
    return error("unknown-unit", f"`{word}` is not a unit", place, help=help, fix=fix)


def number_too_large(span: Span) -> Diagnostic:
    """Say that a number is too large for a double."""
    return error("number-too-large", "this number is too large", span, "beyond 1e300")


def unclosed_bracket(span: Span) -> Diagnostic:
    """Say that an opening bracket is never closed."""
    mark = span.text
    return error(
        "unclosed-bracket",
        f"this {_NAMES[mark]} is not closed",
        span,
        f"no `{_PARTNER[mark]}` follows",
    )


def unopened_bracket(span: Span) -> Diagnostic:
    """Say that a closing bracket was never opened."""
    mark = span.text
    return error(
        "unopened-bracket",
        f"this {_NAMES[mark]} has no opening partner",
        span,
        f"no `{_PARTNER[mark]}` is open",
        fix=Edit(span, ""),
    )


def missing_brace(span: Span) -> Diagnostic:
    """Say that attributes follow `stage rl : grpo` without a brace."""
    end = Span(span.source, span.end, span.end)
    return error("missing-brace", "`{` is missing here", end, fix=Edit(end, " {"))


def nested_declaration(span: Span) -> Diagnostic:
    """Say that a declaration is inside the block of another."""
    return error(
        "nested-block",
        "declarations cannot be inside a block",
        span,
        help="move it out, and refer to it by its name",
    )


def too_deep(span: Span) -> Diagnostic:
    """Say that brackets are nested too deeply."""
    return error("too-deep", "this is nested too deeply", span, help="name a part of it with `let`")


def too_many_errors(span: Span) -> Diagnostic:
    """Say that the rest of the file was not read."""
    return error("too-many-errors", "too many errors: the rest of the file was not read", span)


def no_value(span: Span) -> Diagnostic:
    """Say that a `--set` has no value, as in `--set a=`."""
    return error("missing-value", "there is no value after `=`", span)
