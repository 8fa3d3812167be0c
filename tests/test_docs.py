"""The documents agree with the code: generated pages, links, examples, paths, dependencies."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tunelang.dsl.check import check
from tunelang.dsl.diagnostics.codes import PRELUDE
from tunelang.dsl.diagnostics.render import text as rendered
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.syntax.source import Source

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
PAGES = [ROOT / name for name in _LISTED if (ROOT / name).exists()]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _generated() -> dict[str, str]:
    described = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module.pages()


def test_generated_pages_are_current(bless: bool) -> None:
    wanted = _generated()
    if bless:
        for name, text in wanted.items():
            (DOCS / name).write_text(text, "utf-8")
    stale = [n for n, t in wanted.items() if not (DOCS / n).exists() or (DOCS / n).read_text() != t]
    assert not stale, "run `python docs/generate.py` and read the difference"
    found = {f"reference/{path.name}" for path in (DOCS / "reference").glob("*.md")}
    assert found <= wanted.keys()


# Links


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_internal_links_resolve(path: Path) -> None:
    text = FENCE.sub("", path.read_text("utf-8"))
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{target} does not exist"
        assert not anchor or anchor in _anchors(page), f"{target} is no heading"


# Examples


def _blocks(*words: str) -> list[tuple[str, str]]:
    """The code blocks whose first line consists of some words, each with a name for its test."""
    found = []
    for path in PAGES:
        matching = [
            body for info, body in FENCE.findall(path.read_text()) if info.split() == [*words]
        ]
        found += [(f"{_name(path)}-{index}", body) for index, body in enumerate(matching)]
    return found


@pytest.mark.parametrize(("name", "block"), _blocks("tune"), ids=lambda value: value[:40])
def test_specs_in_documents_are_right_and_formatted(name: str, block: str) -> None:
    source = Source(name, block, ROOT / "specs")
    checked = check(source)
    assert checked.program is not None, rendered(checked.diagnostics)
    assert format_source(source)[0] == block


@pytest.mark.parametrize(("name", "block"), _blocks("tune", "fragment"), ids=lambda v: v[:40])
def test_fragments_in_documents_are_right(name: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "prelude.tune").write_text(PRELUDE)
    row = '{"question": "1 + 1?", "answer": "It is 2. #### 2"}\n'
    (tmp_path / "math.jsonl").write_text(row * 3)
    (tmp_path / "prose.txt").write_text("Once upon a time.\n")
    (tmp_path / "mine.py").write_text("def score(completion, target):\n    return 1.0\n")
    checked = check(Source(name, f'import "prelude.tune"\n\n{block}', tmp_path))
    wrong = [d for d in checked.diagnostics if d.code != "unused"]
    assert not wrong, rendered(checked.diagnostics)
    assert format_source(Source(name, block, tmp_path))[0] == block


@pytest.mark.parametrize(("name", "block"), _blocks("plan"), ids=lambda value: value[:40])
def test_quoted_plans_are_those_of_the_snapshot(name: str, block: str) -> None:
    snapshot = (ROOT / "tests/plans/gemma-three-sessions-v5e.txt").read_text("utf-8").splitlines()
    assert set(block.splitlines()) <= set(snapshot), name


# README


def test_readme_is_short_and_its_commands_stand_where_ci_looks() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    for command in ("python3 -m venv ", ".venv/bin/pytest"):
        assert len(re.findall(rf"^    {re.escape(command)}", text, re.MULTILINE)) == 1


def test_readme_quotes_what_the_checker_says() -> None:
    lines = [
        'model gemma : pretrained { path = "google/gemma-2b" }',
        'data logic : procedural { task = "knights_knaves" }',
        "stage tuned : sft { from = gemma, data = logic, length = 1 epochs, batch = 8 sequences",
        "  learning_rate = 2e-4",
        "}",
    ]
    text = "\n" * 37 + "\n".join(lines) + "\n"  # so that the mistake is on line 41
    said = rendered(check(Source("specs/math.tune", text, ROOT / "specs")).diagnostics)
    blocks = [body for info, body in FENCE.findall((ROOT / "README.md").read_text("utf-8"))]
    assert said.strip() + "\n" in blocks


def test_readme_lists_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["wandb"], *extras["dev"], *extras["parity"]]
    wanted = {re.match(r"[\w.-]+", item).group() for item in listed}  # type: ignore[union-attr]
    table = (ROOT / "README.md").read_text("utf-8").partition("## Dependencies")[2]
    cells = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    named = [n.strip() for cell in cells for n in re.sub(r"\(.*?\)", "", cell).split(",")]
    assert sorted(named) == sorted({*wanted, "package"})


# Paths and names

FOLDERS = r"(?:dsl|compiler|runtime|tests|docs|benchmarks|specs|\.ci)"
QUOTED = re.compile(rf"`({FOLDERS}/[\w./-]*)(?::([\w.]+))?`")
DRAWN = re.compile(rf"\b({FOLDERS}/[\w/]+\.py)(?::([\w.]+))?")


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_paths_and_names_in_documents_exist(path: Path) -> None:
    """A path in backticks exists, and the name behind it too: `path.py:Class.method`."""
    text = path.read_text("utf-8")
    drawn = "".join(body for info, body in FENCE.findall(text) if info == "text")
    for file, name in [*QUOTED.findall(FENCE.sub("", text)), *DRAWN.findall(drawn)]:
        assert (ROOT / file).exists(), f"{file} does not exist"
        assert not name or name in _definitions(ROOT / file), f"{file} does not define {name}"


def _definitions(path: Path) -> set[str]:
    """The names that a module defines at its top level, and those of its classes' members."""
    return set(_names_in(ast.parse(path.read_text("utf-8")).body, ""))


def _names_in(body: list[ast.stmt], prefix: str) -> list[str]:
    found: list[str] = []
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.append(prefix + name)
            case ast.ClassDef(name=name):
                found += [prefix + name, *_names_in(node.body, f"{prefix}{name}.")]
            case ast.Assign(targets=targets):
                found += [prefix + t.id for t in targets if isinstance(t, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                found.append(prefix + name)
    return found


# Modules


def test_every_module_has_a_test() -> None:
    """A module has a test file of its name, or a row in `tests/README.md`."""
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    table = (ROOT / "tests/README.md").read_text("utf-8").partition("## Which file tests")[2]
    rows = re.findall(r"^\| (`.*?) \| (`.*) \|$", table, re.MULTILINE)
    listed = {module for cell, _ in rows for module in re.findall(r"`([^`]+\.py)`", cell)}
    modules = {
        _name(path)
        for layer in ("dsl", "compiler", "runtime")
        for path in (ROOT / layer).rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    untested = {m for m in modules - listed if f"test_{Path(m).name}" not in files}
    assert not untested, "give it a test, and say where in tests/README.md"
