"""Diagnostics, formatted and resolved texts of specs against the snapshots of `tests/ui`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunelang.dsl.check import Checked, check
from tunelang.dsl.diagnostics import render
from tunelang.dsl.diagnostics.codes import codes
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.reference.resolved_text import show
from tunelang.dsl.syntax.source import Source

UI = Path(__file__).parent / "ui"
WORKSPACE = UI / "workspace"
RUN = UI / "run"
"""Specs that fail when they are planned or run: see `tests/test_run_failures.py`."""
CASES = sorted(p for p in UI.rglob("*.tune") if not {WORKSPACE, RUN} & set(p.parents))
WITHOUT_CASE = {"missing-package", "stage-fails"}
"""Codes that no spec alone can cause: a package that is not installed, a fault of the program."""


def read_case(path: Path) -> Source:
    """Read a case as if it were a file of the workspace."""
    return Source(path.name, path.read_text("utf-8"), WORKSPACE)


def check_case(path: Path) -> Checked:
    """Check a case with the overrides that it names."""
    source = read_case(path)
    sets = re.findall(r"^# args: --set (.*)$", source.text, re.MULTILINE)
    return check(source, sets)


def assert_output(path: Path, actual: str, bless: bool) -> None:
    """Compare with the snapshot, or rewrite it."""
    if bless:
        path.write_text(actual, "utf-8") if actual else path.unlink(missing_ok=True)
    expected = path.read_text("utf-8") if path.exists() else ""
    assert actual == expected, f"{path.name} differs: run with --bless and read the difference"


def marked_diagnostics(text: str) -> list[tuple[int, str, str]]:
    """List the marks of a spec: line (from 1), severity, code."""
    marks = []
    for number, line in enumerate(text.splitlines(), 1):
        for match in re.finditer(r"#~(\^*) (error|warning)\[([a-z-]+)\]", line):
            marks.append((number - len(match.group(1)), match.group(2), match.group(3)))
    return sorted(marks)


@pytest.mark.parametrize("path", CASES, ids=lambda p: str(p.relative_to(UI).with_suffix("")))
def test_output_matches_the_snapshot(path: Path, bless: bool) -> None:
    result = check_case(path)
    text = read_case(path).text
    assert_output(path.with_suffix(".stderr"), render.text(result.diagnostics), bless)
    if "fmt" in path.parts:
        formatted, diagnostics = format_source(read_case(path))
        assert formatted is not None, diagnostics
        assert_output(path.with_suffix(".fmt"), formatted, bless)
        again, _ = format_source(Source(path.name, formatted, WORKSPACE))
        assert again == formatted
    if "show" in path.parts:
        assert result.program is not None
        assert_output(path.with_suffix(".show"), show(result.program), bless)
    local = [d for d in result.diagnostics if d.where.span.source.name == path.name]
    lines = [d.where.span.source.position(d.where.span.start)[0] + 1 for d in local]
    reported = sorted((n, d.severity, d.code) for n, d in zip(lines, local, strict=True))
    assert reported == marked_diagnostics(text)


def test_every_code_has_a_case() -> None:
    assert len(CASES) >= 60
    shown = "".join(p.read_text("utf-8") for p in UI.rglob("*.stderr"))
    missing = {name for name in codes() if f"[{name}]" not in shown}
    assert missing <= WITHOUT_CASE | {"unreadable-file"}


@pytest.mark.parametrize("path", sorted(UI.rglob("*.stderr")), ids=lambda p: p.stem)
def test_output_fits_a_terminal(path: Path) -> None:
    for line in path.read_text("utf-8").splitlines():
        assert len(line) <= 100
        if re.match(r"(error|warning)\[", line):
            assert len(line) <= 100
            assert not line.endswith(".")


def test_every_snapshot_has_its_spec() -> None:
    for path in UI.rglob("*"):
        if path.suffix in (".stderr", ".fmt", ".show"):
            assert path.with_suffix(".tune").exists(), path
