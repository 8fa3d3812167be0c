"""Diagnostics as text in the manner of rustc, and as data for editors."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Label
from tunelang.dsl.syntax.source import Source, Span

WIDTH = 100
_STYLES = {
    "error": "1;31",
    "warning": "1;33",
    "help": "1;36",
    "bar": "1;34",
    "title": "1",
    "-": "31",
    "+": "32",
}


def text(diagnostics: Iterable[Diagnostic], color: bool = False) -> str:
    """Render all diagnostics, with an empty line after each."""
    return "".join(f"{_Frame(d, color).render()}\n" for d in diagnostics)


def summary(errors: int, warnings: int) -> str:
    """Count diagnostics in words: `2 errors, 1 warning`."""
    parts = [
        f"{n} {word}{'' if n == 1 else 's'}"
        for n, word in ((errors, "error"), (warnings, "warning"))
        if n
    ]
    return ", ".join(parts)


def json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, object]]:
    """Return diagnostics in the shape of the Language Server Protocol, with the file and the
    fix.
    """
    out: list[dict[str, object]] = []
    for d in diagnostics:
        message = "\n".join([d.title, *d.notes, *([d.help] if d.help else [])])
        related = [
            {"location": {"uri": s.span.source.name, "range": lsp_range(s.span)}, "message": s.text}
            for s in d.seconds
        ]
        edits = [
            {"file": e.span.source.name, "range": lsp_range(e.span), "newText": e.text}
            for e in d.fix
        ]
        out.append(
            {
                "file": d.where.span.source.name,
                "range": lsp_range(d.where.span),
                "severity": 1 if d.severity == "error" else 2,
                "code": d.code,
                "source": "tune",
                "message": message,
                "label": d.where.text,
                "relatedInformation": related,
                "fix": edits,
            }
        )
    return out


def lsp_range(span: Span) -> dict[str, object]:
    """Return a span as lines and UTF-16 columns, both from 0."""
    return {
        "start": _lsp_position(span.source, span.start),
        "end": _lsp_position(span.source, span.end),
    }


def _lsp_position(source: Source, offset: int) -> dict[str, int]:
    line, column = source.position(offset)
    before = source.text[offset - column : offset]
    return {"line": line, "character": len(before.encode("utf-16-le")) // 2}


class _Frame:
    """One diagnostic being drawn."""

    def __init__(self, diagnostic: Diagnostic, color: bool) -> None:
        self.d, self.color = diagnostic, color
        places = [diagnostic.where, *diagnostic.seconds]
        lines = [p.span.source.position(p.span.start)[0] + 1 for p in places if p.span.source.text]
        lines += [e.span.source.position(e.span.end)[0] + 1 for e in diagnostic.fix]
        self.gutter = max((len(str(line)) for line in lines), default=1)

    def paint(self, style: str, content: str) -> str:
        """Colour a text if the output shows colours."""
        return f"\x1b[{_STYLES[style]}m{content}\x1b[0m" if self.color and content else content

    def bar(self, mark: str = "|") -> str:
        """Return the empty gutter."""
        return f"{' ' * self.gutter} {self.paint('bar', mark)}"

    def render(self) -> str:
        """Return the whole frame."""
        d = self.d
        head = self.paint(d.severity, f"{d.severity}[{d.code}]")
        out = [f"{head}{self.paint('title', f': {_clean(d.title)}')}"]
        sources: dict[Source, list[tuple[Label, bool]]] = {}
        sources.setdefault(d.where.span.source, []).append((d.where, True))
        for second in d.seconds:
            sources.setdefault(second.span.source, []).append((second, False))
        for at, (source, labels) in enumerate(sources.items()):
            if not source.text:
                continue
            arrow = "-->" if at == 0 else ":::"
            out.append(f"{' ' * self.gutter}{self.paint('bar', arrow)} {_place(labels[0][0].span)}")
            out.append(self.bar())
            out += self._lines(source, labels)
        tail = [*(f"note: {note}" for note in d.notes)]
        if d.help:
            tail.append(f"help: {d.help}")
        if tail:
            out.append(self.bar())
            for entry in tail:
                out += self._note(entry)
        out += self._fix()
        return "\n".join(out) + "\n"

    def _note(self, entry: str) -> list[str]:
        word, _, rest = _clean(entry).partition(": ")
        indent = " " * (self.gutter + 3 + len(word) + 2)
        lines = textwrap.wrap(
            rest, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
        ) or [""]
        first = f"{self.bar('=')} {self.paint('help', word + ':')} {lines[0]}"
        return [first, *(f"{indent}{line}" for line in lines[1:])]

    def _lines(self, source: Source, labels: list[tuple[Label, bool]]) -> list[str]:
        """Return the source lines of the labels in order of the text, marked `^` (the place)
        or `-` (others).
        """
        by_line: dict[int, list[tuple[Label, bool]]] = {}
        for label, main in labels:
            by_line.setdefault(source.position(label.span.start)[0], []).append((label, main))
        out: list[str] = []
        previous: int | None = None
        for line in sorted(by_line):
            if previous is not None and line > previous + 2:
                out.append(self.paint("bar", "..."))
            elif previous is not None and line == previous + 2:
                out += [self._source_line(source, previous + 1, 0)[0]]
            out += self._marked(source, line, by_line[line])
            previous = line
        return out

    def _source_line(self, source: Source, line: int, focus: int) -> tuple[str, int]:
        """Return a line with its number, cut to a window round `focus`, and the start of the
        window.
        """
        raw = source.line(line)
        room = WIDTH - self.gutter - 3
        start = 0
        if len(raw) > room:
            start = max(0, min(focus - room // 3, len(raw) - room + 2))
        shown = raw[start : start + room - 2 * (len(raw) > room)]
        body = "".join(_visible(c) for c in shown)
        body = f"{'…' if start else ''}{body}{'…' if start + len(shown) < len(raw) else ''}"
        number = self.paint("bar", f"{line + 1:>{self.gutter}} |")
        return f"{number} {body}".rstrip(), start

    def _marked(self, source: Source, line: int, labels: list[tuple[Label, bool]]) -> list[str]:
        labels = sorted(labels, key=lambda pair: pair[0].span.start)
        focus = source.position(next((lb for lb, main in labels if main), labels[0][0]).span.start)[
            1
        ]
        shown, start = self._source_line(source, line, focus)
        out = [shown]
        raw = source.line(line)
        for label, main in reversed(labels):
            column = source.position(label.span.start)[1]
            length = max(
                1, min(label.span.end, label.span.start + len(raw) - column) - label.span.start
            )
            before = raw[start:column] if column >= start else ""
            width = sum(_columns(c) for c in raw[column : column + length]) or 1
            indent = sum(_columns(c) for c in before) + (1 if start else 0)
            width = max(1, min(width, WIDTH - self.gutter - 3 - indent))
            style = self.d.severity if main else "bar"
            marks = self.paint(style, ("^" if main else "-") * width)
            words = self.paint(style, _clean(label.text))
            if label.text and indent + width + 1 + len(label.text) + self.gutter + 3 > WIDTH:
                out.append(f"{self.bar()} {' ' * indent}{marks}")
                wrapped = max(0, min(indent, WIDTH - self.gutter - 3 - len(label.text)))
                out.append(f"{self.bar()} {' ' * wrapped}{words}")
            else:
                out.append(f"{self.bar()} {' ' * indent}{marks} {words}".rstrip())
        return out

    def _fix(self) -> list[str]:
        """Return the edits as a diff of whole lines; nothing where a line is too long to read."""
        out: list[str] = []
        for edit in self.d.fix:
            source = edit.span.source
            first, column = source.position(edit.span.start)
            last, end = source.position(edit.span.end)
            if source.kind == "override":
                continue
            old = [source.line(n) for n in range(first, last + 1)]
            new = (old[0][:column] + edit.text + old[-1][end:]).split("\n")
            if any(len(line) > WIDTH - self.gutter - 3 for line in [*old, *new]) or len(old) > 6:
                continue
            if not out:
                out.append(self.bar())
            for mark, lines in (("-", old), ("+", new)):
                for at, line in enumerate(lines):
                    if mark == "+" and not line.strip() and len(lines) == 1:
                        continue
                    shown = "".join(_visible(c) for c in line)
                    number = f"{first + at + 1:>{self.gutter}}"
                    out.append(
                        f"{self.paint('bar', number)}"
                        f" {self.paint(mark, f'{mark} {shown}'.rstrip())}"
                    )
        return out


def _place(span: Span) -> str:
    line, column = span.source.position(span.start)
    if span.source.kind == "override":
        return f"{span.source.name.split()[0]} on the command line"
    return f"{span.source.name}:{line + 1}:{column + 1}"


def _clean(text: str) -> str:
    """Make a message, which may quote the user's text, safe for a terminal."""
    return "".join(_visible(c) for c in text)


def _visible(character: str) -> str:
    """Make a character safe for a terminal: a tab is four spaces, a control character a box."""
    if character == "\t":
        return "    "
    return character if character.isprintable() else "�"


def _columns(character: str) -> int:
    """Return the number of terminal columns of a character."""
    if character == "\t":
        return 4
    if character.isascii():
        return 1
    import unicodedata  # a large table that most specs do not need

    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
