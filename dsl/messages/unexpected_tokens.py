"""The message for a token that does not fit: the likeliest cause, by what stands around it."""

from __future__ import annotations

import re

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit
from tunelang.dsl.messages.wording import error, quoted
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.tokens import KEYWORDS, OPERAND_ENDS, OPERAND_STARTS, Lexeme

_KEYWORDS = set(KEYWORDS.values())
_FORMS = "a declaration is `NOUN NAME : KIND { ... }` or `NOUN NAME = expression`"
_OPERATORS = {"PLUS", "MINUS", "STAR", "SLASH", "COMPARE", "AND", "OR", "NOT", "IF", "ELSE"}


def syntax_error(tokens: list[Lexeme], bad: object) -> Diagnostic:
    """Say that a token does not fit, by the likeliest cause."""
    index = next((i for i, token in enumerate(tokens) if token is bad), len(tokens))
    return _Misfit(tokens, index).diagnose()


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
        """Return the type of the token `back` places before the misfit."""
        return self.tokens[self.at - back].type if self.at >= back else ""

    def starts_attribute(self, back: int) -> bool:
        """Return whether the token `back` places before is in the place of an attribute's name."""
        return self.inside == "LBRACE" and self.type_at(back + 1) in ("SEP", "LBRACE")

    def diagnose(self) -> Diagnostic:
        """Return the first explanation that fits."""
        for explain in (
            self._top_level, self._colon, self._quoted_name, self._dangling,
            self._double_equals, self._nested_block, self._missing_value,
            self._keyword_as_name, self._open_expression,
            self._missing_equals, self._missing_comma, self._side_by_side, self._chained,
        ):  # fmt: skip
            diagnostic = explain()
            if diagnostic is not None:
                return diagnostic
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
                f"`{first.text} {self.tokens[1].text}` is not a complete declaration",
                first.span.to(self.tokens[1].span),
                help=_FORMS,
            )
        named = self._name_of_item()
        if named is not None:
            return named
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

    def _name_of_item(self) -> Diagnostic | None:
        """Explain a misfit at the name of a declaration, or between it and the kind or block."""
        first, types = self.tokens[0], [token.type for token in self.tokens]
        if first.text == "import" and self.kind == "NAME" and self.at == 1:
            return error("unexpected-token", "the path of an import must be in quotes", self.span)
        if self.at == 1 and self.kind == "TEXT":
            name = re.sub(r"\W", "_", self.span.text.strip("\"'"))
            return error(
                "unexpected-token",
                "names are written without quotes",
                self.span,
                fix=Edit(self.span, name) if name.isidentifier() else (),
            )
        if self.at == 1 and self.kind == "NUMBER":
            return error("unexpected-token", "a name starts with a letter", self.span)
        if self.at == 2 and self.kind in ("MINUS", "DOT") and types[1] == "NAME":
            return error(
                "unexpected-token",
                "a name is made of letters, digits and `_`",
                self.span,
                fix=Edit(self.span, "_"),
            )
        if (
            types[:4] == ["NAME", "NAME", "EQUALS", "NAME"]
            and self.kind == "LBRACE"
            and self.at == 4
        ):
            equals = self.tokens[2].span
            return error(
                "colon-for-equals", "a kind is written after `:`", equals, fix=Edit(equals, ":")
            )
        if types[:5] == ["NAME", "NAME", "COLON", "NAME", "EQUALS"] and self.at == 5:
            if self.kind == "LBRACE":
                equals = self.tokens[4].span
                return error(
                    "unexpected-token",
                    "there is no `=` before a block",
                    equals,
                    fix=Edit(equals, ""),
                )
        return None

    def _dangling(self) -> Diagnostic | None:
        """Explain `a +` at the end of a line, which joins the name and `=` of the next line."""
        if self.kind not in ("EQUALS", "COLON") or self.at < 2:
            return None
        operator, name = self.tokens[self.at - 2], self.tokens[self.at - 1]
        if operator.type in _OPERATORS and operator.last_line != name.line:
            return error(
                "unexpected-token",
                f"nothing to the right of `{operator.text}`",
                operator.span,
                "a value must follow",
            )
        return None

    def _colon(self) -> Diagnostic | None:
        if self.kind == "COLON" and self.type_at(1) == "NAME" and self.inside in ("LBRACE", "LPAR"):
            follows = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
            span = self.span
            if follows is not None and follows.type == "EQUALS":  # `:=`
                span = span.to(follows.span)
            spaced = " =" if self.before.span.end == self.span.start else "="
            return error(
                "colon-for-equals",
                f"`{self.before.text}` is set with `=`",
                span,
                "a colon is written between a name and its kind",
                fix=Edit(span, spaced),
            )
        return None

    def _quoted_name(self) -> Diagnostic | None:
        follows = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
        if self.kind != "TEXT" or not self.starts_attribute(0) or follows is None:
            return None
        if follows.type not in ("COLON", "EQUALS"):
            return None
        span = self.span.to(follows.span)
        name = self.span.text.strip("\"'")
        return error(
            "colon-for-equals",
            "an attribute is a name without quotes, set with `=`",
            span,
            fix=Edit(span, f"{name} ="),
        )

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
                f"`{self.span.text}` is a keyword",
                self.span,
                "it cannot be a name",
            )
        return None

    def _open_expression(self) -> Diagnostic | None:
        if self.type_at(1) in _OPERATORS and self.kind not in OPERAND_STARTS:
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
                help="an expression continues on the next line inside `( )`, or after an operator",
            )
        return None

    def _missing_equals(self) -> Diagnostic | None:
        if self.type_at(1) == "NAME" and self.starts_attribute(1):
            if self.kind == "DOT":
                return error(
                    "unexpected-token",
                    f"settings of `{self.before.text}` are arguments of its call",
                    self.span,
                    help=f"write `{self.before.text} = NAME(... = ...)`",
                )
            if self.kind in ("SEP", "RBRACE", "$END"):
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
                fix=Edit(between, " = ") if self.kind in OPERAND_STARTS else (),
            )
        return None

    def _side_by_side(self) -> Diagnostic | None:
        if not self.inside and self.at > 2 and self.kind in OPERAND_STARTS - {"LPAR", "LSQB"}:
            if self.type_at(1) in OPERAND_ENDS:
                return error(
                    "unexpected-token",
                    "two values without an operator between them",
                    self.span,
                    "an operator or a line end is missing before this",
                )
        return None

    def _missing_comma(self) -> Diagnostic | None:
        if self.kind not in OPERAND_STARTS or self.type_at(1) not in OPERAND_ENDS:
            return None
        touching = self.before.span.end == self.span.start
        if self.before.type == "REGEX" or (
            self.before.type == "NAME" and self.type_at(2) == "REGEX"
        ):
            return error(
                "unexpected-token",
                "a regular expression ends at its first `/`",
                self.before.span,
                help=r"a slash inside is written `\/`; flags stand inside too: `(?i)`",
            )
        quote_inside = self.before.type == "TEXT" and self.kind in ("NAME", "TEXT")
        if touching and (quote_inside or (self.kind == "TEXT" and self.before.type == "NAME")):
            prefix = self.before.type == "NAME"
            return error(
                "unexpected-token",
                f"text has no prefix `{self.before.text}`" if prefix else "this text ended before",
                self.before.span,
                help="every text may be a template" if prefix else r"a quote inside text is `\"`",
                fix=Edit(self.before.span, "") if prefix else (),
            )
        if self.kind == "NAME" and self.inside != "LSQB" and self.before.type in ("NAME", "RPAR"):
            if self.before.line == self.span.source.position(self.span.start)[0]:
                return error(
                    "unexpected-token",
                    f"`{self.span.text}` does not fit here",
                    self.span,
                    "an operator or a comma is missing before this",
                    help="a unit stands right behind its number: `100 steps`",
                )
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
        if self.span.text == ">" and self.type_at(1) == "EQUALS":
            both = self.before.span.to(self.span)
            return error("unexpected-token", "values are set with `=`", both, fix=Edit(both, "="))
        if self.kind == "COMPARE":
            return error(
                "unexpected-token",
                "comparisons do not chain",
                self.span,
                help="compare two values at a time: `a < b and b < c`",
            )
        if self.kind == "LSQB" and self.type_at(1) in OPERAND_ENDS:
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
