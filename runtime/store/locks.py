"""Locks between processes: a file lock that ends with its process, and says who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tunelang.runtime.store.atomic_files import StoreError, told

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
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {at} (`{self.command}`)"


class Locked(StoreError):
    """Another process holds a lock; `holder` is None where it did not come to say who it is."""

    def __init__(self, path: Path, holder: Holder | None) -> None:
        super().__init__("lock", path, f"held by {holder or 'another process'}")
        self.holder = holder


_held: set[int] = set()
"""Open lock files of this process."""


def _after_fork() -> None:
    """A child must not keep a lock of its parent: the lock would outlive the parent's death."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def lock(
    path: Path,
    wait: float | None = 0.0,
    on_wait: Callable[[Holder | None], None] | None = None,
) -> Iterator[None]:
    """Hold the lock file `path`; the folder must be there.

    Where another process (or this one) holds it: wait up to `wait` seconds, for ever with None;
    `on_wait` is called once with the holder when waiting begins. Raises `Locked`, and `StoreError`
    where the file cannot be opened. The file itself stays: to remove it would let two
    processes lock two files of one name.
    """
    with told("lock", path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        _take(handle, path, wait, on_wait)
        with told("lock", path):
            _sign(handle)
        try:
            yield
        finally:
            if handle in _held:
                with suppress(OSError):
                    os.ftruncate(handle, 0)
    finally:
        if handle in _held:  # not so in a child that was forked meanwhile
            _held.discard(handle)
            os.close(handle)


def _take(
    handle: int, path: Path, wait: float | None, on_wait: Callable[[Holder | None], None] | None
) -> None:
    end = None if wait is None else time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as error:
            raise StoreError("lock", path, (error.strerror or str(error)).lower()) from error
        else:
            return
        if end is not None and time.monotonic() >= end:
            raise Locked(path, holder(path))
        if on_wait is not None:
            on_wait(holder(path))
            on_wait = None
        time.sleep(_POLL_SECONDS)


def _sign(handle: int) -> None:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
    mine = Holder(os.getpid(), socket.gethostname(), time.time(), command)
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(mine)).encode(), 0)


def holder(path: Path) -> Holder | None:
    """Who signed a lock file last; None where nobody did or it cannot be read."""
    try:
        return Holder(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
