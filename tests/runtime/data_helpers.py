"""Small programs, rows, examples and difficult texts for tests of data and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunelang.dsl.program import Declared, Program
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.stages import Run
from tunelang.runtime.data.examples import Example, Message
from tunelang.runtime.data.sample_order import batch_positions
from tunelang.runtime.data.stream import Library, Stream

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

HARD = (
    "",
    "Hello, world",
    "  two spaces,\ttab\n\nlines\r\n and an end \n",
    "naïve café — “quotes” … 東京 مرحبا",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff",
    "def f(x):\n    return {'a': [x ** 2, 1e-5]}  # `code`\n",
    "123456789012345678901234567890 3.14159 1,000,000",
    "\x00\x01\x1b[31m\x7f\u0085\u2028",
    "<s>user</s> <unk> <pad> <|im_start|>assistant <|im_end|> [INST] <0x41> <start>",
    "▁ \u2581word ﬁ ½ ﷺ",
)


def shared(name: str) -> Path:
    """Return the path of a real file, or skip the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}, which is not part of the project")
    return path


def text(template: str) -> data.TemplateText:
    """Make a text template."""
    return data.TemplateText(text=template)


def ref(name: str = "d") -> data.DataRef:
    """Refer to a data set."""
    return data.DataRef(name=name)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    """Write rows, or lines as they are; returns the file's name."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path.name


def questions(count: int, tag: str = "") -> list[dict[str, Any]]:
    """Make rows of a question, an answer of varying length and a number."""
    return [{"q": f"{tag}{n}?", "a": "yes " * (n % 7 + 1), "n": n} for n in range(count)]


def jsonl(name: str, **settings: Any) -> data.Jsonl:
    """Declare a file of `questions`."""
    roles = {"prompt": text("{q}"), "response": text("{a}")}
    return data.Jsonl(path=(name,), **{**roles, **settings})


def library(folder: Path, **kinds: Any) -> Library:
    """Open data sets that are declared by name."""
    declarations = {name: Declared("data", name, "jsonl", kind, "") for name, kind in kinds.items()}
    return Library(Program(declarations, Run(), folder, {}), folder / "cache")


def chat(*turns: tuple[str, str]) -> Example:
    """Make an example of messages, each a role and a text."""
    messages = tuple(Message(role, content) for role, content in turns)
    return Example("d", 0, {}, messages=messages)


def pair(prompt: str, response: str, system: str | None = None) -> Example:
    """Make an example of a prompt and a response."""
    return Example("d", 0, {}, prompt=prompt, response=response, system=system)


def batch(stream: Stream, step: int, size: int) -> list[Example]:
    """Read the examples of the batch of a step."""
    return stream.examples_at(batch_positions(step, size))
