"""The formatter: idempotent, loses no comment, keeps the meaning."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunelang.dsl.check import check
from tunelang.dsl.parsing.file_parser import parse
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.parsing.lexer import lex
from tunelang.dsl.syntax.source import Source

NAMES = st.sampled_from(["a", "beta", "longer_name", "x1", "données"])
SPACE = st.sampled_from(["", " ", "  ", "\t"])
BREAK = st.sampled_from(["", " ", "\n", "\n  ", " # why\n", "\n\n# two\n  "])


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """An expression with odd spacing, and line ends and comments where they are allowed."""
    leaf = st.sampled_from(
        [
            "1",
            "2.5k",
            "20%",
            "2  epochs",
            '"text"',
            '"""\n  long\n  """',
            "/a\\/b/",
            "true",
            "none",
            "name",
        ]
    )
    if depth == 0:
        return draw(leaf)
    inner = expressions(depth=depth - 1)
    space, gap = draw(SPACE), draw(BREAK)
    match draw(st.integers(0, 7)):
        case 0:
            return f"[{gap}{draw(inner)}{space},{gap}{draw(inner)}{draw(BREAK)}]"
        case 1:
            comma = draw(st.sampled_from(["", ","]))
            return f"f({gap}{draw(NAMES)}{space}={space}{draw(inner)}{comma}{draw(BREAK)})"
        case 2:
            return f"({gap}{draw(inner)}{draw(BREAK)})"
        case 3:
            operator = draw(st.sampled_from(["+", "-", "*", "<", "and"]))
            return f"({draw(inner)} {operator} {draw(inner)})"
        case 4:
            return f"({draw(inner)} if {draw(inner)} else {draw(inner)})"
        case 5:
            return f"name.method({draw(inner)}).part"
        case 6:
            return f"not ({draw(inner)})"
        case _:
            return draw(leaf)


@st.composite
def files(draw: st.DrawFn) -> str:
    """A file of declarations and comments."""
    parts: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        match draw(st.integers(0, 3)):
            case 0:
                parts.append(f"let {draw(NAMES)} = {draw(expressions())}")
            case 1:
                separator = draw(st.sampled_from(["\n", ", ", "\n\n", "  # end\n"]))
                rows = [
                    f"{draw(NAMES)} = {draw(expressions())}" for _ in range(draw(st.integers(0, 3)))
                ]
                parts.append(
                    f"model {draw(NAMES)} : kind {{{draw(BREAK)}{separator.join(rows)}\n}}"
                )
            case 2:
                parts.append(draw(st.sampled_from(["# alone", "## doc", "#!mark", "#"])))
            case _:
                parts.append('import "a.tune" as b with (c = 1,\n d = 2)')
        parts.append(draw(st.sampled_from(["\n", "\n\n", "\n\n\n", "  # behind\n"])))
    return "".join(parts)


def comments(text: str) -> list[str]:
    return sorted(c.text.lstrip("# ") for c in lex(Source("", text)).comments)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files())
def test_formatting_keeps_the_program_and_is_idempotent(text: str) -> None:
    formatted, diagnostics = format_source(Source("a", text))
    if formatted is None:
        assert diagnostics
        return
    again, _ = format_source(Source("a", formatted))
    assert again == formatted
    assert comments(formatted) == comments(text)
    before, after = parse(Source("a", text))[0], parse(Source("a", formatted))[0]
    assert len(before.items) == len(after.items)
    assert check(Source("a", text)).program == check(Source("a", formatted)).program


def test_foreign_line_ends_are_normalised() -> None:
    formatted, _ = format_source(Source("a", "let a = 1\r\nlet b = [\r\n  2,\r\n]\r\n"))
    assert formatted == "let a = 1\n\nlet b = [\n  2,\n]\n"


def test_spec_with_syntax_errors_is_not_formatted() -> None:
    formatted, diagnostics = format_source(Source("a", "let a = (1\n"))
    assert formatted is None
    assert [d.code for d in diagnostics] == ["unclosed-bracket"]
