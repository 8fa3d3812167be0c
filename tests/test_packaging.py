"""What is shipped is what is here, and the layers import in one direction only."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["dsl", "compiler", "runtime"]


def test_every_package_is_listed() -> None:
    """A package that is not listed vanishes from the wheel without a word."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [p.parent.relative_to(ROOT) for d in LAYERS for p in (ROOT / d).rglob("__init__.py")]
    assert sorted(listed) == sorted("tunelang." + ".".join(p.parts) for p in found)


def test_type_checkers_see_every_layer() -> None:
    links = {p.name for p in (ROOT / ".types/tunelang").iterdir()}
    assert links == {layer for layer in LAYERS if (ROOT / layer).is_dir()}


def test_imports_go_one_way() -> None:
    for level, layer in enumerate(LAYERS):
        for path in (ROOT / layer).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: relative import"
                    names = [node.module or ""]
                for name in names:
                    parts = name.split(".")
                    if parts[0] == "tunelang" and len(parts) > 1:
                        assert LAYERS.index(parts[1]) <= level, f"{path} imports {name}"
                    assert not (layer == "dsl" and parts[0] in ("jax", "flax", "numpy")), path


def test_every_module_says_what_it_is() -> None:
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), path


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, without `tunelang`."""
    paths = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports_of(path: Path) -> Iterator[str]:
    """The modules of the project that a file imports, also in functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            name = name.removeprefix("tunelang.")
            if name not in modules():
                name = name.rpartition(".")[0]
            if name in modules():
                yield name


def circles(layer: str, depth: int | None) -> list[list[str]]:
    """Groups of modules of a layer that import each other; of their packages, cut to `depth`."""
    graph = nx.DiGraph()
    for name, path in modules().items():
        for target in imports_of(path):
            if name.startswith(f"{layer}.") and target.startswith(f"{layer}."):
                ends = [".".join(end.split(".")[:depth]) for end in (name, target)]
                if ends[0] != ends[1]:
                    graph.add_edge(*ends)
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


@pytest.mark.parametrize("layer", ["dsl", "compiler"])
def test_modules_do_not_import_each_other_in_circles(layer: str) -> None:
    assert circles(layer, None) == []


@pytest.mark.parametrize("layer", ["dsl", "compiler"])
def test_sub_packages_do_not_import_each_other_in_circles(layer: str) -> None:
    assert circles(layer, 2) == []


def runtime_order() -> list[list[str]]:
    """Packages and modules of the runtime from the bottom up, as ARCHITECTURE.md lists them."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    table = text[text.index("From the bottom up") : text.index("## Where to add what")]
    rows = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `runtime/"))
    return [re.findall(r"`runtime/(\w+)", row) for row in rows]


def test_sub_packages_of_the_runtime_import_downwards_only() -> None:
    level = {name: number for number, row in enumerate(runtime_order()) for name in row}
    for name, path in modules().items():
        if name.startswith("runtime.") and name != "runtime.__main__":
            package = name.split(".")[1]
            for target in imports_of(path):
                if target.startswith("runtime.") and target.split(".")[1] != package:
                    assert level[target.split(".")[1]] < level[package], f"{name} imports {target}"


SUFFIXES = ("", "s", "es", "d", "ed", "r", "er", "or", "ing", "ion", "ation", "al", "ment")


def stems(name: str) -> set[str]:
    """The name without each suffix, and without a last `e`: `sample` and `sampling` share one."""
    cut = {name.removesuffix(suffix) for suffix in SUFFIXES}
    return {stem.rstrip("e") for stem in cut if len(stem) > 2}


def test_no_two_modules_differ_by_a_suffix_only() -> None:
    seen: dict[str, str] = {}
    for name in modules():
        if (ROOT / Path(*name.split("."))).is_dir() or name.endswith("__main__"):
            continue
        for stem in stems(name.rpartition(".")[2]):
            assert seen.setdefault(stem, name) == name, f"{name} and {seen[stem]}"


@pytest.mark.parametrize("package", [n for n, p in modules().items() if p.name == "__init__.py"])
def test_a_package_is_small_and_says_what_it_holds(package: str) -> None:
    path = modules()[package]
    names = [p.stem for p in path.parent.glob("*.py") if not p.stem.startswith("__")]
    assert len(names) <= 16
    contents = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    assert [name for name in names if f"- `{name}`: " not in contents] == []


def test_no_function_is_longer_than_80_lines() -> None:
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"
