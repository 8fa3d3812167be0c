"""The other side of `worker_pool.py`: a process that calls one function until it is closed.

Run as a script (`python -P worker_process.py DESCRIPTOR`), with nothing but the standard library: a
user's function starts in a bare interpreter, not in a copy of the trainer. Requests and replies are
pickled tuples; the first request says what to load.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import os
import queue
import re
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any


def load_function(path: str, name: str) -> Callable[..., Any]:
    """Load a function of a Python file, which can import its neighbours."""
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name_of_module = f"custom_{zlib.crc32(path.encode())}"
    spec = importlib.util.spec_from_file_location(name_of_module, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"`{path}` is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    try:
        return getattr(module, name)  # type: ignore[no-any-return]
    except AttributeError:
        file = os.path.basename(path)
        raise AttributeError(f"`{file}` has no function `{name}`") from None


def load_verifier(task: str, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Load the verifier of a reasoning-gym generator, as a function of `text` and the example."""
    # Heavy, and needed in the processes of one reward only.
    import reasoning_gym  # type: ignore[import-untyped]

    dataset = reasoning_gym.create_dataset(task, **settings)
    return lambda text, question, answer, metadata: dataset.score_answer(
        text, {"question": question, "answer": answer, "metadata": metadata}
    )


def load_pattern(pattern: str) -> Callable[..., Any]:
    """Compile an expression for the whole of `text`; an unlucky one may take for ever to match."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: compiled.fullmatch(text) is not None


LOADERS: dict[str, Callable[..., Callable[..., Any]]] = {
    "function": load_function,
    "verifier": load_verifier,
    "pattern": load_pattern,
}


Parameters = tuple[dict[str, bool], bool]
"""Named parameters with whether each is required, and whether others are taken as well."""


def parameters(function: Callable[..., Any]) -> Parameters:
    """Return what a function takes."""
    found = inspect.signature(function).parameters.values()
    others = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {each.name: each.default is each.empty for each in found if each.kind not in others}
    return named, any(each.kind is each.VAR_KEYWORD for each in found)


def select_arguments(parameters: Parameters, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return of what there is what a function takes."""
    named, others = parameters
    return {name: value for name, value in given.items() if others or name in named}


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> float | list[float]:
    """Call the function; raises `ValueError` where its value is no number, nor a list of some."""
    value = function(**arguments)
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    return [_number(each) for each in value] if isinstance(value, list) else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(f"it returned {_short(value)}, not a number")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_error(error: BaseException) -> str:
    """Say in a line what was raised."""
    # Messages of our own need no type; others say little without it.
    if type(error) is ValueError and str(error).startswith("it returned"):
        return str(error)
    name = type(error).__name__
    return f"{name}: {_short_line(str(error))}" if str(error) else name


def _short_line(text: str) -> str:
    first = text.strip().partition("\n")[0]
    return first if len(first) <= 200 else f"{first[:197]}..."


def serve(connection: Connection) -> None:
    """Load what the first request names, then answer requests until the connection closes."""
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        # A thread, so that this process and what it started end with the parent, within a call too.
        while True:
            try:
                requests.put(connection.recv())
            except (EOFError, OSError):
                os.killpg(0, signal.SIGKILL)
            except Exception as error:  # a field whose class this process cannot import
                requests.put(error)

    threading.Thread(target=receive, daemon=True).start()
    kind, *arguments = requests.get()
    try:
        function = LOADERS[kind](*arguments)
        connection.send(("loaded", parameters(function)))
    except BaseException as error:
        connection.send(("failed", describe_error(error)))
        return
    while True:
        request = requests.get()
        try:
            if isinstance(request, Exception):
                raise request
            reply: tuple[str, Any] = ("value", call(function, request))
        except BaseException as error:  # SystemExit too: `exit()` ends that call alone
            reply = ("error", describe_error(error))
        connection.send(reply)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
