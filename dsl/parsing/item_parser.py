"""The lark parser for one item, and the callbacks that build `syntax` nodes as it reduces."""

from __future__ import annotations

import os
import sys
import zlib
from functools import cache
from importlib import resources
from typing import Any, NoReturn

import lark
from lark import Lark, Token, Transformer
from lark.lexer import Lexer

from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.tokens import Lexeme


class _NoLexer(Lexer):
    """Tokens are fed by hand."""

    def __init__(self, lexer_conf: object) -> None: ...

    def lex(self, *_: object) -> NoReturn:
        """Do nothing: lark never calls it."""
        raise AssertionError("tokens are fed by hand")


@cache
def item_parser() -> Lark:
    """Return the parser of one item, built once a process."""
    text = resources.files("tunelang.dsl.parsing").joinpath("grammar.lark").read_text("utf-8")
    return Lark(
        text,
        parser="lalr",
        lexer=_NoLexer,
        start="item",
        transformer=_Builder(),
        cache=_cache(text),
    )


def _cache(grammar: str) -> str | bool:
    """Return the file that keeps the tables of the parser between processes; None without a
    folder for it.

    Making the tables takes longer than checking a spec. Lark makes them again if the file is
    unusable.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(base, "tunelang")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    version = f"{lark.__version__}-{sys.version_info.major}.{sys.version_info.minor}"
    return os.path.join(folder, f"grammar-{version}-{zlib.crc32(grammar.encode()):08x}.lark")


def parse_item(tokens: list[Lexeme]) -> nodes.Item:
    """Return the tokens of one item as a node; raises lark's `UnexpectedToken` at the first
    that does not fit.
    """
    interactive = item_parser().parse_interactive()
    for token in tokens:
        interactive.feed_token(token)  # type: ignore[arg-type]
    end = Lexeme("$END", Span(tokens[-1].span.source, tokens[-1].span.end, tokens[-1].span.end), 0)
    item = interactive.feed_token(end)  # type: ignore[arg-type]
    assert isinstance(item, nodes.Item)
    return item


Children = list[Any]
"""The tokens and nodes of a rule's right-hand side, whose types the grammar determines."""


def _name(token: Lexeme) -> nodes.Name:
    return nodes.Name(token.text, token.span)


def _around(children: Children) -> Span:
    span: Span = children[0].span.to(children[-1].span)
    return span


class _Builder(Transformer[Token, Any]):
    """One method for each rule or alias of the grammar."""

    def kinded(self, c: Children) -> nodes.Declaration:
        """Convert `noun name : kind { ... }`."""
        return nodes.Declaration(_name(c[0]), _name(c[1]), _around(c), _name(c[3]), c[4])

    def bound(self, c: Children) -> nodes.Declaration:
        """Convert `noun name = value`."""
        return nodes.Declaration(_name(c[0]), _name(c[1]), _around(c), value=c[3])

    def typed(self, c: Children) -> nodes.Declaration:
        """Convert `param name : type = value`."""
        return nodes.Declaration(_name(c[0]), _name(c[1]), _around(c), type=c[3], value=c[5])

    def run(self, c: Children) -> nodes.Run:
        """Convert `run { ... }`."""
        return nodes.Run(c[1], _around(c))

    def import_(self, c: Children) -> nodes.Import:
        """Convert `import "path" as prefix with (...)`."""
        prefix = next(
            (c[i + 1] for i, t in enumerate(c) if isinstance(t, Lexeme) and t.type == "AS"), None
        )
        arguments = next((x for x in c if isinstance(x, tuple)), ())
        path = nodes.Text(c[1].meaning, c[1].span)
        return nodes.Import(path, prefix and _name(prefix), arguments, _around(c))

    def block(self, c: Children) -> nodes.Block:
        """Convert `{ ... }`."""
        return nodes.Block(tuple(x for x in c if isinstance(x, nodes.Attribute)), _around(c))

    def attribute(self, c: Children) -> nodes.Attribute:
        """Convert `name = value`."""
        return nodes.Attribute(_name(c[0]), c[2], _around(c))

    def name(self, c: Children) -> nodes.Name:
        """Convert a bare word."""
        return _name(c[0])

    def type_call(self, c: Children) -> nodes.Chain:
        """Convert `choice(a, b)` as a parameter's type."""
        call = nodes.Call(c[2], c[1].span.to(c[3].span))
        return nodes.Chain(_name(c[0]), (call,), _around(c))

    def number(self, c: Children) -> nodes.Number:
        """Convert a number with its unit."""
        return nodes.Number(c[0].meaning, c[0].span)

    def text(self, c: Children) -> nodes.Text:
        """Convert text."""
        return nodes.Text(c[0].meaning, c[0].span)

    def regex(self, c: Children) -> nodes.Regex:
        """Convert a regular expression."""
        return nodes.Regex(c[0].meaning, c[0].span)

    def constant(self, c: Children) -> nodes.Constant:
        """Convert `true`, `false` or `none`."""
        value = {"TRUE": True, "FALSE": False, "NONE": None}[c[0].type]
        return nodes.Constant(value, c[0].span)

    def list_of(self, c: Children) -> nodes.ListOf:
        """Convert `[a, b]`."""
        items = tuple(x for x in c if not isinstance(x, Lexeme))
        return nodes.ListOf(items, _around(c))

    def group(self, c: Children) -> nodes.Group:
        """Convert `(a)`."""
        return nodes.Group(c[1], _around(c))

    def member(self, c: Children) -> nodes.Member:
        """Convert `.name`."""
        return nodes.Member(_name(c[1]), _around(c))

    def call(self, c: Children) -> nodes.Call:
        """Convert `(arguments)`."""
        return nodes.Call(c[1], _around([c[0], c[2]]))

    def arguments(self, c: Children) -> tuple[nodes.Argument, ...]:
        """Convert the arguments of a call."""
        return tuple(x for x in c if isinstance(x, nodes.Argument))

    def named(self, c: Children) -> nodes.Argument:
        """Convert `name = value` in a call."""
        return nodes.Argument(_name(c[0]), c[2], _around(c))

    def positional(self, c: Children) -> nodes.Argument:
        """Convert a value in a call."""
        return nodes.Argument(None, c[0], c[0].span)

    def chain(self, c: Children) -> nodes.Chain:
        """Convert members and calls after an operand."""
        return nodes.Chain(c[0], tuple(c[1:]), _around(c))

    def unary(self, c: Children) -> nodes.Unary:
        """Convert `-x` or `not x`."""
        return nodes.Unary(c[0].text, c[1], _around(c))

    def _operation(self, c: Children) -> nodes.Operation:
        rest = tuple((c[i].text, c[i + 1]) for i in range(1, len(c), 2))
        return nodes.Operation(c[0], rest, _around(c))

    logic = compare = arithmetic = _operation

    def conditional(self, c: Children) -> nodes.Conditional:
        """Convert `a if c else b`."""
        return nodes.Conditional(c[0], c[2], c[4], _around(c))
