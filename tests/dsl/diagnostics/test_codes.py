"""Every diagnostic code has an example that yields it, and one beside it that is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunelang.dsl.check import check
from tunelang.dsl.diagnostics.codes import PRELUDE, Code, codes
from tunelang.dsl.rules import named_files
from tunelang.dsl.syntax.source import Source

EXAMPLES = [code for code in codes().values() if not code.needs_run]
LEADS_UP = {"too-many-errors": {"missing-noun"}}
"""What stands beside a code in its example."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the prelude takes for granted."""
    path = tmp_path_factory.mktemp("codes")
    (path / "prelude.tune").write_text(PRELUDE)
    (path / "math.jsonl").write_text('{"question": "1 + 1?", "answer": "It is 2. #### 2"}\n' * 3)
    (path / "prose.txt").write_text("Once upon a time.\n")
    (path / "picture.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    (path / "shared.tune").write_text("let shared = 1\n")
    (path / "whole.tune").write_text("run { seed = 1 }\n")
    (path / "mine.py").write_text("def score(completion, target):\n    return 1.0\n")
    return path


def found(text: str, folder: Path, sets: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    source = Source("spec.tune", f'import "prelude.tune"\n\n{text}', folder)
    return [(d.severity, d.code) for d in check(source, sets).diagnostics]


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.name)
def test_wrong_example_yields_its_code(
    code: Code, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code.name == "missing-package":
        monkeypatch.setattr(named_files, "procedural_file", lambda _: None)
        monkeypatch.setattr(named_files, "procedural_tasks", lambda: None)
    reported = [name for _, name in found(code.wrong, folder, code.arguments)]
    assert code.name in reported
    assert set(reported) <= {code.name, "unused"} | LEADS_UP.get(code.name, set()), (
        "one cause, one code"
    )


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.name)
def test_right_example_is_right(code: Code, folder: Path) -> None:
    assert set(found(code.right, folder)) <= {("warning", "unused")}


@pytest.mark.parametrize("name", [code.name for code in codes().values()])
def test_names_are_words_in_kebab_case(name: str) -> None:
    assert name == name.lower().replace("_", "-")
    assert codes()[name].text
    needs_example = not codes()[name].needs_run
    assert bool(codes()[name].wrong) == needs_example
    assert bool(codes()[name].right) == needs_example
