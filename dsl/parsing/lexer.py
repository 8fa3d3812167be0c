"""The lexer: text to tokens. Every character is in a token, a comment or a diagnostic."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import malformed
from tunelang.dsl.syntax import units
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.tokens import (
    KEYWORDS,
    LOOKALIKES,
    OPERAND_ENDS,
    PUNCTUATION,
    Comment,
    Lexeme,
)

# A number takes its scale or unit along: `20%`, `4Ki`, `2 epochs`, `10M tokens`, `1.2 per
# device_hour`.
_TOKEN = re.compile(
    r"""
    (?P<SPACE>[ \t]+)
  | (?P<NEWLINE>\r\n?|\n)
  | (?P<COMMENT>\#[^\r\n]*)
  | (?P<OTHERCOMMENT>//[^\r\n]*|/\*[\s\S]*?\*/)
  | (?P<NAME>[^\W\d]\w*)
  | (?P<NUMBER>(?:\d[\d_]*(?:\.\d[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?(?:[ \t]*%|[^\W\d]\w*)?
      (?:[ \t]+(?!(?:if|else|and|or|not|per)\b)[^\W\d]\w*(?!\w|[ \t]*=(?!=)))?
      (?:[ \t]+per[ \t]+[^\W\d]\w*)?)
  | (?P<LONGTEXT>\"{3}(?:[^\"\\]|\\[\s\S]|\"(?!\"\"))*\"{3})
  | (?P<OPENLONG>\"{3})
  | (?P<TEXT>\"(?:[^\"\\\r\n]|\\[^\r\n])*\")
  | (?P<OPENTEXT>\"[^\r\n]*)
  | (?P<SINGLE>'(?:[^'\\\r\n]|\\[^\r\n])*')
  | (?P<CURLY>[“”„«‘’][^\r\n“”„«»‘’"]*[“”»’])
  | (?P<COMPARE>==|!=|<=|>=|<|>)
  | (?P<PUNCTUATION>[{}()\[\]:=,.+\-*/])
  | (?P<STRAY>[\s\S])
    """,
    re.VERBOSE,
)
_LINE_END = re.compile(r"\r\n?|\n")
_TEXTS = {"TEXT", "LONGTEXT", "OPENTEXT", "OPENLONG", "SINGLE", "CURLY"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|[\s\S])")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\"}
_REGEX = re.compile(r"/((?:[^/\\\r\n]|\\[^\r\n])+)/")


@dataclass
class Tokens:
    """The result of lexing."""

    tokens: list[Lexeme] = field(default_factory=list)
    comments: list[Comment] = field(default_factory=list)
    unreadable: list[Span] = field(default_factory=list)
    """Characters outside of any token, which were reported."""
    diagnostics: list[Diagnostic] = field(default_factory=list)


def lex(source: Source) -> Tokens:
    """Split a source into tokens.

    What cannot be a token is reported once for each run of such characters; text in single
    quotes and text that is not closed still yield a TEXT token, so that parsing goes on.
    """
    out = Tokens()
    complain = out.diagnostics.append
    text, line, offset, end = source.text, 0, 0, len(source.text)
    stray_end = -1
    while offset < end:
        match = _TOKEN.match(text, offset)
        assert match is not None  # STRAY takes any character
        kind, stop = match.lastgroup or "", match.end()
        if kind == "PUNCTUATION" and match.group() == "/" and not _after_operand(out, line):
            regex = _REGEX.match(text, offset)
            if regex is not None:
                kind, stop = "REGEX", regex.end()
        if kind in ("SPACE", "NEWLINE"):
            line += kind == "NEWLINE"
            offset = stop
            continue
        span = Span(source, offset, stop)
        if kind == "COMMENT":
            alone = not out.tokens or out.tokens[-1].last_line != line
            out.comments.append(Comment(match.group().rstrip(), span, alone))
        elif kind == "OTHERCOMMENT":
            complain(malformed.other_comment(span))
            line += len(_LINE_END.findall(text, offset, stop))
        elif kind == "STRAY":
            if stray_end != offset:
                complain(malformed.stray_character(span))
            stray_end = stop
            meant = PUNCTUATION.get(LOOKALIKES.get(span.text, ""))
            if meant is not None:
                out.tokens.append(Lexeme(meant, span, line))
            elif span.text != ";":
                out.unreadable.append(span)
        elif kind == "NUMBER":
            heed = _ignore if _stands_as_name(out, line) else complain
            out.tokens.append(Lexeme(kind, span, line, None, _quantity(span, heed)))
        elif kind == "REGEX":
            pattern = span.text[1:-1].replace("\\/", "/")
            out.tokens.append(Lexeme(kind, span, line, None, pattern))
        elif kind in _TEXTS:
            if kind == "OPENLONG":
                stop = end
            last_line = line + len(_LINE_END.findall(text, offset, stop))
            value = _text(kind, Span(source, offset, stop), complain)
            out.tokens.append(Lexeme("TEXT", Span(source, offset, stop), line, last_line, value))
            line = last_line
        else:
            word = match.group()
            kind = PUNCTUATION.get(word) or KEYWORDS.get(word) or kind
            out.tokens.append(Lexeme(kind, span, line))
        offset = stop
    return out


def _after_operand(out: Tokens, line: int) -> bool:
    """Return whether a slash at this place divides: an operand ends before it on the line."""
    before = out.tokens[-1] if out.tokens else None
    return before is not None and before.type in OPERAND_ENDS and before.last_line == line


def _stands_as_name(out: Tokens, line: int) -> bool:
    """Return whether a number is in the place of a name, as in `model gemma-2b`, without a unit."""
    before = [token.type for token in out.tokens[-3:] if token.line == line]
    return before[-1:] == ["NAME"] or before == ["NAME", "NAME", "MINUS"]


def _ignore(_: Diagnostic) -> None:
    """Ignore a diagnostic, because the parser reports the place."""


def _quantity(span: Span, complain: Callable[[Diagnostic], None]) -> units.Quantity | None:
    try:
        return units.parse(span.text)
    except units.UnknownUnit as error:
        complain(malformed.unknown_unit(span, str(error)))
    except units.NumberTooLarge:
        complain(malformed.number_too_large(span))
    return None


def _text(kind: str, span: Span, complain: Callable[[Diagnostic], None]) -> str:
    """Return the content of a text literal: without quotes, escapes resolved, dedented."""
    raw = span.text
    if kind == "LONGTEXT":
        body = textwrap.dedent(raw[3:-3].removeprefix("\n").removeprefix("\r\n"))
    elif kind == "OPENLONG":
        complain(malformed.unclosed_text(Span(span.source, span.start, span.start + 3)))
        return raw[3:]
    elif kind == "OPENTEXT":
        complain(malformed.unclosed_text(span))
        return raw[1:]
    else:
        body = raw[1:-1]
        if kind in ("SINGLE", "CURLY"):
            complain(malformed.other_quotes(span))
    if "\\" not in body:
        return body

    def resolve(match: re.Match[str]) -> str:
        what = match.group(1)
        if what in _ESCAPES:
            return _ESCAPES[what]
        if len(what) > 1 and int(what[1:], 16) not in range(0xD800, 0xE000):
            return chr(int(what[1:], 16))
        complain(malformed.unknown_escape(span, match.group()))
        return match.group()

    return _ESCAPE.sub(resolve, body)
