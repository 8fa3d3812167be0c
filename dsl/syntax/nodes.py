"""The syntax tree: what stands in a file, before any name is looked up. All nodes are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.tokens import Comment
from tunelang.dsl.syntax.units import Quantity


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Name:
    """A bare word: a reference, a choice such as `cosine`, or a unit of the vocabulary."""

    text: str
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Number:
    """A number with its unit; `quantity` is None where the unit is unknown (reported already)."""

    quantity: Quantity | None
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Text:
    """Text, with escapes resolved and long text dedented."""

    value: str
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Regex:
    """A regular expression; `pattern` stands in Python's syntax, escaped slashes resolved."""

    pattern: str
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Constant:
    """`true`, `false` or `none`."""

    value: bool | None
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ListOf:
    """`[a, b]`."""

    items: tuple[Expr, ...]
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Group:
    """An expression in parentheses."""

    inner: Expr
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Argument:
    """One argument of a call; `name` is None for a positional one."""

    name: Name | None
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Member:
    """`.name` after something."""

    name: Name
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Call:
    """`(arguments)` after something."""

    arguments: tuple[Argument, ...]
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Chain:
    """An operand followed by members and calls: `gsm8k.split(test = 5%).train`, `adamw(lr =
    1e-5)`.
    """

    head: Expr
    links: tuple[Member | Call, ...]
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Unary:
    """`-x`, `+x` or `not x`."""

    operator: str
    operand: Expr
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Operation:
    """A flat run of operators of one precedence: `a + b - c`, `a and b and c`, `a < b`.

    `rest` pairs each operator with the operand to its right; evaluation goes from left to right.
    """

    first: Expr
    rest: tuple[tuple[str, Expr], ...]
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Conditional:
    """`then if test else otherwise`."""

    then: Expr
    test: Expr
    otherwise: Expr
    span: Span


Expr = (
    Name
    | Number
    | Text
    | Regex
    | Constant
    | ListOf
    | Group
    | Chain
    | Unary
    | Operation
    | Conditional
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Attribute:
    """`name = value` inside a block."""

    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Block:
    """`{ ... }`. `damaged` says that something in it was dropped after a syntax error."""

    attributes: tuple[Attribute, ...]
    span: Span
    damaged: bool = False


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Declaration:
    """`noun name : kind { ... }`, `noun name = value`, or `param name : type = value`."""

    noun: Name
    name: Name
    span: Span
    kind: Name | None = None
    block: Block | None = None
    type: Expr | None = None
    value: Expr | None = None
    doc: str = ""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Run:
    """The `run { ... }` block."""

    block: Block
    span: Span


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Import:
    """`import "path" as prefix with (param = value)`."""

    path: Text
    prefix: Name | None
    arguments: tuple[Argument, ...]
    span: Span


Item = Declaration | Run | Import


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class File:
    """One parsed source. `broken` holds names whose declarations could not be read."""

    source: Source
    items: tuple[Item, ...]
    comments: tuple[Comment, ...] = ()
    broken: frozenset[str] = field(default_factory=frozenset)


def children(node: Expr) -> Iterator[Expr]:
    """Return the expressions directly inside one, in the order of the text."""
    match node:
        case ListOf():
            yield from node.items
        case Group():
            yield node.inner
        case Chain():
            yield node.head
            for link in node.links:
                if isinstance(link, Call):
                    for argument in link.arguments:
                        yield argument.value
        case Unary():
            yield node.operand
        case Operation():
            yield node.first
            for _, operand in node.rest:
                yield operand
        case Conditional():
            yield from (node.then, node.test, node.otherwise)


def walk(node: Expr) -> Iterator[Expr]:
    """Yield an expression and everything inside it, in the order of the text, without recursion."""
    pending = [node]
    while pending:
        current = pending.pop()
        yield current
        pending.extend(reversed(list(children(current))))
