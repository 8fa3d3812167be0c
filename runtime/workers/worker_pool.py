"""Calls into functions that may raise, hang or crash, each in a process that can be ended.

A thread cannot be stopped, and a regular expression or a parser in C does not even let other
threads run; so functions that may take for ever run in processes of their own, which are
killed with all their children at the time-out and replaced at the next call.

`pebble.ProcessPool` kills at a time-out too, but the worker alone and not what it started; and its
workers are processes of `multiprocessing`, which fork the trainer or import its main module, where
these are bare interpreters.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.runtime.workers.worker_process import Arguments, Parameters, select_arguments

_LOADING_SECONDS = 120.0  # importing torch from a cold network disk takes a minute
_SCRIPT = str(Path(__file__).with_name("worker_process.py"))

Target = tuple[str | Arguments, ...]
"""A loader's name in `worker_process.LOADERS`, and its arguments."""
Result = float | list[float] | str
"""The value of a call, or the reason why there is none."""


@dataclass(eq=False)
class LoadError(TuneError):
    """A function, `target`, could not be loaded; `why` is a sentence or a traceback."""

    code = "reward-fails"
    target: Target
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.reward_not_loaded(self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="reward")

    def __str__(self) -> str:
        return f"{self.target}: {self.why}"


class _Worker:
    """One process and the connection to it."""

    def __init__(self, target: Target) -> None:
        parent_socket, child_socket = socket.socketpair()
        with child_socket:
            self.process = subprocess.Popen(
                [sys.executable, "-P", _SCRIPT, str(child_socket.fileno())],
                pass_fds=[child_socket.fileno()],
                # The trainer uses the accelerators: JAX in a reward would claim them.
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                stdin=subprocess.DEVNULL,
                # Its own session: a time-out also ends what the function started, and Ctrl-C
                # reaches the trainer alone, which saves before it closes its workers.
                start_new_session=True,
                # What it prints must not break the display of the run.
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
            )
        self.connection = Connection(parent_socket.detach())
        with contextlib.suppress(OSError):  # it has ended already, which the reply reports
            self.connection.send(target)
        kind, loaded = self._reply(_LOADING_SECONDS)
        if kind != "loaded":
            self.end()
            raise LoadError(target, loaded)
        self.parameters: Parameters = loaded

    def call(self, fields: Arguments, timeout: float) -> tuple[Result, bool]:
        """Return the result, and whether the worker is fit for another call."""
        for name, required in self.parameters[0].items():
            if required and name not in fields:
                return f"it asks for `{name}`, which is not a field of the row", True
        try:
            self.connection.send(select_arguments(self.parameters, fields))
        except (OSError, EOFError):
            return f"the process ended{self._exit()}", False
        except Exception as error:  # whatever pickling a field raises
            return f"a field cannot be handed over: {error}", True
        kind, value = self._reply(timeout)
        return value, kind in ("value", "error")

    def kill(self) -> None:
        """Kill the process and its children; a thread that waits for its reply wakes up."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Kill the process and close the connection, which no other thread may be using."""
        self.kill()
        self.connection.close()

    def _reply(self, timeout: float) -> tuple[str, Any]:
        try:
            if self.connection.poll(timeout):
                reply: tuple[str, Any] = self.connection.recv()
                return reply
        except (OSError, EOFError):
            return "ended", f"the process ended{self._exit()}"
        return "late", f"it took more than {timeout:g} s"

    def _exit(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f" with code {self.process.wait(1.0)}"
        return ""


class Workers:
    """A pool of up to `count` processes that call one function, each started at its first use."""

    def __init__(self, target: Target, timeout: float, count: int) -> None:
        self._target = target
        self._timeout = timeout
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._all: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="reward")
        for _ in range(count):
            self._free.put(None)

    def start(self) -> Parameters:
        """Start one process now and return the parameters of the function.

        Raises `LoadError` where it cannot be loaded.
        """
        worker = self._free.get()
        try:
            worker = worker or self._new()
        finally:
            self._free.put(worker)
        return worker.parameters

    def call_all(self, rows: Sequence[Arguments]) -> list[Result]:
        """Call with each row of arguments, in order; never raises for what the function does."""
        return list(self._threads.map(self._call, rows))

    def close(self) -> None:
        """End all processes, those within a call too."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.end()

    def _call(self, fields: Arguments) -> Result:
        if self._closed:
            return "the pool was closed"
        worker = self._free.get()
        try:
            worker = worker or self._new()
            result, fit = worker.call(fields, self._timeout)
            if not fit:
                self._drop(worker)
                worker = None
        except LoadError as error:
            return f"it could not be loaded: {error.why}"
        except OSError as error:
            return f"no process could be started: {error}"
        finally:
            self._free.put(worker)
        return result

    def _new(self) -> _Worker:
        worker = _Worker(self._target)
        with self._lock:
            if not self._closed:
                self._all.add(worker)
                return worker
        worker.end()
        raise LoadError(self._target, "the pool was closed")

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.end()


def _has_descriptor(stream: TextIO) -> bool:
    try:
        return int(stream.fileno()) >= 0
    except (AttributeError, OSError, ValueError):
        return False
