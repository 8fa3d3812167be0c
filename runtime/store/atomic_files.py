"""Files that survive: written whole or not at all, lines that are appended whole, folders synced.

Every failure of the operating system becomes a `StoreError` that says what was being done, and
where.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, TuneError
from tunelang.dsl.messages import run_failures

PART_SUFFIX = ".part"
"""The end of the names of files that are being written."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Row = dict[str, Any]


@dataclass(eq=False)
class StoreError(TuneError):
    """The store could not do something.

    `action` is a verb (`write`, `lock`); `reason` is lower case without a full stop (`no space left
    on device`).
    """

    code = "store-fails"
    action: str
    path: Path
    reason: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.store_failed(self.action, self.path, self.reason)


@contextmanager
def told(what: str, path: Path) -> Iterator[None]:
    """Turn `OSError` and text that is no UTF-8 into `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(what, path, (error.strerror or str(error)).lower()) from error
    except UnicodeDecodeError as error:
        raise StoreError(what, path, "it is not UTF-8 text") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after any crash it has its old content or all of the new.

    Written under a temporary name, synced, renamed, and the folder synced. Raises `StoreError`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART_SUFFIX}")
    with told("write", path):
        try:
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.rename(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        sync_folder(path.parent)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file to write in place of `path`, which it becomes at the end, unless writing failed.

    Its name is random, since hosts that share a folder may well share process ids. It keeps the
    suffix, which `numpy.save` insists on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a value as JSON. Raises `StoreError`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    write_whole(path, text.encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file; None where there is no file. Raises `StoreError`."""
    with told("read", path):
        try:
            text = path.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return json.loads(text)
    except ValueError:
        raise StoreError("read", path, "it is not JSON") from None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last. Raises `OSError`."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> dict[str, int]:
    """Make all files under a folder last. Gives their sizes in bytes by relative path.

    Raises `StoreError`.
    """
    sizes: dict[str, int] = {}
    with told("sync", folder):
        for at, _, names in os.walk(folder, onerror=_raise):
            for name in sorted(names):
                path = Path(at, name)
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                    sizes[str(path.relative_to(folder))] = os.fstat(handle).st_size
                finally:
                    os.close(handle)
            sync_folder(Path(at))
    return sizes


def _raise(error: OSError) -> None:
    raise error


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


# Lines.


@dataclass(frozen=True)
class Rows:
    """What a file of JSON lines holds."""

    rows: tuple[Row, ...]
    damaged: int
    """Lines that are no JSON object: cut by a crash, or damaged on disk."""


def read_rows(path: Path) -> Rows:
    """All rows of a file of JSON lines, which may be written meanwhile. No file is no rows.

    Raises `StoreError`.
    """
    with told("read", path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return Rows((), 0)
    rows: list[Row] = []
    damaged = 0
    for line in content.splitlines():
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            damaged += 1
        else:
            rows.append(row)
    return Rows(tuple(rows), damaged)


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def numbers(row: Row) -> Row:
    """A row of metrics with the numbers that are not finite, which are text in the file."""
    return {
        name: _NON_FINITE.get(held, held) if isinstance(held, str) else held
        for name, held in row.items()
    }


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    """A value with `NaN`, `Infinity` and `-Infinity` as text: JSON has no such numbers, and readers
    in other languages refuse a file that has.
    """
    match value:
        case float() if not math.isfinite(value):
            return json.dumps(value)
        case dict():
            return {key: _finite(held) for key, held in value.items()}
        case list() | tuple():
            return [_finite(held) for held in value]
    return value


class RowWriter:
    """Appends rows to a file of JSON lines; one process at a time.

    A row is in the file as a whole or not at all, unless the machine itself stops. What a crash cut
    off is removed when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with told("write", path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self._size = _end_of_lines(self._handle)
                os.ftruncate(self._handle, self._size)
            except BaseException:
                os.close(self._handle)
                raise

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row. Raises `StoreError`; then the file is as it was before."""
        line = _line(row)
        with told("write", self.path):
            try:
                _write_all(self._handle, line)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._handle, self._size)
                raise
        self._size += len(line)

    def sync(self) -> None:
        """Make what was appended last; before a checkpoint, so that it is never ahead of the rows.

        Raises `StoreError`.
        """
        with told("sync", self.path):
            os.fsync(self._handle)

    def close(self) -> None:
        """Sync and close."""
        if self._handle >= 0:
            try:
                self.sync()
            finally:
                os.close(self._handle)
                self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_of_lines(handle: int) -> int:
    """Bytes up to and with the last line end."""
    size = os.fstat(handle).st_size
    block = 1 << 16
    while size > 0:
        start = max(size - block, 0)
        found = os.pread(handle, size - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


def keep_rows(path: Path, keep: Callable[[Row], bool]) -> int:
    """Leave only the whole rows that `keep` accepts; gives how many were removed.

    Whole or not at all, like `write_whole`. Raises `StoreError`.
    """
    found = read_rows(path)
    kept = [row for row in found.rows if keep(row)]
    removed = len(found.rows) - len(kept) + found.damaged
    if removed:
        write_whole(path, b"".join(_line(row) for row in kept))
    return removed
