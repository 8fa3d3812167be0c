"""Rows of data files and generators, by number: random access without reading files into memory.

A line-based file is gone through once, for the offset of each row (8 bytes a row); a row is then
read where it stands. Parquet, which has no random access to rows, is written over once to an Arrow
file that is mapped into memory. Generated problems are made once, see `procedural.py`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tunelang.dsl.messages.run_failures import excerpt
from tunelang.dsl.vocabulary.data import (
    Csv,
    DataKind,
    Jsonl,
    Parquet,
    Procedural,
    PythonData,
    TextFiles,
)
from tunelang.runtime.data.procedural import generate
from tunelang.runtime.data.row_errors import NotARowError
from tunelang.runtime.data.text_templates import Row
from tunelang.runtime.store.atomic_files import replacing
from tunelang.runtime.user_functions import make_rows

_BLOCK = 1 << 20


@runtime_checkable
class Rows(Protocol):
    """Random access to the rows of a source."""

    @property
    def digest(self) -> str:
        """Hash of the content."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row:
        """Return the row; raises `NotARowError` where there is something else."""

    def place(self, row: int) -> str:
        """Return where the row stands, for a report: `train.jsonl:17`."""

    def content(self, row: Row) -> object:
        """Return the part of a row by which it counts as equal to another one."""


def open_rows(kind: DataKind, folder: Path, *, cache: Path) -> Rows:
    """Open the rows of a source; paths are relative to `folder`, and `cache` may be written to.

    Raises `OSError` for a file that cannot be read, and what `generate` raises.
    """
    match kind:
        case Jsonl():
            return _joined([open_lines(path) for path in _paths(kind, folder)])
        case Csv():
            return _joined([_csv(path, kind.separator) for path in _paths(kind, folder)])
        case TextFiles():
            find = _TEXT_ROWS[kind.rows]
            return _joined([_Spans(path, find(path), _text) for path in _paths(kind, folder)])
        case Parquet():
            return _joined([_Table(path, cache) for path in _paths(kind, folder)])
        case Procedural():
            return generate(kind, cache)
        case PythonData():
            return _FunctionRows(make_rows(kind, folder, cache), kind.function)
    raise TypeError(f"not a data source: {type(kind).__name__}")


def open_lines(path: Path) -> Rows:
    """Open the rows of a file with one JSON object a line; raises `OSError`."""
    return _Spans(path, _lines(path), _object)


def _paths(kind: Jsonl | Csv | TextFiles | Parquet, folder: Path) -> list[Path]:
    return [folder / Path(name).expanduser() for name in kind.path]


@dataclass(frozen=True)
class _Joined:
    """Rows of several files, one file after another."""

    parts: tuple[Rows, ...]
    ends: NDArray[np.int64]
    digest: str

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, row: int) -> tuple[Rows, int]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        index = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[index], row - (int(self.ends[index - 1]) if index else 0)

    def __getitem__(self, row: int) -> Row:
        part, inner = self._find(row)
        return part[inner]

    def place(self, row: int) -> str:
        part, inner = self._find(row)
        return part.place(inner)

    def content(self, row: Row) -> object:
        return row


def _joined(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.blake2b("".join(part.digest for part in parts).encode(), digest_size=16)
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return _Joined(tuple(parts), ends, digest.hexdigest())


def file_digest(path: Path) -> str:
    """Return a hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# Rows that are stretches of a file.


class _Spans:
    """Rows that are spans of a file; `spans` `[rows, 2]` are offsets in bytes."""

    def __init__(self, path: Path, spans: NDArray[np.int64], parse: Callable[[str], Row]) -> None:
        self._path = path
        self._spans = spans
        self._parse = parse
        # Read with `os.pread`, which has no position: threads may share the descriptor.
        self._file = path.open("rb")
        self.digest = file_digest(path)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> Row:
        start, end = map(int, self._spans[row])
        raw = os.pread(self._file.fileno(), end - start, start)
        try:
            return self._parse(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise NotARowError("not UTF-8", excerpt(raw.decode("utf-8", "replace"))) from None

    def place(self, row: int) -> str:
        """Return file and line; lines are counted, which is slow and fast enough for reports."""
        return f"{self._path.name}:{_line_number(self._path, int(self._spans[row][0]))}"

    def content(self, row: Row) -> object:
        return row

    def __del__(self) -> None:
        # Absent if opening failed.
        if "_file" in self.__dict__:
            self._file.close()


class _FunctionRows(_Spans):
    """Rows that a function of the user made."""

    def __init__(self, path: Path, function: str) -> None:
        super().__init__(path, _lines(path), _object)
        self._function = function

    def place(self, row: int) -> str:
        return f"{self._function}: row {row + 1}"


def _line_number(path: Path, offset: int) -> int:
    lines = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(_BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _lines(path: Path) -> NDArray[np.int64]:
    """Find the lines of a file that are not blank, without their line ends."""
    spans = array("q")
    with path.open("rb") as file:
        offset = _mark(file.read(3))
        file.seek(offset)
        for line in file:
            if line.strip():
                spans.extend((offset, offset + len(line.rstrip(b"\r\n"))))
            offset += len(line)
    return _pairs(spans)


def _paragraphs(path: Path) -> NDArray[np.int64]:
    """Find runs of lines that are not blank."""
    spans = array("q")
    with path.open("rb") as file:
        offset = _mark(file.read(3))
        file.seek(offset)
        start = end = -1
        for line in file:
            if line.strip():
                start = offset if start < 0 else start
                end = offset + len(line.rstrip(b"\r\n"))
            elif start >= 0:
                spans.extend((start, end))
                start = -1
            offset += len(line)
        if start >= 0:
            spans.extend((start, end))
    return _pairs(spans)


def _whole_file(path: Path) -> NDArray[np.int64]:
    with path.open("rb") as file:
        start = _mark(file.read(3))
    return np.array([[start, path.stat().st_size]], np.int64)


_TEXT_ROWS = {"line": _lines, "paragraph": _paragraphs, "file": _whole_file}


def _mark(head: bytes) -> int:
    """Return the length of a byte-order mark, which some editors put in front of UTF-8."""
    return 3 if head == b"\xef\xbb\xbf" else 0


def _pairs(flat: array[int]) -> NDArray[np.int64]:
    return np.frombuffer(flat, np.int64).reshape(-1, 2) if flat else np.zeros((0, 2), np.int64)


def _object(line: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise NotARowError("not JSON", excerpt(line)) from None
    if not isinstance(value, dict):
        raise NotARowError("not a JSON object", excerpt(line))
    return value


def _text(text: str) -> Row:
    return {"text": text}


# CSV.


def _csv(path: Path, separator: str) -> _Spans:
    """Open a CSV file, and find its rows by reading it once: fields may contain line ends."""
    spans = array("q")
    names: list[str] = []
    # Fields may be texts of any length; Python's own limit is 128 KiB.
    csv.field_size_limit(1 << 30)
    with path.open("rb") as file:
        offset = _mark(file.read(3))
        file.seek(offset)
        ends = [offset]
        reader = csv.reader(_decoded(file, ends), delimiter=separator)
        while (cells := _next(reader)) is not None:
            if not names:
                names = cells
            elif cells:
                spans.extend((offset, ends[0]))
            offset = ends[0]

    def parse(record: str) -> Row:
        try:
            # One string, not its lines: `splitlines` would also cut at U+2028 and its like.
            cells = next(csv.reader([record], delimiter=separator), [])
        except csv.Error as error:
            raise NotARowError(f"not CSV: {error}", excerpt(record)) from None
        if len(cells) != len(names):
            reason = f"{len(cells)} cells for {len(names)} names"
            raise NotARowError(reason, excerpt(record.rstrip("\r\n")))
        return dict(zip(names, cells, strict=True))

    return _Spans(path, _pairs(spans), parse)


def _next(reader: Iterator[list[str]]) -> list[str] | None:
    """Return the next record; a malformed one raises later, when its row is read."""
    try:
        return next(reader, None)
    except csv.Error as error:
        return [str(error)]


def _decoded(file: Iterator[bytes], ends: list[int]) -> Iterator[str]:
    """Yield the lines of a file as text, one character a byte; `ends[0]` is the offset of the end
    of the last one.
    """
    for line in file:
        ends[0] += len(line)
        # CSV's own characters are ASCII, so the records of Latin-1 are those of UTF-8.
        yield line.decode("latin-1")


# Parquet.


class _Table:
    """Rows of a Parquet file, read from an Arrow file in the cache that is mapped into memory."""

    def __init__(self, path: Path, cache: Path) -> None:
        self._path = path
        self.digest = file_digest(path)
        arrow = cache / f"rows-{self.digest}.arrow"
        if not arrow.exists():
            _write_arrow(path, arrow)
        self._table = pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(row)
        fields: Row = self._table.slice(row, 1).to_pylist()[0]
        return fields

    def place(self, row: int) -> str:
        return f"{self._path.name}: row {row + 1}"

    def content(self, row: Row) -> object:
        return row


def _write_arrow(path: Path, arrow: Path) -> None:
    """Convert a Parquet file, a batch of rows at a time; the result appears when it is complete."""
    with (
        replacing(arrow) as temporary,
        pq.ParquetFile(path) as file,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, file.schema_arrow) as writer,
    ):
        for batch in file.iter_batches(batch_size=4096):
            writer.write_batch(batch)


# Content.


def content_hash(content: object, salt: int) -> float:
    """Hash content to a number in [0, 1); the order of an object's fields does not matter."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") / 2**64
