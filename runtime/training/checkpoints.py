"""Checkpoints of a stage, written by Orbax: parameters, and the rest that resuming needs.

A checkpoint is a folder named by its step, with `params` (the model: all that later stages read),
and, until the stage is done, `state` (the optimizer's) and `progress` (small facts as JSON). Orbax
writes under another name and renames when everything is there, so that a folder with the name of a
step is complete. Writing goes on behind training; the next save waits for it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText
from tunelang.dsl.messages import run_failures
from tunelang.runtime.models.parameters import Params, arrays_by_path, with_arrays
from tunelang.runtime.store.atomic_files import StoreError, read_json, write_json
from tunelang.runtime.store.run_store import StageFolder

_LONGEST = 160
"""Characters of a reason."""
_SIZES = "sizes.json"
_TEMPORARY = ".orbax-checkpoint-tmp"

Progress = dict[str, Any]
"""Small facts that resuming needs, as JSON."""


class CheckpointError(StoreError):
    """A checkpoint cannot be written, or cannot be read: damaged, or of another model."""

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.checkpoint_failed(self.action, self.path, self.reason, stage)


class Checkpoints:
    """Writes and reads the checkpoints of one stage, whose lock the caller holds."""

    def __init__(self, folder: StageFolder, keep: frozenset[int] = frozenset()) -> None:
        """Open the checkpoints of a folder; those of the steps in `keep` are never removed."""
        _silence_orbax()
        self.folder = folder
        self.keep = keep
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        for unfinished in folder.checkpoints.glob(f"*{_TEMPORARY}*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def save(
        self, step: int, params: Params, state: PyTree = None, progress: Progress | None = None
    ) -> None:
        """Start to write a checkpoint; the caller may use up the arrays at once.

        Only the last two stay. Raises `CheckpointError`, also for the one before.
        """
        items = {"params": ocp.args.StandardSave(arrays_by_path(params))}
        if state is not None:
            items["state"] = ocp.args.StandardSave(arrays_by_path(state))
            items["progress"] = ocp.args.JsonSave(progress or {})
        self.wait()
        with _errors("write", self.folder.checkpoints / str(step)):
            self._writer.save(self.folder.checkpoints / str(step), ocp.args.Composite(**items))

    def wait(self) -> None:
        """Wait until everything saved is on disk. Raises `CheckpointError`."""
        with _errors("write", self.folder.checkpoints):
            self._writer.wait_until_finished()
            for step in self.folder.steps():
                _note_sizes(self.folder.checkpoints / str(step))
        self._remove(self.folder.steps()[:-2])

    def finish(self, step: int, params: Params) -> None:
        """Write the model of the last step, without the state, and remove other checkpoints.

        Raises `CheckpointError`.
        """
        self.wait()
        if step not in self.folder.steps():
            self.save(step, params)
            self.wait()
        self._remove(old for old in self.folder.steps() if old != step)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            if step not in self.keep:
                self.folder.remove_checkpoint(step)

    def restore(self, step: int, params: Params, state: PyTree) -> tuple[Params, PyTree, Progress]:
        """Return parameters, state and progress; the trees say shapes and places.

        Raises `CheckpointError`.
        """
        wanted = ocp.args.Composite(
            params=ocp.args.StandardRestore(_shaped(params)),
            state=ocp.args.StandardRestore(_shaped(state)),
            progress=ocp.args.JsonRestore(),
        )
        path = self.folder.checkpoints / str(step)
        with _errors("read", path):
            _check_sizes(path)
            stored = self._writer.restore(path, wanted)
            return (
                with_arrays(params, stored.params),
                with_arrays(state, stored.state),
                stored.progress,
            )

    def close(self) -> None:
        """End the thread that writes."""
        self._writer.close()


def load_params(path: Path, params: Params) -> Params:
    """Return the parameters of a checkpoint; the tree says shapes and places.

    Raises `CheckpointError`.
    """
    _silence_orbax()
    with (
        _errors("read", path),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader,
    ):
        _check_sizes(path)
        wanted = ocp.args.Composite(params=ocp.args.StandardRestore(_shaped(params)))
        return with_arrays(params, reader.restore(path, wanted).params)


def _silence_orbax() -> None:
    """Silence the log of what Orbax then raises, with the traces of all its threads."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _sizes(path: Path) -> dict[str, int]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != _SIZES)
    return {str(file.relative_to(path)): file.stat().st_size for file in files}


def _note_sizes(path: Path) -> None:
    """Write down the files of a complete checkpoint and their sizes, once."""
    if not (path / _SIZES).exists():
        write_json(path / _SIZES, _sizes(path))


def _check_sizes(path: Path) -> None:
    """Raise `CheckpointError` where a file of a checkpoint is cut off or gone."""
    noted, sizes = read_json(path / _SIZES) or {}, _sizes(path)
    for name, size in noted.items():
        if sizes.get(name) != size:
            damage = f"has {sizes[name]} of {size} bytes" if name in sizes else "is gone"
            raise CheckpointError("read", path, f"it is damaged: {name} {damage}")


def _shaped(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in arrays_by_path(tree).items()
    }


@contextmanager
def _errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise CheckpointError(action, path, (error.strerror or str(error)).lower()) from error
    except Exception as error:  # Orbax and tensorstore raise whatever went wrong below them.
        raise CheckpointError(action, path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """Return what tensorstore says, without the specification that it repeats."""
    first = str(error).strip().split("\n")[0].partition(" [tensorstore_spec")[0]
    innermost = first.rpartition('": ')[2] or type(error).__name__
    return innermost if len(innermost) <= _LONGEST else innermost[: _LONGEST - 1] + "…"
