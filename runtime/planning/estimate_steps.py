"""The steps of a stage whose length its data decides, before the data is read: an estimate from the
beginnings of its files.
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

_READ = 2**18
"""Bytes at the beginning of a file that stand for all of it."""
_SHOWN = 64
"""Rows of which the texts are measured."""
_CHARACTERS = 4.0
"""Characters of a token, about, of a tokenizer that merges them; bytes are their own tokens."""


@dataclass(frozen=True)
class Extent:
    """How much there is of some data, about."""

    examples: float
    characters: float
    """Of all examples together."""


def steps(
    program: Program, stage: Training, model: str, layout: StageLayout, known: dict[str, Extent]
) -> tuple[int, bool] | None:
    """Return the steps of a stage, and whether they are exact; None where nothing is known.

    `known` keeps what was found of sources.
    """
    unit, value = stage.length.unit, stage.length.value
    if unit == "steps":
        return int(value), True
    if unit == "tokens":
        return max(1, ceil(value / (layout.rows * layout.length))), False
    try:
        found = _extent(program, stage.data, known)
    except (_UnknownError, OSError):
        return None
    epoch, batch = found.examples, layout.rows
    if isinstance(stage, Policy):
        batch = stage.batch
    elif isinstance(stage, Supervised) and stage.packing:
        kind = program.declarations[model].value
        tokenizer = kind.tokenizer and program.declarations[kind.tokenizer.name].value
        tokens = found.characters / (1.0 if isinstance(tokenizer, Bytes) else _CHARACTERS)
        epoch = min(epoch, tokens / layout.length)
    return steps_of(stage.length, epoch=max(1, ceil(epoch)), batch=batch), False


_PROBLEM = 200.0
"""Characters of a generated problem with its answer, about."""


class _UnknownError(Exception):
    """Nothing can be said without reading the data."""


def _extent(program: Program, expression: DataExpression, known: dict[str, Extent]) -> Extent:
    match expression:
        case data.DataRef(name=name):
            kind = program.declarations[name].value
            if not isinstance(kind, data.DataKind):
                return _extent(program, kind, known)
            if name not in known:
                known[name] = _source(name, kind, program.folder)
            return known[name]
        case data.Mixture():
            parts = [_extent(program, part.of, known) for part in expression.parts]
            # An epoch has as many examples as all of them, in the shares of the mixture.
            examples = sum(part.examples for part in parts)
            each = sum(
                weighted.weight * part.characters / part.examples
                for weighted, part in zip(expression.parts, parts, strict=True)
            )
            return Extent(examples, examples * each)
        case data.DataMethod():
            whole = _extent(program, expression.of, known)
            examples = whole.examples
            match expression:
                case data.Take():
                    examples = min(examples, expression.count)
                case data.Skip():
                    examples = max(1.0, examples - expression.count)
                case data.Repeat():
                    examples *= expression.times
                case data.Split():
                    rest = 1.0 - sum(v for n, v in expression.parts.items() if n != "train")
                    shares = {**expression.parts, "train": rest}
                    examples *= shares.get(expression.part or "train", 1.0)
                case data.Where():
                    raise _UnknownError
            return Extent(examples, whole.characters * examples / whole.examples)
    raise _UnknownError


def _source(name: str, kind: data.DataKind, folder: Path) -> Extent:
    if isinstance(kind, data.Procedural):
        return Extent(kind.size, _PROBLEM * kind.size)
    if not isinstance(kind, data.Jsonl | data.TextFiles):
        raise _UnknownError
    examples = characters = 0.0
    for each in kind.path:
        path = folder / Path(each).expanduser()
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_READ)
        if isinstance(kind, data.TextFiles):
            rows, text = _text(head, kind.rows), float(len(head))
        else:
            lines = head.splitlines()[: None if len(head) == size else -1]
            rows, text = len(lines), _characters(name, kind, lines)
            head = b"\n".join(lines) + b"\n"
        if not rows:
            raise _UnknownError
        times = 1.0 if size == len(head) else size / len(head)
        examples += 1 if isinstance(kind, data.TextFiles) and kind.rows == "file" else rows * times
        characters += text * times
    return Extent(examples, characters)


def _text(head: bytes, rows: str) -> int:
    if rows == "file":
        return 1
    separator = b"\n\n" if rows == "paragraph" else b"\n"
    return sum(bool(part.strip()) for part in head.split(separator))


def _characters(name: str, kind: data.DataKind, lines: Sequence[bytes]) -> float:
    """Count the characters of the examples that lines of JSON are."""
    roles, shown, found = roles_of(kind), lines[:_SHOWN], 0
    for at, line in enumerate(shown):
        with suppress(ValueError, MissingFieldError, WrongTypeError):
            fields = json.loads(line)
            if isinstance(fields, dict):
                found += sum(map(len, texts_of(example_of(name, at, fields, roles))))
    return found * len(lines) / len(shown) if shown else 0.0
