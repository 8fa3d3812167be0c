"""Thousands of damaged specs: nothing but diagnostics, inside the file, a handful, and in time."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tunelang.dsl.check import Checked, check
from tunelang.dsl.diagnostics import render
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.parsing.lexer import lex
from tunelang.dsl.syntax.source import Source

WORKSPACE = Path(__file__).parents[1] / "ui" / "workspace"
SEEDS = sorted((Path(__file__).parents[1] / "ui").glob("[!w]*/*.tune"))
CASES = 5000
STRAY = [
    "\0",
    "\x1b",
    "\ufffd",
    "$",
    "@",
    "“",
    "é",
    "🙂",
    "\r",
    "\t",
    "'",
    '"',
    '"""',
    "/",
    "\\",
    "#",
    ";",
]
WORDS = [
    "let",
    "stage",
    "run",
    "import",
    "if",
    "else",
    "not",
    "each",
    "none",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
]
WORDS += [
    "=",
    ":",
    ",",
    ".",
    "+",
    "-",
    "*",
    "/",
    "<",
    "==",
    "3",
    "20%",
    "2 epochs",
    '"{a}"',
    "/a/",
    "\n",
]


def damage(text: str, random_: random.Random) -> str:
    """A spec with one to four things done to it."""
    for _ in range(random_.randint(1, 4)):
        tokens = lex(Source("", text)).tokens
        if not tokens:
            return text
        a, b = random_.choice(tokens).span, random_.choice(tokens).span
        match random_.randrange(8):
            case 0:
                text = text[: a.start] + text[a.end :]
            case 1:
                text = f"{text[: a.end]} {a.text}{text[a.end :]}"
            case 2 if a.end <= b.start:
                text = text[: a.start] + b.text + text[a.end : b.start] + a.text + text[b.end :]
            case 3:
                text = text[: random_.randrange(len(text) + 1)]
            case 4:
                at = random_.randrange(len(text) + 1)
                text = text[:at] + random_.choice(STRAY) + text[at:]
            case 5:
                text = text[: a.start] + random_.choice(WORDS) + text[a.end :]
            case 6:
                at = random_.randrange(len(text) + 1)
                text = text[:at] + random_.choice("([{") * random_.randint(1, 80) + text[at:]
            case _:
                text = f"{text[: a.start]}{random_.choice(WORDS)} {text[a.start :]}"
    return text


def examine(text: str) -> Checked:
    """Check and format a text, and look at every span that comes out."""
    source = Source("fuzz.tune", text, WORKSPACE)
    result = check(source)
    for found in result.diagnostics:
        places = [found.where.span, *(s.span for s in found.seconds), *(e.span for e in found.fix)]
        for span in places:
            assert 0 <= span.start <= span.end <= len(span.source.text)
    shown = render.text(result.diagnostics)
    assert all(ord(c) >= 32 or c == "\n" for c in shown), "nothing that a terminal would obey"
    render.json(result.diagnostics)
    formatted, problems = format_source(source)
    if formatted is not None:
        again, _ = format_source(Source("fuzz.tune", formatted, WORKSPACE))
        assert again == formatted
        assert check(Source("fuzz.tune", formatted, WORKSPACE)).program == result.program
    else:
        assert problems
    return result


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_damaged_specs_never_crash_the_checker(part: int) -> None:
    random_ = random.Random(1000 + part)
    texts = [path.read_text("utf-8") for path in SEEDS]
    for number in range(CASES // 10):
        text = damage(random_.choice(texts), random_)
        start = time.perf_counter()
        try:
            result = examine(text)
        except Exception as error:
            raise AssertionError(f"part {part}, case {number}:\n{text}") from error
        assert len(result.diagnostics) < 80
        assert time.perf_counter() - start < 10, text


@pytest.mark.parametrize(
    "text",
    [
        "let a = " + "(" * 100_000,
        "let a = " + "[" * 50_000 + "]" * 50_000,
        "let a = " + "not " * 50_000 + "true",
        "let a = " + "-" * 50_000 + "1",
        "let a = " + "1 if true else " * 20_000 + "1",
        "let a = 1" + " + 1" * 200_000,
        "let a = x" + ".take(1)" * 20_000,
        'let a = "' + "x" * 1_000_000 + '"',
        "let a = " + "9" * 100_000,
        "let " + "a" * 1_000_000 + " = 1",
        "#" * 1_000_000,
        "model a : pretrained {" + "path = " * 50_000 + "}",
        "model a : pretrained { " + "x = 1, " * 50_000 + "}",
        "\n" * 1_000_000 + "let a = b",
        "{" * 1_000_000,
        "}" * 200_000,
        "let a = [" + "1, " * 200_000 + "]",
        "reward a = exact()" + " + exact()" * 20_000,
        "\u2028let a\u00a0= 1",
        "",
        "import",
        'import "',
        "run",
        "run {",
    ],
    ids=lambda text: text[:12].strip() or "empty",
)
def test_extreme_texts_never_crash_the_checker(text: str) -> None:
    start = time.perf_counter()
    source = Source("fuzz.tune", text, WORKSPACE)
    result = check(source)
    render.text(result.diagnostics)
    assert len(result.diagnostics) < 80
    assert time.perf_counter() - start < 60
