"""Writes files atomically, appends complete lines to files, and syncs folders.

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
"""Suffix of the names of files that are being written."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

JsonObject = dict[str, Any]
"""A parsed JSON object."""


@dataclass(eq=False)
class StoreError(TuneError):
    """The store failed to read or write something.

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
def raising_store_errors(action: str, path: Path) -> Iterator[None]:
    """Turn `OSError` and text that is no UTF-8 into `StoreError`."""
    try:
        yield
    except OSError as error:
        raise StoreError(action, path, (error.strerror or str(error)).lower()) from error
    except UnicodeDecodeError as error:
        raise StoreError(action, path, "it is not UTF-8 text") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after any crash it has either its old or its new content.

    The content goes to a temporary file, which is synced and renamed; then the folder is synced.
    Raises `StoreError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART_SUFFIX}")
    with raising_store_errors("write", path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces `path` at the end unless writing failed.

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


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically. Raises `StoreError`."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    write_atomically(path, text.encode())


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; None if there is no file. Raises `StoreError`."""
    with raising_store_errors("read", path):
        try:
            text = path.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return json.loads(text)
    except ValueError:
        raise StoreError("read", path, "it is not JSON") from None


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk. Raises `OSError`."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> dict[str, int]:
    """Sync all files under a folder to disk; returns their sizes in bytes by relative path.

    Raises `StoreError`.
    """
    sizes: dict[str, int] = {}
    with raising_store_errors("sync", folder):
        for directory, _, names in os.walk(folder, onerror=_raise):
            for name in sorted(names):
                path = Path(directory, name)
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                    sizes[str(path.relative_to(folder))] = os.fstat(handle).st_size
                finally:
                    os.close(handle)
            sync_folder(Path(directory))
    return sizes


def _raise(error: OSError) -> None:
    raise error


def _write_all(handle: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view) :]


# Lines.


@dataclass(frozen=True)
class JsonLines:
    """Content of a file of JSON lines."""

    rows: tuple[JsonObject, ...]
    damaged: int
    """Number of lines that are no JSON object: cut off by a crash, or damaged on disk."""


def read_rows(path: Path) -> JsonLines:
    """Return all rows of a file of JSON lines, which another process may append to.

    A file that does not exist has no rows. Raises `StoreError`.
    """
    with raising_store_errors("read", path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return JsonLines((), 0)
    rows: list[JsonObject] = []
    damaged = 0
    for line in content.splitlines():
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            damaged += 1
        else:
            rows.append(row)
    return JsonLines(tuple(rows), damaged)


def _row(line: bytes) -> JsonObject | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def numbers(row: JsonObject) -> JsonObject:
    """Return a row of metrics with `NaN` and infinities, which are text in the file, as floats."""
    return {
        name: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in row.items()
    }


def _line(row: Mapping[str, object]) -> bytes:
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _finite(value: object) -> object:
    """Return a value with `NaN`, `Infinity` and `-Infinity` as text.

    JSON has no such numbers, and readers in other languages refuse a file that has them.
    """
    match value:
        case float() if not math.isfinite(value):
            return json.dumps(value)
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


class RowWriter:
    """Appends rows to a file of JSON lines; one process at a time.

    A row is in the file as a whole or not at all, unless the machine itself stops. What a crash cut
    off is removed when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with raising_store_errors("write", path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                self._size = _end_of_lines(self._handle)
                os.ftruncate(self._handle, self._size)
            except BaseException:
                os.close(self._handle)
                raise

    def append(self, row: Mapping[str, object]) -> None:
        """Append a row. Raises `StoreError`; then the file is as it was before."""
        line = _line(row)
        with raising_store_errors("write", self.path):
            try:
                _write_all(self._handle, line)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._handle, self._size)
                raise
        self._size += len(line)

    def sync(self) -> None:
        """Sync the appended rows to disk, before a checkpoint, which must not be ahead of them.

        Raises `StoreError`.
        """
        with raising_store_errors("sync", self.path):
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
    """Return the number of bytes up to and including the last line end."""
    size = os.fstat(handle).st_size
    block = 1 << 16
    while size > 0:
        start = max(size - block, 0)
        line_end = os.pread(handle, size - start, start).rfind(b"\n")
        if line_end >= 0:
            return start + line_end + 1
        size = start
    return 0


def keep_rows(path: Path, keep: Callable[[JsonObject], bool]) -> int:
    """Keep only the complete rows that `keep` accepts; returns how many were removed.

    The file is rewritten atomically. Raises `StoreError`.
    """
    rows = read_rows(path)
    remaining = [row for row in rows.rows if keep(row)]
    removed = len(rows.rows) - len(remaining) + rows.damaged
    if removed:
        write_atomically(path, b"".join(_line(row) for row in remaining))
    return removed
