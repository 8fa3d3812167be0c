"""What is shipped is what is here, and the layers import in one direction only."""

from __future__ import annotations

import ast
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
    paths = {path for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
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
