"""Messages about the form of a spec: characters, brackets, what may follow what."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from tunelang.dsl.diagnostics import Diagnostic, Edit
from tunelang.dsl.lexer import LOOKALIKES
from tunelang.dsl.messages.wording import error, listed, nearest, quoted
from tunelang.dsl.source import Source, Span
from tunelang.dsl.units import BYTES, COUNTED, SCALES, SECONDS, UNITS

if TYPE_CHECKING:
    from tunelang.dsl.lexer import Lexeme


_NAMES = {
    "{": "brace",
    "(": "parenthesis",
    "[": "bracket",
    "}": "brace",
    ")": "parenthesis",
    "]": "bracket",
}
_PARTNER = {"{": "}", "(": ")", "[": "]", "}": "{", ")": "(", "]": "["}
_OPERAND_END = {"NAME", "NUMBER", "TEXT", "REGEX", "TRUE", "FALSE", "NONE", "RPAR", "RSQB"}
_OPERAND_START = {"NAME", "NUMBER", "TEXT", "REGEX", "TRUE", "FALSE", "NONE", "LPAR", "LSQB", "NOT"}
_KEYWORDS = {"IF", "ELSE", "AND", "OR", "NOT", "TRUE", "FALSE", "NONE"}
_FORMS = "a declaration is `NOUN NAME : KIND { ... }` or `NOUN NAME = expression`"
_OPERATORS = {"PLUS", "MINUS", "STAR", "SLASH", "COMPARE", "AND", "OR", "NOT", "IF", "ELSE"}


def unreadable(source: Source, problem: Exception) -> Diagnostic:
    """The spec itself cannot be read."""
    if isinstance(problem, UnicodeDecodeError):
        what = f"it is not UTF-8 text (byte {problem.start + 1})"
    elif isinstance(problem, OSError) and problem.strerror:
        what = problem.strerror.lower()
    else:
        what = "it cannot be read"
    return error("unreadable-file", f"{quoted(source.name, 50)}: {what}", Span(source, 0, 0))


def stray_character(span: Span) -> Diagnostic:
    """A character that no token starts with."""
    character = span.text
    shown = character if character.isprintable() else f"U+{ord(character):04X}"
    if character == ";":
        return error(
            "unexpected-character",
            "a line ends without `;`",
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
    return error("unexpected-character", f"`{shown}` means nothing here", span, name)


def unclosed_text(span: Span) -> Diagnostic:
    """A text literal without its end."""
    if span.text.startswith('"""'):
        return error("unclosed-text", 'this text has no closing `"""`', span, "opened here")
    return error(
        "unclosed-text",
        "this text is not closed on its line",
        span,
        'no `"` follows',
        help='text over several lines stands between `"""` and `"""`',
    )


def other_quotes(span: Span) -> Diagnostic:
    """`'text'`, or text in typographic quotes."""
    body = span.text[1:-1].replace('"', '\\"')
    single = span.text[0] == "'"
    code = "single-quotes" if single else "unexpected-character"
    title = (
        "text stands in double quotes" if single else f'`{span.text[0]}` is not the character `"`'
    )
    return error(code, title, span, fix=Edit(span, f'"{body}"'))


def unknown_escape(span: Span, escape: str) -> Diagnostic:
    """An unknown letter behind a backslash in text."""
    at = span.text.find(escape)
    place = Span(span.source, span.start + max(at, 0), span.start + max(at, 0) + len(escape))
    return error(
        "unknown-escape",
        f"`{escape}` is no escape",
        place,
        help='escapes are `\\n`, `\\t`, `\\r`, `\\"`, `\\\\` and `\\u`'
        " with four hexadecimal digits",
    )


def unknown_unit(span: Span, word: str) -> Diagnostic:
    """A number followed by a word that is no unit."""
    at = span.text.rfind(word)
    place = Span(span.source, span.start + at, span.end) if at >= 0 else span
    near = nearest(word, [*SCALES, *UNITS])
    folded = {unit.lower(): unit for unit in [*BYTES, *SCALES]}.get(word.lower())
    near = folded or near
    help = (
        f"did you mean `{near}`?"
        if near
        else f"numbers scale with {listed(list(SCALES))}; units are `%`, {listed(COUNTED)},"
        f" {listed(list(BYTES))}, {listed(list(SECONDS))}"
    )
    if word == "K":
        near, help = "k", "thousands are `k`, 1,024s are `Ki`"
    fix = Edit(Span(span.source, place.start, place.start + len(word)), near) if near else ()
    return error("unknown-unit", f"`{word}` is no unit", place, help=help, fix=fix)


def number_too_large(span: Span) -> Diagnostic:
    """Beyond what a double holds."""
    return error("number-too-large", "this number is too large", span, "beyond 1e300")


def unclosed_bracket(span: Span) -> Diagnostic:
    """An opening bracket without its partner."""
    mark = span.text
    return error(
        "unclosed-bracket",
        f"this {_NAMES[mark]} is not closed",
        span,
        f"no `{_PARTNER[mark]}` follows",
    )


def unopened_bracket(span: Span) -> Diagnostic:
    """A closing bracket without its partner."""
    mark = span.text
    return error(
        "unopened-bracket",
        f"this {_NAMES[mark]} closes nothing",
        span,
        f"no `{_PARTNER[mark]}` is open",
        fix=Edit(span, ""),
    )


def too_deep(span: Span) -> Diagnostic:
    """Nesting beyond what is sensible."""
    return error("too-deep", "this is nested too deeply", span, help="name a part of it with `let`")


def too_many_errors(span: Span) -> Diagnostic:
    """The rest of the file was not read."""
    return error("too-many-errors", "too many errors: the rest of the file was not read", span)


def no_value(span: Span) -> Diagnostic:
    """`--set a=`."""
    return error("missing-value", "there is no value after `=`", span)


def syntax_error(tokens: list[Lexeme], bad: object) -> Diagnostic:
    """A token that does not fit: the likeliest cause, else what stood there."""
    at = next((i for i, token in enumerate(tokens) if token is bad), len(tokens))
    return _Misfit(tokens, at).diagnose()


class _Misfit:
    """The token at which an item stops making sense, and what stands around it."""

    def __init__(self, tokens: list[Lexeme], at: int) -> None:
        self.tokens, self.at = tokens, at
        last = tokens[-1].span
        self.kind = tokens[at].type if at < len(tokens) else "$END"
        self.span = tokens[at].span if at < len(tokens) else Span(last.source, last.end, last.end)
        self.before = tokens[max(at - 1, 0)]
        stack: list[str] = []
        for token in tokens[:at]:
            if token.type in ("LBRACE", "LPAR", "LSQB"):
                stack.append(token.type)
            elif token.type in ("RBRACE", "RPAR", "RSQB") and stack:
                stack.pop()
        self.inside = stack[-1] if stack else ""

    def type_at(self, back: int) -> str:
        """The type of the token `back` places before the misfit."""
        return self.tokens[self.at - back].type if self.at >= back else ""

    def starts_attribute(self, back: int) -> bool:
        """Whether the token `back` places before stands where an attribute's name does."""
        return self.inside == "LBRACE" and self.type_at(back + 1) in ("SEP", "LBRACE")

    def diagnose(self) -> Diagnostic:
        """The first explanation that fits."""
        for explain in (
            self._top_level, self._colon, self._double_equals, self._nested_block,
            self._missing_value, self._keyword_as_name, self._open_expression,
            self._missing_equals, self._missing_comma, self._side_by_side, self._chained,
        ):  # fmt: skip
            found = explain()
            if found is not None:
                return found
        return self._general()

    def _top_level(self) -> Diagnostic | None:
        if self.inside:
            return None
        kinds = [token.type for token in self.tokens[:3]]
        first = self.tokens[0]
        if kinds[0] in _OPERATORS:
            return self._open_expression()
        if kinds[0] == "NAME" and kinds[1:2] and kinds[1] in _KEYWORDS and self.at == 1:
            return self._keyword_as_name()
        if kinds == ["NAME", "NAME"] and self.kind == "$END":
            return error(
                "unexpected-token",
                f"`{first.text} {self.tokens[1].text}` is no whole declaration",
                first.span.to(self.tokens[1].span),
                help=_FORMS,
            )
        if kinds[:2] == ["NAME", "EQUALS"] and self.at == 1:
            start = Span(first.span.source, first.span.start, first.span.start)
            return error(
                "missing-noun",
                f"{quoted(first.text)} stands outside of any block",
                first.span,
                "a declaration starts with a noun",
                fix=Edit(start, "let "),
                help=f"`let {first.text} = ...` names a value; an attribute belongs inside `{{ }}`",
            )
        if kinds[:3] == ["NAME", "NAME", "LBRACE"] and self.at == 2:
            return error(
                "missing-kind",
                f"`{first.text} {self.tokens[1].text}` has no kind",
                self.span,
                "`: kind` is missing before this",
                help=f"write `{first.text} {self.tokens[1].text} : KIND {{`",
            )
        if kinds[:2] == ["NAME", "LBRACE"] or kinds[:2] == ["NAME", "COLON"]:
            return error(
                "missing-name",
                f"this {quoted(first.text)} has no name",
                first.span,
                help=f"write `{first.text} NAME : KIND {{ ... }}`",
            )
        if self.at == 0 or (self.at == 1 and self.kind != "$END"):
            return error(
                "missing-noun",
                f"{quoted(first.text)} starts no declaration",
                first.span,
                help=_FORMS,
            )
        return None

    def _colon(self) -> Diagnostic | None:
        if self.kind == "COLON" and self.type_at(1) == "NAME" and self.inside in ("LBRACE", "LPAR"):
            spaced = " =" if self.before.span.end == self.span.start else "="
            return error(
                "colon-for-equals",
                f"`{self.before.text}` is set with `=`",
                self.span,
                "a colon goes between a name and its kind",
                fix=Edit(self.span, spaced),
            )
        return None

    def _double_equals(self) -> Diagnostic | None:
        if self.span.text == "==" and self.type_at(1) == "NAME" and self.starts_attribute(1):
            return error(
                "unexpected-token",
                f"`{self.before.text}` is set with one `=`",
                self.span,
                "this compares",
                fix=Edit(self.span, "="),
            )
        return None

    def _nested_block(self) -> Diagnostic | None:
        if self.kind != "LBRACE" or not self.inside:
            return None
        name, call = self.before, self.before
        if self.starts_attribute(1):
            example = f"{name.text} = NAME(...)"
        elif self.type_at(2) == "EQUALS":
            name = self.tokens[self.at - 3] if self.at >= 3 else name
            example = f"{name.text} = {call.text}(...)"
        else:
            example = "name = call(...)"
        return error(
            "nested-block",
            "there are no blocks inside blocks",
            self.span,
            help=f"grouped settings are a call with named arguments: `{example}`",
        )

    def _missing_value(self) -> Diagnostic | None:
        if self.type_at(1) != "EQUALS" or self.kind not in (
            "SEP",
            "RBRACE",
            "$END",
            "COMMA",
            "RPAR",
        ):
            return None
        name = self.tokens[self.at - 2].text if self.at >= 2 else ""
        return error("missing-value", f"`{name}` has no value", self.before.span, "nothing follows")

    def _keyword_as_name(self) -> Diagnostic | None:
        named = self.starts_attribute(0) or (not self.inside and self.at == 1)
        if self.kind in _KEYWORDS and named:
            return error(
                "unexpected-token",
                f"`{self.span.text}` is a word of the language",
                self.span,
                "it cannot be a name",
            )
        return None

    def _open_expression(self) -> Diagnostic | None:
        if self.type_at(1) in _OPERATORS and self.kind not in _OPERAND_START:
            return error(
                "unexpected-token",
                f"nothing to the right of `{self.before.text}`",
                self.before.span,
                "a value must follow",
            )
        if self.kind in _OPERATORS and (self.starts_attribute(0) or self.at == 0):
            return error(
                "unexpected-token",
                f"a line cannot start with `{self.span.text}`",
                self.span,
                help="an expression goes on over a line end inside `( )`, or after an operator",
            )
        return None

    def _missing_equals(self) -> Diagnostic | None:
        if self.type_at(1) == "NAME" and self.starts_attribute(1):
            if self.kind in ("SEP", "RBRACE", "$END", "DOT"):
                return error(
                    "missing-value",
                    f"`{self.before.text}` has no value",
                    self.before.span,
                    help=f"write `{self.before.text} = ...`",
                )
            between = Span(self.span.source, self.before.span.end, self.span.start)
            return error(
                "missing-equals",
                f"`=` is missing after `{self.before.text}`",
                self.span,
                fix=Edit(between, " = ") if self.kind in _OPERAND_START else (),
            )
        return None

    def _side_by_side(self) -> Diagnostic | None:
        if not self.inside and self.at > 2 and self.kind in _OPERAND_START - {"LPAR", "LSQB"}:
            if self.type_at(1) in _OPERAND_END:
                return error(
                    "unexpected-token",
                    "two values stand side by side",
                    self.span,
                    "an operator or a line end is missing before this",
                )
        return None

    def _missing_comma(self) -> Diagnostic | None:
        if self.kind not in _OPERAND_START or self.type_at(1) not in _OPERAND_END:
            return None
        gap = Span(self.span.source, self.before.span.end, self.before.span.end)
        what = {"LPAR": "arguments", "LSQB": "items of a list", "LBRACE": "attributes on one line"}
        if self.inside not in what or self.kind in ("LPAR", "LSQB"):
            return None
        return error(
            "missing-comma",
            f"a comma is missing between {what[self.inside]}",
            gap,
            fix=Edit(gap, ","),
        )

    def _chained(self) -> Diagnostic | None:
        if self.kind == "COMPARE":
            return error(
                "unexpected-token",
                "comparisons do not chain",
                self.span,
                help="compare two values at a time: `a < b and b < c`",
            )
        if self.kind == "LSQB" and self.type_at(1) in _OPERAND_END:
            return error(
                "unexpected-token",
                "nothing is indexed here",
                self.span,
                help="data has methods, such as `.take(1000)`; functions take `( )`",
            )
        return None

    def _general(self) -> Diagnostic:
        if self.kind == "$END":
            return error("unexpected-token", "the declaration ends too early", self.span)
        text = self.span.text or "the end of the line"
        return error("unexpected-token", f"{quoted(text)} does not fit here", self.span)
