"""Locks between processes: a file lock that ends with its process, and says who holds it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tunelang.runtime.store.atomic_files import StoreError, raising_store_errors

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    since: float
    """Seconds since 1970."""
    command: str

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since} (`{self.command}`)"


class Locked(StoreError):
    """Another process holds a lock; `holder` is None if it left no record of itself."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        super().__init__("lock", path, f"held by {holder or 'another process'}")
        self.holder = holder


@contextmanager
def lock(
    path: Path,
    wait: float | None = 0.0,
    on_wait: Callable[[Holder | None], None] | None = None,
) -> Iterator[None]:
    """Hold the lock file `path`; the folder must exist.

    Waits up to `wait` seconds for a lock that is held elsewhere, for ever with None; `on_wait` is
    called once with the holder when waiting begins. Raises `Locked`, and `StoreError` if the file
    cannot be opened. The file stays and names its last holder while it is locked.
    """
    file_lock = FileLock(path, mode=0o666, poll_interval=_POLL_SECONDS, fallback_to_soft=False)
    process = os.getpid()
    _acquire(file_lock, path, wait, on_wait)
    try:
        with raising_store_errors("lock", path):
            _write_holder(path)
        yield
    finally:
        if os.getpid() == process:  # a forked child has lost the lock already
            with suppress(OSError):
                os.truncate(path, 0)
            file_lock.release()


def _acquire(
    file_lock: FileLock,
    path: Path,
    wait: float | None,
    on_wait: Callable[[Holder | None], None] | None,
) -> None:
    with raising_store_errors("lock", path):
        with suppress(Timeout):
            file_lock.acquire(blocking=False)
            return
        if wait == 0:
            raise Locked(path, read_holder(path))
        if on_wait is not None:
            on_wait(read_holder(path))
        try:
            file_lock.acquire(timeout=-1 if wait is None else wait)
        except Timeout:
            raise Locked(path, read_holder(path)) from None


def _write_holder(path: Path) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    holder = Holder(os.getpid(), socket.gethostname(), time.time(), command)
    path.write_text(json.dumps(asdict(holder)), "utf-8")


def read_holder(path: Path) -> Holder | None:
    """Return the holder of a lock file; None if it left no record or it cannot be read."""
    try:
        return Holder(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
