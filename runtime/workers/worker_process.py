"""The script of a worker process, which calls one function until the connection closes.

Run as a script (`python -P worker_process.py DESCRIPTOR`), with nothing but the standard library: a
user's function starts in a bare interpreter, not in a copy of the trainer. Requests and replies are
pickled tuples; the first request is the target to load. `worker_pool.py` is the other end.
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

Function = Callable[..., Any]
"""A function of the user, a verifier, or a match: any arguments, any result."""
Arguments = Mapping[str, Any]
"""Name -> value, which has to be picklable."""


def load_function(path: str, name: str) -> Function:
    """Load a function of a Python file, which can import modules of its folder."""
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


def load_verifier(task: str, settings: Arguments) -> Function:
    """Load the verifier of a reasoning-gym generator, as a function of `text` and the example."""
    # A heavy import, which only the processes of one reward need.
    import reasoning_gym  # type: ignore[import-untyped]

    dataset = reasoning_gym.create_dataset(task, **settings)
    return lambda text, question, answer, metadata: dataset.score_answer(
        text, {"question": question, "answer": answer, "metadata": metadata}
    )


def load_pattern(pattern: str) -> Function:
    """Compile a regular expression to match all of `text`; a match may take for ever."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda text: compiled.fullmatch(text) is not None


LOADERS: dict[str, Callable[..., Function]] = {
    "function": load_function,
    "verifier": load_verifier,
    "pattern": load_pattern,
}


Parameters = tuple[dict[str, bool], bool]
"""Name of each parameter -> whether it is required; and whether it takes any other name."""


def parameters(function: Function) -> Parameters:
    """Return the parameters of a function."""
    signature = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {
        parameter.name: parameter.default is parameter.empty
        for parameter in signature
        if parameter.kind not in variadic
    }
    return required, any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature)


def select_arguments(parameters: Parameters, available: Arguments) -> Arguments:
    """Return those of the available arguments that a function has parameters for."""
    required, takes_any = parameters
    return {name: value for name, value in available.items() if takes_any or name in required}


def call(function: Function, arguments: Arguments) -> float | list[float]:
    """Call a function; raises `ValueError` where it returns neither a number nor a list of them."""
    value = function(**arguments)
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    return [_number(item) for item in value] if isinstance(value, list) else _number(value)


def _number(value: object) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(f"it returned {_short(value)}, not a number")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line."""
    # Messages of our own need no type; others say little without it.
    if type(error) is ValueError and str(error).startswith("it returned"):
        return str(error)
    name = type(error).__name__
    return f"{name}: {_short_line(str(error))}" if str(error) else name


def _short_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:197]}..."


def serve(connection: Connection) -> None:
    """Load the target of the first request, then answer requests until the connection closes."""
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
            reply: tuple[str, float | list[float] | str] = ("value", call(function, request))
        except BaseException as error:  # SystemExit too: `exit()` ends that call alone
            reply = ("error", describe_error(error))
        connection.send(reply)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
