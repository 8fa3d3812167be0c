"""The canonical layout of a spec. No options; comments stay, and so does the meaning.

A block stays on one line if it was written so and fits; otherwise it takes a line for each
attribute, with the `=` of neighbours aligned. A call or list that does not fit, that was broken
after its opening bracket, or that holds a comment takes a line for each item and ends in a comma.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.parsing.file_parser import parse
from tunelang.dsl.parsing.lexer import lex
from tunelang.dsl.syntax import nodes, units
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.tokens import Comment

WIDTH = 100
INDENT = "  "


def format_source(source: Source) -> tuple[str | None, list[Diagnostic]]:
    """The text of a spec in canonical form; None with the diagnostics where its form is wrong."""
    tree, diagnostics = parse(source)
    if diagnostics:
        return None, diagnostics
    text = _Printer(tree).file()
    if _words(text) != _words(source.text):
        raise AssertionError("formatting would change what the spec says: please report this")
    return text, []


def _words(text: str) -> tuple[list[str], list[str]]:
    """Return the content of a text: its tokens without commas, and its comments in any order."""
    lexed = lex(Source("", text))
    tokens = [units.tidy(t.text) if t.type == "NUMBER" else t.text for t in lexed.tokens]
    return [t for t in tokens if t != ","], sorted(tidy(c.text) for c in lexed.comments)


@dataclass
class _Entry:
    """One line-to-be of a block or a broken bracket: comments above it, the text, a comment behind
    it.
    """

    above: list[str]
    name: str
    value: str
    behind: str
    gap: bool
    """Whether an empty line stands above it."""


class _Printer:
    def __init__(self, tree: nodes.File) -> None:
        self.tree = tree
        self.source: Source = tree.source
        self.comments = list(tree.comments)
        self.starts = [comment.span.start for comment in self.comments]

    # Comments.

    def between(self, start: int, end: int) -> list[Comment]:
        """The comments that start in `[start, end)`."""
        return self.comments[bisect_left(self.starts, start) : bisect_left(self.starts, end)]

    def line(self, offset: int) -> int:
        """The line of an offset."""
        return self.source.position(offset)[0]

    def gap_before(self, offset: int, floor: int) -> bool:
        """Whether an empty line stands right above an offset, after `floor`."""
        before = self.source.text[floor:offset]
        return re.search(r"\n[ \t\r]*\n[ \t\r]*$", before) is not None

    # The file.

    def file(self) -> str:
        """The whole file."""
        out: list[str] = []
        at = 0
        items = self.tree.items
        texts = self.item_texts()
        for index, item in enumerate(items):
            above = self.between(at, item.span.start)
            first = above[0].span.start if above else item.span.start
            text = texts[index]
            stop = items[index + 1].span.start if index + 1 < len(items) else len(self.source.text)
            behind = [c for c in self.between(item.span.end, stop) if not c.alone]
            behind = [c for c in behind if self.line(c.span.start) == self.line(item.span.end)]
            previous = items[index - 1] if index else None
            if out and (
                self.gap_before(first, at) or not self.may_touch(previous, item, out[-1], text)
            ):
                out.append("")
            out += self.comment_lines(above, at, item.span.start)
            out.append(text + (f"  {tidy(behind[0].text)}" if behind else ""))
            at = behind[0].span.end if behind else item.span.end
        rest = self.between(at, len(self.source.text) + 1)
        if rest:
            if out and (self.gap_before(rest[0].span.start, at) or not rest[0].alone):
                out.append("")
            out += self.comment_lines(rest, at, len(self.source.text))
            while out and not out[-1]:
                out.pop()
        return "\n".join(out) + "\n" if out else ""

    def item_texts(self) -> list[str]:
        """Each item, the names of neighbours of one noun and form padded to one width."""
        items = self.tree.items
        texts = [self.item(item) for item in items]
        start = 0
        while start < len(items):
            stop = start + 1
            while stop < len(items) and self.neighbours(
                items[stop - 1], items[stop], texts[stop - 1 : stop + 1]
            ):
                stop += 1
            run = [item for item in items[start:stop] if isinstance(item, nodes.Declaration)]
            width = max((len(item.name.text) for item in run), default=0)
            padded = [self.item(item, width) for item in run]
            if stop - start > 1 and all("\n" not in text and len(text) <= WIDTH for text in padded):
                texts[start:stop] = padded
            start = stop
        return texts

    def neighbours(self, first: nodes.Item, second: nodes.Item, texts: list[str]) -> bool:
        """Whether two items stand line under line and are declarations of one noun and form."""
        if not (isinstance(first, nodes.Declaration) and isinstance(second, nodes.Declaration)):
            return False
        alike = first.noun.text == second.noun.text and (first.kind is None) == (
            second.kind is None
        )
        alike = alike and first.type is None and second.type is None
        between = self.source.text[first.span.end : second.span.start]
        return alike and between.strip(" \t\r") == "\n" and not any("\n" in text for text in texts)

    def may_touch(
        self, previous: nodes.Item | None, item: nodes.Item, before: str, text: str
    ) -> bool:
        """Whether two items may stand without an empty line: both short, and alike."""
        if "\n" in before or "\n" in text or isinstance(item, nodes.Run):
            return False
        if isinstance(item, nodes.Import) or isinstance(previous, nodes.Import):
            return isinstance(item, nodes.Import) and isinstance(previous, nodes.Import)
        return True

    def comment_lines(self, comments: list[Comment], floor: int, end: int) -> list[str]:
        """Comments that have their lines to themselves, with the empty lines among and below
        them.
        """
        out: list[str] = []
        for comment in comments:
            if out and self.gap_before(comment.span.start, floor):
                out.append("")
            out.append(tidy(comment.text))
            floor = comment.span.end
        if out and self.gap_before(end, floor):
            out.append("")
        return out

    # Items.

    def item(self, item: nodes.Item, width: int = 0) -> str:
        """One item, its name padded to a width."""
        match item:
            case nodes.Run():
                return self.block("run", item.block)
            case nodes.Import():
                head = f"import {item.path.span.text}"
                head += f" as {item.prefix.text}" if item.prefix else ""
                if item.arguments:
                    opened = self.source.text.rindex("(", 0, item.arguments[0].span.start)
                    span = Span(self.source, opened, item.span.end)
                    head += " with " + self.bracket(
                        "(", list(item.arguments), ")", span, "", len(head) + 6
                    )
                return self.hoisted(item, head)
        head = f"{item.noun.text} {item.name.text:<{width}}"
        if item.block is not None and item.kind is not None:
            return self.block(f"{head} : {item.kind.text}", item.block)
        if item.type is not None:
            head += f" : {self.expression(item.type, '', 0)}"
        assert item.value is not None
        head += " = "
        return self.hoisted(item, head + self.expression(item.value, "", len(head)))

    def hoisted(self, item: nodes.Item, text: str) -> str:
        """Comments inside an item that stand in no bracket of their own go above it."""
        lost = self.lost(item.span, text)
        return "\n".join([*lost, text])

    def lost(self, span: Span, text: str) -> list[str]:
        """Comments inside a span that its text does not show."""
        inside = self.between(span.start, span.end)
        if not inside:
            return []
        shown = [line.strip() for line in text.split("\n")]
        lost = []
        for comment in inside:
            words = tidy(comment.text)
            index = next((i for i, line in enumerate(shown) if line.endswith(words)), None)
            if index is None:
                lost.append(words)
            else:
                shown[index] = shown[index].removesuffix(words)
        return lost

    def block(self, head: str, block: nodes.Block) -> str:
        inside = self.between(block.span.start, block.span.end)
        if not block.attributes and not inside:
            return f"{head} {{}}"
        one_line = "\n" not in block.span.text and not inside
        if one_line:
            parts = ", ".join(f"{a.name.text} = {self.flat(a.value)}" for a in block.attributes)
            line = f"{head} {{ {parts} }}"
            if len(line) <= WIDTH:
                return line
        entries: list[_Entry] = []
        at = block.span.start + 1
        for index, attribute in enumerate(block.attributes):
            following = block.attributes[index + 1] if index + 1 < len(block.attributes) else None
            end = following.span.start if following else block.span.end
            above = self.between(at, attribute.span.start)
            first = above[0].span.start if above else attribute.span.start
            behind = self.behind(attribute.span.end, end)
            gap = bool(entries) and self.gap_before(first, at)
            entries.append(
                _Entry([tidy(c.text) for c in above], attribute.name.text, "", behind, gap)
            )
            at = attribute.span.end
            if behind:
                at = self.between(attribute.span.end, end)[0].span.end
        rest = [tidy(c.text) for c in self.between(at, block.span.end)]
        self.align(entries)
        for entry, attribute in zip(entries, block.attributes, strict=True):
            column = len(INDENT) + len(entry.name) + 3
            entry.value = self.expression(attribute.value, INDENT, column)
            entry.above += self.lost(attribute.span, entry.value)
        lines = self.lines(entries, INDENT, " = ", "")
        lines += [INDENT + comment for comment in rest]
        return "\n".join([f"{head} {{", *lines, "}"])

    def align(self, entries: list[_Entry]) -> None:
        """Pad names to the longest of their neighbours: entries with no gap or comment between
        them.
        """
        run: list[_Entry] = []
        for entry in [*entries, None]:
            if entry is None or entry.gap or entry.above:
                width = max((len(e.name) for e in run), default=0)
                for e in run:
                    e.name = e.name.ljust(width)
                run = []
            if entry is not None:
                run.append(entry)

    def behind(self, start: int, end: int) -> str:
        """The comment on the line on which something ends."""
        for comment in self.between(start, end)[:1]:
            if self.line(comment.span.start) == self.line(start):
                return tidy(comment.text)
        return ""

    def lines(self, entries: list[_Entry], indent: str, equals: str, comma: str) -> list[str]:
        out: list[str] = []
        for entry in entries:
            if entry.gap:
                out.append("")
            out += [indent + comment for comment in entry.above]
            name = f"{entry.name}{equals}" if entry.name else ""
            behind = f"  {entry.behind}" if entry.behind else ""
            out.append(f"{indent}{name}{entry.value}{comma}{behind}")
        return out

    # Expressions.

    def expression(self, node: nodes.Expr, indent: str, column: int) -> str:
        """An expression that starts at a column; broken over lines where it must be."""
        flat = self.flat(node)
        breaks = self.must_break(node)
        if not breaks and (column + len(flat) <= WIDTH or "\n" in flat):
            return flat
        match node:
            case nodes.ListOf() if node.items:
                items: list[Any] = list(node.items)
                return self.bracket("[", items, "]", node.span, indent, column, force=True)
            case nodes.Group():
                return self.group(node, indent)
            case nodes.Chain():
                return self.chain(node, indent, column)
            case nodes.Operation() | nodes.Conditional() | nodes.Unary():
                return self.operands(node, indent, column)
        return flat

    def must_break(self, node: nodes.Expr) -> bool:
        """Whether a bracket inside was opened at a line's end, or holds a comment."""
        if "\n" not in node.span.text:
            return False
        return any(self.opened_at_end(span) for span in brackets(node))

    def opened_at_end(self, span: Span) -> bool:
        """Whether a bracket's first item stands on a line of its own."""
        text = span.text
        if self.between(span.start, span.end):
            return True
        return re.match(r"[(\[][ \t]*\r?\n", text) is not None and text[1:-1].strip() != ""

    def chain(self, node: nodes.Chain, indent: str, column: int) -> str:
        text = self.expression(node.head, indent, column)
        last = max(
            (i for i, link in enumerate(node.links) if isinstance(link, nodes.Call)), default=-1
        )
        for index, link in enumerate(node.links):
            if isinstance(link, nodes.Member):
                text += f".{link.name.text}"
                continue
            here = column + len(text) if "\n" not in text else len(text.rsplit("\n", 1)[1])
            wide = here + len(self.flat_call(link)) > WIDTH and index == last
            force = wide or any(self.opened_at_end(s) for s in [link.span, *inner_brackets(link)])
            text += self.bracket(
                "(", list(link.arguments), ")", link.span, indent, here, force=force
            )
        return text

    def group(self, node: nodes.Group, indent: str) -> str:
        inner = indent + INDENT
        above = [tidy(c.text) for c in self.own_comments(node.span, [node.inner])]
        body = self.expression(node.inner, inner, len(inner))
        return "\n".join(["(", *(inner + c for c in above), f"{inner}{body}", f"{indent})"])

    def operands(self, node: nodes.Expr, indent: str, column: int) -> str:
        """Operators stay on their line; the operands break by themselves."""
        match node:
            case nodes.Operation():
                text = self.expression(node.first, indent, column)
                for operator, operand in node.rest:
                    here = len(text.rsplit("\n", 1)[-1]) + (column if "\n" not in text else 0)
                    flat = self.flat(operand)
                    if here + len(operator) + 2 + len(flat) > WIDTH:
                        text += f" {operator}\n{indent}"
                        text += self.expression(operand, indent, len(indent))
                    else:
                        text += f" {operator} " + self.expression(
                            operand, indent, here + len(operator) + 2
                        )
                return text
            case nodes.Conditional():
                parts = [
                    self.expression(p, indent, column)
                    for p in (node.then, node.test, node.otherwise)
                ]
                return f"{parts[0]} if {parts[1]} else {parts[2]}"
            case nodes.Unary():
                gap = " " if node.operator == "not" else ""
                return node.operator + gap + self.expression(node.operand, indent, column + 1)
        raise AssertionError(node)

    def bracket(
        self, opening: str, items: list[Any], closing: str, span: Span, indent: str, column: int,
        force: bool = False,
    ) -> str:  # fmt: skip
        """A bracket with its items: on one line if it fits, else an item a line."""
        flat = opening + ", ".join(self.flat_item(item) for item in items) + closing
        comments = self.own_comments(span, [_value(item) for item in items])
        if not items and not comments:
            return opening + closing
        if not force and not comments and column + len(flat) <= WIDTH:
            return flat
        if not force and not comments and "\n" in flat:
            return flat
        inner = indent + INDENT
        entries: list[_Entry] = []
        at = span.start + 1
        for index, item in enumerate(items):
            end = items[index + 1].span.start if index + 1 < len(items) else span.end
            above = self.between(at, item.span.start)
            behind = self.behind(item.span.end, end)
            first = above[0].span.start if above else item.span.start
            gap = bool(entries) and self.gap_before(first, at)
            named = isinstance(item, nodes.Argument) and item.name is not None
            name = item.name.text if named else ""
            entries.append(_Entry([tidy(c.text) for c in above], name, "", behind, gap))
            at = item.span.end
            if behind:
                at = self.between(item.span.end, end)[0].span.end
        rest = [tidy(c.text) for c in self.between(at, span.end)]
        if all(entry.name for entry in entries):
            self.align(entries)
        for entry, item in zip(entries, items, strict=True):
            start = len(inner) + (len(entry.name) + 3 if entry.name else 0)
            entry.value = self.expression(_value(item), inner, start)
            entry.above += self.lost(item.span, entry.value)
        lines = self.lines(entries, inner, " = ", ",")
        lines += [inner + comment for comment in rest]
        return "\n".join([opening, *lines, f"{indent}{closing}"])

    def own_comments(self, span: Span, inner: list[nodes.Expr]) -> list[Comment]:
        """Comments inside a bracket but in none of its items."""
        return [
            comment
            for comment in self.between(span.start, span.end)
            if not any(i.span.start <= comment.span.start < i.span.end for i in inner)
        ]

    def flat_item(self, item: Any) -> str:
        if isinstance(item, nodes.Argument):
            value = self.flat(item.value)
            return f"{item.name.text} = {value}" if item.name else value
        return self.flat(item)

    def flat_call(self, call: nodes.Call) -> str:
        return "(" + ", ".join(self.flat_item(a) for a in call.arguments) + ")"

    def flat(self, node: nodes.Expr) -> str:
        """An expression on one line (long text keeps its lines)."""
        match node:
            case nodes.Name():
                return node.text
            case nodes.Number():
                return units.tidy(node.span.text)
            case nodes.ListOf():
                return "[" + ", ".join(self.flat(item) for item in node.items) + "]"
            case nodes.Group():
                return f"({self.flat(node.inner)})"
            case nodes.Chain():
                text = self.flat(node.head)
                for link in node.links:
                    text += (
                        f".{link.name.text}"
                        if isinstance(link, nodes.Member)
                        else self.flat_call(link)
                    )
                return text
            case nodes.Unary():
                gap = " " if node.operator == "not" else ""
                return f"{node.operator}{gap}{self.flat(node.operand)}"
            case nodes.Operation():
                rest = "".join(
                    f" {operator} {self.flat(operand)}" for operator, operand in node.rest
                )
                return self.flat(node.first) + rest
            case nodes.Conditional():
                parts = [self.flat(part) for part in (node.then, node.test, node.otherwise)]
                return f"{parts[0]} if {parts[1]} else {parts[2]}"
        return node.span.text


def _value(item: Any) -> nodes.Expr:
    value: nodes.Expr = item.value if isinstance(item, nodes.Argument) else item
    return value


def brackets(node: nodes.Expr) -> list[Span]:
    """The spans of all brackets inside an expression."""
    pairs: list[Span] = []
    for part in nodes.walk(node):
        if isinstance(part, nodes.ListOf | nodes.Group):
            pairs.append(part.span)
        elif isinstance(part, nodes.Chain):
            pairs += [link.span for link in part.links if isinstance(link, nodes.Call)]
    return pairs


def inner_brackets(call: nodes.Call) -> list[Span]:
    """The brackets inside a call's arguments."""
    return [span for argument in call.arguments for span in brackets(argument.value)]


def tidy(comment: str) -> str:
    """A comment with a space behind its `#` if words follow; other marks stay as they are."""
    body = comment.lstrip("#")
    marks = comment[: len(comment) - len(body)]
    words = body[:1].isalnum() or body[:1] in ("`", '"', "(", "[")
    return f"{marks} {body}".rstrip() if words else comment.rstrip()
