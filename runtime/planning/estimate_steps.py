"""Estimates the number of steps of a stage whose length depends on its data, from the beginnings
of the data's files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import DataExpression
from tunelang.dsl.vocabulary.models import Bytes
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Supervised
from tunelang.runtime.data.examples import example_of, roles_of, texts_of
from tunelang.runtime.data.row_errors import MissingFieldError, WrongTypeError
from tunelang.runtime.data.sample_order import steps_of

_HEAD_BYTES = 2**18
"""Bytes read from the beginning of a file, from which the file is extrapolated."""
_MEASURED_ROWS = 64
"""Number of rows whose texts are measured."""
_TOKEN_CHARACTERS = 4.0
"""Approximate characters of a token, for tokenizers that merge characters."""
_PROBLEM_CHARACTERS = 200.0
"""Approximate characters of a generated problem with its answer."""


@dataclass(frozen=True)
class Extent:
    """Approximate size of some data."""

    examples: float
    characters: float
    """Characters of all examples together."""


class _UnknownError(Exception):
    """The size of the data is unknown until it is read."""


def estimate_steps(
    program: Program, stage: Training, model: str, layout: StageLayout, known: dict[str, Extent]
) -> tuple[int, bool] | None:
    """Return the number of steps of a stage, and whether it is exact; None if it is unknown.

    `known` caches the extents of sources.
    """
    unit, value = stage.length.unit, stage.length.value
    if unit == "steps":
        return int(value), True
    if unit == "tokens":
        return max(1, ceil(value / (layout.rows * layout.length))), False
    try:
        extent = _extent(program, stage.data, known)
    except (_UnknownError, OSError):
        return None
    epoch, batch = extent.examples, layout.rows
    if isinstance(stage, Policy):
        batch = stage.batch
    elif isinstance(stage, Supervised) and stage.packing:
        kind = program.declarations[model].value
        tokenizer = kind.tokenizer and program.declarations[kind.tokenizer.name].value
        is_bytes = isinstance(tokenizer, Bytes)
        tokens = extent.characters / (1.0 if is_bytes else _TOKEN_CHARACTERS)
        epoch = min(epoch, tokens / layout.length)
    return steps_of(stage.length, epoch=max(1, ceil(epoch)), batch=batch), False


def _extent(program: Program, expression: DataExpression, known: dict[str, Extent]) -> Extent:
    match expression:
        case data.DataRef(name=name):
            kind = program.declarations[name].value
            if not isinstance(kind, data.DataKind):
                return _extent(program, kind, known)
            if name not in known:
                known[name] = _source_extent(name, kind, program.folder)
            return known[name]
        case data.Mixture():
            parts = [_extent(program, part.of, known) for part in expression.parts]
            # An epoch has as many examples as all parts together, in the shares of the mixture.
            examples = sum(part.examples for part in parts)
            characters = sum(
                weighted.weight * part.characters / part.examples
                for weighted, part in zip(expression.parts, parts, strict=True)
            )
            return Extent(examples, examples * characters)
        case data.DataMethod():
            source = _extent(program, expression.of, known)
            examples = _examples_after(expression, source.examples)
            return Extent(examples, source.characters * examples / source.examples)
    raise _UnknownError


def _examples_after(method: data.DataMethod, examples: float) -> float:
    """Return the number of a source's examples that remain after a method."""
    match method:
        case data.Take():
            return min(examples, method.count)
        case data.Skip():
            return max(1.0, examples - method.count)
        case data.Repeat():
            return examples * method.times
        case data.Split():
            named = sum(share for name, share in method.parts.items() if name != "train")
            shares = {**method.parts, "train": 1.0 - named}
            return examples * shares.get(method.part or "train", 1.0)
        case data.Where():
            raise _UnknownError
    return examples


def _source_extent(name: str, kind: data.DataKind, folder: Path) -> Extent:
    if isinstance(kind, data.Procedural):
        return Extent(kind.size, _PROBLEM_CHARACTERS * kind.size)
    if not isinstance(kind, data.Jsonl | data.TextFiles):
        raise _UnknownError
    files = [_file_extent(name, kind, folder / Path(path).expanduser()) for path in kind.path]
    return Extent(sum(f.examples for f in files), sum(f.characters for f in files))


def _file_extent(name: str, kind: data.Jsonl | data.TextFiles, path: Path) -> Extent:
    """Extrapolate from the beginning of a file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if isinstance(kind, data.TextFiles):
        rows, characters = _text_rows(head, kind.rows), float(len(head))
    else:
        lines = head.splitlines()[: None if len(head) == size else -1]
        rows, characters = len(lines), _json_characters(name, kind, lines)
        head = b"\n".join(lines) + b"\n"
    if not rows:
        raise _UnknownError
    times = 1.0 if size == len(head) else size / len(head)
    is_one_row = isinstance(kind, data.TextFiles) and kind.rows == "file"
    return Extent(1 if is_one_row else rows * times, characters * times)


def _text_rows(head: bytes, rows: str) -> int:
    """Count the rows that a text is divided into."""
    if rows == "file":
        return 1
    separator = b"\n\n" if rows == "paragraph" else b"\n"
    return sum(bool(part.strip()) for part in head.split(separator))


def _json_characters(name: str, kind: data.DataKind, lines: Sequence[bytes]) -> float:
    """Count the characters of the examples in lines of JSON."""
    roles, measured, characters = roles_of(kind), lines[:_MEASURED_ROWS], 0
    for row, line in enumerate(measured):
        with suppress(ValueError, MissingFieldError, WrongTypeError):
            fields = json.loads(line)
            if isinstance(fields, dict):
                characters += sum(map(len, texts_of(example_of(name, row, fields, roles))))
    return characters * len(lines) / len(measured) if measured else 0.0
