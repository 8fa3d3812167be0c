"""Loads functions of the user: those compiled into programs (losses, advantages, schedules), and
those that make rows of data.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import Function, Node, RewardExpression, attributes
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.data import PythonData
from tunelang.runtime.store.atomic_files import replacing
from tunelang.runtime.workers import worker_process

_Node = TypeVar("_Node", bound=Node)


@dataclass(eq=False)
class UserFunctionError(TuneError):
    """A function at `reference` cannot be loaded, raises, or returns the wrong shape; `why`."""

    code = "python-function"
    reference: str
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.python_function(self.reference, self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(quoted=self.reference)


@dataclass(frozen=True)
class UserFunction:
    """A loaded function, which replaces the `Python` of a stage's attribute."""

    reference: str
    function: worker_process.Function

    def __call__(self, shape: tuple[int, ...], **arguments: object) -> Any:
        """Call the function with those of `arguments` that its parameters name.

        Raises `UserFunctionError` if the function raises or its result has another shape.
        """
        try:
            value = self.function(
                **worker_process.select_arguments(
                    worker_process.parameters(self.function), arguments
                )
            )
        except Exception as error:
            raise UserFunctionError(self.reference, worker_process.describe_error(error)) from error
        actual = jnp.shape(value)
        if actual != shape:
            raise UserFunctionError(self.reference, f"it returned the shape {actual}, not {shape}")
        return value


def load_user_functions(node: _Node, folder: Path) -> _Node:
    """Return a stage whose functions are loaded; their paths are relative to `folder`.

    Rewards are not loaded: they run in processes of their own. Raises `UserFunctionError`.
    """
    changed: dict[str, object] = {}
    attributes_by_name = attributes(type(node))
    for name, value in node:
        attribute = attributes_by_name.get(type(node).model_fields[name].alias or name)
        if attribute is None:
            continue
        if isinstance(attribute.type, types.Code) and isinstance(value, Python):
            changed[name] = _load(value.reference, folder)
        elif isinstance(value, Function) and not isinstance(value, RewardExpression):
            inner = load_user_functions(value, folder)
            if inner is not value:
                changed[name] = inner
    return node.model_copy(update=changed) if changed else node


def make_rows(kind: PythonData, folder: Path, cache: Path) -> Path:
    """Write the rows that a function makes to a file, one JSON object a line, and return its path.

    The file is cached by the content of the function's file and the settings. Raises
    `UserFunctionError` and `OSError`.
    """
    source = _path(kind.function, folder)
    settings = {} if kind.settings is None else dict(kind.settings.values)
    key = json.dumps([kind.function.rpartition(":")[2], settings], sort_keys=True).encode()
    digest = hashlib.blake2b(source.read_bytes() + key, digest_size=16).hexdigest()
    path = cache / f"rows-{digest}.jsonl"
    if not path.exists():
        rows = _load(kind.function, folder).function
        with replacing(path) as temporary, temporary.open("w") as file:
            try:
                for row in rows(**settings):
                    if not isinstance(row, dict):
                        raise TypeError(f"a row has to be a dict, and one is {row!r:.80}")
                    file.write(json.dumps(row, default=_plain) + "\n")
            except Exception as error:
                raise UserFunctionError(
                    kind.function, worker_process.describe_error(error)
                ) from error
    return path


def _plain(value: object) -> object:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a field cannot be written as JSON: {value!r:.80}")


def _path(reference: str, folder: Path) -> Path:
    return (folder / Path(reference.rpartition(":")[0]).expanduser()).resolve()


def _load(reference: str, folder: Path) -> UserFunction:
    path, name = str(_path(reference, folder)), reference.rpartition(":")[2]
    try:
        return UserFunction(reference, worker_process.load_function(path, name))
    except Exception as error:
        raise UserFunctionError(reference, worker_process.describe_error(error)) from error
