"""Read the files that a spec names: first rows of data, model folders, Python functions.

Only reads; nothing is imported or run. Results are cached by path for the time of one check.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FIRST_ROWS = 50
_FIRST_BYTES = 1 << 20


class BadFile(Exception):
    """A file is not of its kind. `problem` says why; `line` counts from 1."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem, line)
        self.problem, self.line = problem, line


@dataclass(frozen=True)
class Sample:
    """The first rows of a data file: the fields that occur, and how often each does."""

    fields: dict[str, int]
    rows: int
    example: dict[str, object]


def sample(path: Path, kind: str, separator: str = ",") -> Sample:
    """Return the fields of a data file, from its first rows.

    Raises `BadFile` where the file is not of its kind, `OSError` where it cannot be read.
    """
    if kind == "text":
        with path.open("rb") as file:
            file.read(1)
        return Sample({"text": 1}, 1, {})
    if kind == "parquet":
        return _parquet(path)
    with path.open("rb") as file:
        head = file.read(_FIRST_BYTES)
        complete = len(head) < _FIRST_BYTES
    try:
        text = head.decode("utf-8-sig", errors="strict" if complete else "ignore")
    except UnicodeDecodeError as error:
        line = head.count(b"\n", 0, error.start) + 1
        raise BadFile("it is not UTF-8 text", line) from None
    lines = text.splitlines()
    if not complete:
        lines = lines[:-1]
    rows = _csv(lines, separator) if kind == "csv" else _jsonl(lines)
    if not rows:
        raise BadFile("it has no rows", None)
    fields: dict[str, int] = {}
    for row in rows:
        for name in row:
            fields[name] = fields.get(name, 0) + 1
    return Sample(fields, len(rows), rows[0])


def _jsonl(lines: list[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            one_document = number == 1 and line.lstrip()[:1] in ("[", "{")
            what = (
                "it is one JSON document, not one object per line"
                if one_document
                else "it is not JSON"
            )
            raise BadFile(what, number) from None
        if not isinstance(row, dict):
            raise BadFile("it is not a JSON object", number)
        rows.append(row)
        if len(rows) == FIRST_ROWS:
            break
    return rows


def _csv(lines: list[str], separator: str) -> list[dict[str, object]]:
    if len(separator) != 1:
        raise BadFile("a separator must be one character", None)
    import csv  # only this kind needs it

    if lines and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
        raise BadFile("it contains JSON lines: its kind is `jsonl`", None)
    try:
        reader = csv.DictReader(lines[: FIRST_ROWS + 1], delimiter=separator)
        return [{k: v for k, v in row.items() if k is not None} for row in reader]
    except csv.Error as error:
        raise BadFile(f"it is not CSV: {error}", None) from None


def _parquet(path: Path) -> Sample:
    try:
        from pyarrow import ArrowInvalid, parquet  # heavy, and only this kind needs it
    except ImportError:
        raise BadFile("reading Parquet needs the package `pyarrow`", None) from None
    try:
        schema = parquet.read_schema(path)
    except ArrowInvalid:
        raise BadFile("it is not a Parquet file", None) from None
    return Sample(dict.fromkeys(schema.names, 1), 1, {})


def neighbours(path: Path) -> list[str]:
    """List the names in the folder of a missing file, or in the nearest folder that exists."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return sorted(entry.name for entry in folder.iterdir())[:10_000]
    except OSError:
        return []


def model_config(path: Path) -> dict[str, object]:
    """Read the `config.json` of a model folder; raises `BadFile` if it cannot be read."""
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except OSError:
        raise BadFile("it has no `config.json`", None) from None
    except ValueError:
        raise BadFile("its `config.json` is not JSON", None) from None
    if not isinstance(config, dict):
        raise BadFile("its `config.json` is not a JSON object", None)
    return config


@dataclass(frozen=True)
class Parameter:
    """A parameter of a Python function."""

    name: str
    required: bool


@dataclass(frozen=True)
class PythonFunction:
    """The signature of a function, read from its file's syntax tree."""

    parameters: tuple[Parameter, ...]
    takes_any: bool
    """Whether it has `**fields`."""
    line: int
    awaited: bool
    """Whether it is `async` or yields, so that calling it gives no number."""


def python_functions(path: Path) -> dict[str, PythonFunction]:
    """Return the functions at the top level of a Python file; raises `BadFile` where it does
    not parse.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        raise BadFile("it is not valid Python", getattr(error, "lineno", None)) from None
    functions: dict[str, PythonFunction] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            required = len(positional) - len(node.args.defaults)
            parameters = [Parameter(a.arg, index < required) for index, a in enumerate(positional)]
            defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            parameters += [Parameter(a.arg, default is None) for a, default in defaults]
            inside = [n for part in node.body for n in ast.walk(part)]
            awaited = isinstance(node, ast.AsyncFunctionDef)
            awaited = awaited or any(isinstance(n, ast.Yield | ast.YieldFrom) for n in inside)
            functions[node.name] = PythonFunction(
                tuple(parameters), node.args.kwarg is not None, node.lineno, awaited
            )
    return functions


@cache
def _generators() -> Path | None:
    """Return the folder of reasoning-gym; None where it is not installed."""
    spec = importlib.util.find_spec("reasoning_gym")
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _registered(text: str) -> dict[str, str]:
    """Return the settings class of each generator that a file of reasoning-gym registers."""
    constants = dict(re.findall(r'^([A-Z_]+) = "(\w+)"', text, re.MULTILINE))
    calls = re.findall(r"^register_dataset\(\s*([\w\"]+),\s*\w+,\s*(\w+)", text, re.MULTILINE)
    return {constants.get(name, name.strip('"')): config for name, config in calls}


@cache
def procedural_tasks() -> dict[str, Path] | None:
    """Return the generators of reasoning-gym and the files that define them; None where it is
    not installed.

    Found by reading the package's files, not by importing it.
    """
    folder = _generators()
    if folder is None:
        return None
    tasks: dict[str, Path] = {}
    for path in folder.rglob("*.py"):
        tasks.update(dict.fromkeys(_registered(path.read_text("utf-8", errors="ignore")), path))
    return tasks


@cache
def procedural_file(task: str) -> Path | None:
    """Return the file that defines a generator; None if there is none of that name."""
    folder = _generators()
    if folder is None or not task.isidentifier():
        return None
    for path in folder.glob(f"*/{task}.py"):  # most files are called like their generator
        if task in _registered(path.read_text("utf-8", errors="ignore")):
            return path
    return (procedural_tasks() or {}).get(task)


def procedural_settings(task: str) -> list[str] | None:
    """Return the settings of a generator, from the fields of its configuration; None where
    they cannot be read.
    """
    path = procedural_file(task)
    if path is None:
        return None
    text = path.read_text("utf-8")
    config = _registered(text).get(task)
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == config:
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return [item.target.id for item in fields if isinstance(item.target, ast.Name)]
    return None
