"""The canonical layout of a spec. No options; comments stay, and so does the meaning.

A block stays on one line if it was written so and fits; otherwise it takes a line for each
attribute, with the `=` of neighbours aligned. A call or list that does not fit, that was broken
after its opening bracket, or that holds a comment takes a line for each item and ends in a comma.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.parsing.file_parser import parse
from tunelang.dsl.parsing.lexer import lex
from tunelang.dsl.parsing.one_line import (
    Item,
    brackets,
    inline,
    inline_call,
    inline_item,
    inner_brackets,
    value_of,
)
from tunelang.dsl.syntax import nodes, units
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.tokens import Comment

WIDTH = 100
INDENT = "  "


def format_source(source: Source) -> tuple[str | None, list[Diagnostic]]:
    """Return the text of a spec in canonical form, or None with the errors of its syntax."""
    tree, diagnostics = parse(source)
    if diagnostics:
        return None, diagnostics
    text = _Printer(tree).file()
    if _content(text) != _content(source.text):
        raise AssertionError("formatting would change what the spec says: please report this")
    return text, []


def _content(text: str) -> tuple[list[str], list[str]]:
    """Return the content of a text: its tokens without commas, and its comments in any order."""
    lexed = lex(Source("", text))
    tokens = [units.tidy(t.text) if t.type == "NUMBER" else t.text for t in lexed.tokens]
    return [t for t in tokens if t != ","], sorted(tidy(c.text) for c in lexed.comments)


@dataclass
class _Entry:
    """A line of a block or of a broken bracket, with its comments."""

    comments_above: list[str]
    name: str
    value: str
    comment_behind: str
    gap: bool
    """Whether an empty line precedes it."""


class _Printer:
    """Prints the syntax tree of a file."""

    def __init__(self, tree: nodes.File) -> None:
        self.tree = tree
        self.source: Source = tree.source
        self.comments = list(tree.comments)
        self.starts = [comment.span.start for comment in self.comments]

    # Comments.

    def between(self, start: int, end: int) -> list[Comment]:
        """Return the comments that start in `[start, end)`."""
        return self.comments[bisect_left(self.starts, start) : bisect_left(self.starts, end)]

    def line(self, offset: int) -> int:
        """Return the line of an offset."""
        return self.source.position(offset)[0]

    def gap_before(self, offset: int, floor: int) -> bool:
        """Return whether an empty line directly precedes an offset, after `floor`."""
        before = self.source.text[floor:offset]
        return re.search(r"\n[ \t\r]*\n[ \t\r]*$", before) is not None

    # The file.

    def file(self) -> str:
        """Return the text of the file."""
        out: list[str] = []
        position = 0
        items = self.tree.items
        texts = self.item_texts()
        for index, item in enumerate(items):
            above = self.between(position, item.span.start)
            first = above[0].span.start if above else item.span.start
            text = texts[index]
            stop = items[index + 1].span.start if index + 1 < len(items) else len(self.source.text)
            behind = [c for c in self.between(item.span.end, stop) if not c.alone]
            behind = [c for c in behind if self.line(c.span.start) == self.line(item.span.end)]
            previous = items[index - 1] if index else None
            if out and (
                self.gap_before(first, position)
                or not self.may_touch(previous, item, out[-1], text)
            ):
                out.append("")
            out += self.comment_lines(above, position, item.span.start)
            out.append(text + (f"  {tidy(behind[0].text)}" if behind else ""))
            position = behind[0].span.end if behind else item.span.end
        remaining = self.between(position, len(self.source.text) + 1)
        if remaining:
            if out and (
                self.gap_before(remaining[0].span.start, position) or not remaining[0].alone
            ):
                out.append("")
            out += self.comment_lines(remaining, position, len(self.source.text))
            while out and not out[-1]:
                out.pop()
        return "\n".join(out) + "\n" if out else ""

    def item_texts(self) -> list[str]:
        """Return the text of each item; names of neighbours of one noun and form are aligned."""
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
        """Return whether two items are declarations of one noun and form on consecutive lines."""
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
        """Return whether two items need no empty line between them: both short, and alike."""
        if "\n" in before or "\n" in text or isinstance(item, nodes.Run):
            return False
        if isinstance(item, nodes.Import) or isinstance(previous, nodes.Import):
            return isinstance(item, nodes.Import) and isinstance(previous, nodes.Import)
        return True

    def comment_lines(self, comments: list[Comment], floor: int, end: int) -> list[str]:
        """Return comments on lines of their own, with the empty lines between and below them."""
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
        """Return the text of an item, its name padded to a width."""
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
                        "(", item.arguments, ")", span, "", len(head) + 6
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
        """Put above an item the comments inside it that its text does not show."""
        return "\n".join([*self.hidden_comments(item.span, text), text])

    def hidden_comments(self, span: Span, text: str) -> list[str]:
        """Return the comments inside a span that its text does not show."""
        inside = self.between(span.start, span.end)
        if not inside:
            return []
        shown = [line.strip() for line in text.split("\n")]
        hidden = []
        for comment in inside:
            words = tidy(comment.text)
            index = next((i for i, line in enumerate(shown) if line.endswith(words)), None)
            if index is None:
                hidden.append(words)
            else:
                shown[index] = shown[index].removesuffix(words)
        return hidden

    def block(self, head: str, block: nodes.Block) -> str:
        """Return a block: on one line if it was written so and fits, or a line an attribute."""
        inside = self.between(block.span.start, block.span.end)
        if not block.attributes and not inside:
            return f"{head} {{}}"
        one_line = "\n" not in block.span.text and not inside
        if one_line:
            parts = ", ".join(f"{a.name.text} = {inline(a.value)}" for a in block.attributes)
            line = f"{head} {{ {parts} }}"
            if len(line) <= WIDTH:
                return line
        entries: list[_Entry] = []
        position = block.span.start + 1
        for index, attribute in enumerate(block.attributes):
            following = block.attributes[index + 1] if index + 1 < len(block.attributes) else None
            end = following.span.start if following else block.span.end
            above = self.between(position, attribute.span.start)
            first = above[0].span.start if above else attribute.span.start
            behind = self.comment_behind(attribute.span.end, end)
            gap = bool(entries) and self.gap_before(first, position)
            entries.append(
                _Entry([tidy(c.text) for c in above], attribute.name.text, "", behind, gap)
            )
            position = attribute.span.end
            if behind:
                position = self.between(attribute.span.end, end)[0].span.end
        remaining = [tidy(c.text) for c in self.between(position, block.span.end)]
        self.align(entries)
        for entry, attribute in zip(entries, block.attributes, strict=True):
            column = len(INDENT) + len(entry.name) + 3
            entry.value = self.expression(attribute.value, INDENT, column)
            entry.comments_above += self.hidden_comments(attribute.span, entry.value)
        lines = self.lines(entries, INDENT, " = ", "")
        lines += [INDENT + comment for comment in remaining]
        return "\n".join([f"{head} {{", *lines, "}"])

    def align(self, entries: list[_Entry]) -> None:
        """Pad names to the longest among neighbours without a gap or comment between them."""
        run: list[_Entry] = []
        for entry in [*entries, None]:
            if entry is None or entry.gap or entry.comments_above:
                width = max((len(e.name) for e in run), default=0)
                for e in run:
                    e.name = e.name.ljust(width)
                run = []
            if entry is not None:
                run.append(entry)

    def comment_behind(self, start: int, end: int) -> str:
        """Return the comment between two offsets that is on the line of the first."""
        for comment in self.between(start, end)[:1]:
            if self.line(comment.span.start) == self.line(start):
                return tidy(comment.text)
        return ""

    def lines(self, entries: list[_Entry], indent: str, equals: str, comma: str) -> list[str]:
        """Return the lines of entries, with their gaps and comments."""
        out: list[str] = []
        for entry in entries:
            if entry.gap:
                out.append("")
            out += [indent + comment for comment in entry.comments_above]
            name = f"{entry.name}{equals}" if entry.name else ""
            behind = f"  {entry.comment_behind}" if entry.comment_behind else ""
            out.append(f"{indent}{name}{entry.value}{comma}{behind}")
        return out

    # Expressions.

    def expression(self, node: nodes.Expr, indent: str, column: int) -> str:
        """Return an expression that starts at a column; broken over lines if it must be."""
        flat = inline(node)
        breaks = self.must_break(node)
        if not breaks and (column + len(flat) <= WIDTH or "\n" in flat):
            return flat
        match node:
            case nodes.ListOf() if node.items:
                return self.bracket("[", node.items, "]", node.span, indent, column, force=True)
            case nodes.Group():
                return self.group(node, indent)
            case nodes.Chain():
                return self.chain(node, indent, column)
            case nodes.Operation() | nodes.Conditional() | nodes.Unary():
                return self.operands(node, indent, column)
        return flat

    def must_break(self, node: nodes.Expr) -> bool:
        """Return whether a bracket inside was opened at the end of a line, or holds a comment."""
        if "\n" not in node.span.text:
            return False
        return any(self.opened_at_end(span) for span in brackets(node))

    def opened_at_end(self, span: Span) -> bool:
        """Return whether the first item of a bracket, or a comment in it, is on the next line."""
        text = span.text
        if self.between(span.start, span.end):
            return True
        return re.match(r"[(\[][ \t]*\r?\n", text) is not None and text[1:-1].strip() != ""

    def chain(self, node: nodes.Chain, indent: str, column: int) -> str:
        """Return a chain of calls and members; only the last call breaks because it is long."""
        text = self.expression(node.head, indent, column)
        last = max(
            (i for i, link in enumerate(node.links) if isinstance(link, nodes.Call)), default=-1
        )
        for index, link in enumerate(node.links):
            if isinstance(link, nodes.Member):
                text += f".{link.name.text}"
                continue
            here = column + len(text) if "\n" not in text else len(text.rsplit("\n", 1)[1])
            wide = here + len(inline_call(link)) > WIDTH and index == last
            force = wide or any(self.opened_at_end(s) for s in [link.span, *inner_brackets(link)])
            text += self.bracket("(", link.arguments, ")", link.span, indent, here, force=force)
        return text

    def group(self, node: nodes.Group, indent: str) -> str:
        """Return a parenthesised expression on lines of its own."""
        inner = indent + INDENT
        above = [tidy(c.text) for c in self.comments_between_items(node.span, [node.inner])]
        body = self.expression(node.inner, inner, len(inner))
        return "\n".join(["(", *(inner + c for c in above), f"{inner}{body}", f"{indent})"])

    def operands(self, node: nodes.Expr, indent: str, column: int) -> str:
        """Return operands that break over lines; their operators stay on the line before."""
        match node:
            case nodes.Operation():
                text = self.expression(node.first, indent, column)
                for operator, operand in node.rest:
                    here = len(text.rsplit("\n", 1)[-1]) + (column if "\n" not in text else 0)
                    flat = inline(operand)
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
        self,
        opening: str,
        items: Sequence[Item],
        closing: str,
        span: Span,
        indent: str,
        column: int,
        force: bool = False,
    ) -> str:
        """Return a bracket with its items: on one line if it fits, otherwise an item a line."""
        flat = opening + ", ".join(inline_item(item) for item in items) + closing
        comments = self.comments_between_items(span, [value_of(item) for item in items])
        if not items and not comments:
            return opening + closing
        if not force and not comments and column + len(flat) <= WIDTH:
            return flat
        if not force and not comments and "\n" in flat:
            return flat
        inner = indent + INDENT
        entries: list[_Entry] = []
        position = span.start + 1
        for index, item in enumerate(items):
            end = items[index + 1].span.start if index + 1 < len(items) else span.end
            above = self.between(position, item.span.start)
            behind = self.comment_behind(item.span.end, end)
            first = above[0].span.start if above else item.span.start
            gap = bool(entries) and self.gap_before(first, position)
            name = item.name.text if isinstance(item, nodes.Argument) and item.name else ""
            entries.append(_Entry([tidy(c.text) for c in above], name, "", behind, gap))
            position = item.span.end
            if behind:
                position = self.between(item.span.end, end)[0].span.end
        remaining = [tidy(c.text) for c in self.between(position, span.end)]
        if all(entry.name for entry in entries):
            self.align(entries)
        for entry, item in zip(entries, items, strict=True):
            start = len(inner) + (len(entry.name) + 3 if entry.name else 0)
            entry.value = self.expression(value_of(item), inner, start)
            entry.comments_above += self.hidden_comments(item.span, entry.value)
        lines = self.lines(entries, inner, " = ", ",")
        lines += [inner + comment for comment in remaining]
        return "\n".join([opening, *lines, f"{indent}{closing}"])

    def comments_between_items(self, span: Span, inner: list[nodes.Expr]) -> list[Comment]:
        """Return the comments inside a bracket that are in none of its items."""
        return [
            comment
            for comment in self.between(span.start, span.end)
            if not any(i.span.start <= comment.span.start < i.span.end for i in inner)
        ]


def tidy(comment: str) -> str:
    """Return a comment with a space after its `#` if words follow; other marks do not change."""
    body = comment.lstrip("#")
    marks = comment[: len(comment) - len(body)]
    words = body[:1].isalnum() or body[:1] in ("`", '"', "(", "[")
    return f"{marks} {body}".rstrip() if words else comment.rstrip()
