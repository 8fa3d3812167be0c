"""Tokens and comments: the lexer's output, the parser's input."""

from __future__ import annotations

from dataclasses import dataclass

from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.units import Quantity

KEYWORDS = {
    word: word.upper() for word in ("if", "else", "and", "or", "not", "true", "false", "none")
}
"""Reserved word -> its token type."""

PUNCTUATION = {
    "{": "LBRACE", "}": "RBRACE", "(": "LPAR", ")": "RPAR", "[": "LSQB", "]": "RSQB",
    ":": "COLON", "=": "EQUALS", ",": "COMMA", ".": "DOT",
    "+": "PLUS", "-": "MINUS", "*": "STAR", "/": "SLASH",
}  # fmt: skip
"""Character -> its token type."""

OPENING_BRACKETS = {"LBRACE": "RBRACE", "LPAR": "RPAR", "LSQB": "RSQB"}
"""Token type of an opening bracket -> that of its partner."""
CLOSING_BRACKETS = {closer: opener for opener, closer in OPENING_BRACKETS.items()}

OPERAND_ENDS = {"NAME", "NUMBER", "TEXT", "REGEX", "TRUE", "FALSE", "NONE", "RPAR", "RSQB"}
"""Types of the tokens that an operand may end with."""
OPERAND_STARTS = {"NAME", "NUMBER", "TEXT", "REGEX", "TRUE", "FALSE", "NONE", "LPAR", "LSQB", "NOT"}
"""Types of the tokens that an operand may start with."""

LOOKALIKES = {
    "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "’": '"', "‘": '"', "`": '"',
    "–": "-", "—": "-", "−": "-", "×": "*", "·": "*", "÷": "/", "，": ",", "：": ":", "＝": "=",
}  # fmt: skip
"""Typographic characters, as word processors insert them -> the language's own."""


class Lexeme:
    """A token as lark reads it: its type (a terminal of the grammar), place, lines (from 0) and
    meaning.

    `meaning` is the `Quantity` of a NUMBER (None if its unit is unknown), the text of a TEXT, the
    pattern of a REGEX. A plain class: there are many, and lark asks for no more than a `type`.
    """

    __slots__ = ("last_line", "line", "meaning", "span", "type")

    def __init__(
        self,
        type: str,
        span: Span,
        line: int,
        last_line: int | None = None,
        meaning: Quantity | str | None = None,
    ) -> None:
        self.type, self.span, self.line, self.meaning = type, span, line, meaning
        self.last_line = line if last_line is None else last_line

    @property
    def text(self) -> str:
        """Return the characters of the token; empty for one that stands for a line end."""
        return self.span.text

    def retyped(self, type: str) -> Lexeme:
        """Return the same token as another terminal of the grammar."""
        return Lexeme(type, self.span, self.line, self.last_line, self.meaning)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment with its `#`, and whether it has its line to itself."""

    text: str
    span: Span
    alone: bool
