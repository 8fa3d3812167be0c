"""The store: results of stages by fingerprint, and an index of runs.

    .tune/
      stages/<fingerprint>/
        stage.json      the resolved stage and the components of its fingerprint
        metrics.jsonl   one line for each report; every line has `step`
        samples.jsonl   completions to read; every line has `step`
        checkpoints/<step>/
        log
        lock            held by the process that works here
        done            written last: what was finished, when, and the size of every file
      runs/<time>.json  when, which spec, the plan, how it ended
      contents.json     digests of files that specs name

A stage is done if and only if `done` is there and every file that it lists has the size that it
says. Nothing is ever changed in a folder without its lock.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tunelang.runtime.store.atomic_files import (
    PART_SUFFIX,
    JsonLines,
    JsonObject,
    RowWriter,
    StoreError,
    keep_rows,
    numbers,
    raising_store_errors,
    read_json,
    read_rows,
    sync_folder,
    sync_tree,
    write_atomically,
    write_json,
)
from tunelang.runtime.store.locks import Holder, lock

_UNLISTED = ("log", "lock", "done")
"""Files that may change after a stage is done."""


def root(spec: Path, folder: Path | None, environ: Mapping[str, str]) -> Path:
    """Return the root of the store: `folder`, else `TUNE_STORE`, else `.tune` next to the spec."""
    named = environ.get("TUNE_STORE")
    path = folder or (Path(named).expanduser() if named else spec.parent / ".tune")
    return path.absolute()  # Orbax writes to absolute paths only


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage. Methods that change it need its lock, from `Store.hold`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, which are folders named by step."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """Path of the stage's log."""
        return self.path / "log"

    def stage(self) -> JsonObject | None:
        """Return the content of `stage.json`; None if no work began. Raises `StoreError`."""
        content = read_json(self.path / "stage.json")
        return content if isinstance(content, dict) else None

    def done(self) -> JsonObject | None:
        """Return the content of `done` if the files it lists exist. Raises `StoreError`."""
        path = self.path / "done"
        manifest = read_json(path)
        if manifest is None:
            return None
        with raising_store_errors("read", path):
            try:
                complete = all(
                    (self.path / name).stat().st_size == size
                    for name, size in manifest["files"].items()
                )
            except (FileNotFoundError, NotADirectoryError):
                return None
        return dict(manifest) if complete else None

    def steps(self) -> tuple[int, ...]:
        """Return the steps of the complete checkpoints, ascending. Raises `StoreError`.

        A checkpoint is written under another name and renamed when it is complete.
        """
        with raising_store_errors("read", self.checkpoints):
            try:
                entries = list(os.scandir(self.checkpoints))
            except FileNotFoundError:
                return ()
            return tuple(sorted(int(e.name) for e in entries if e.name.isdecimal() and e.is_dir()))

    def metrics(self) -> JsonLines:
        """Return the metrics so far, with non-finite numbers as floats. Raises `StoreError`."""
        content = read_rows(self.path / "metrics.jsonl")
        return JsonLines(tuple(numbers(row) for row in content.rows), content.damaged)

    def samples(self) -> JsonLines:
        """Return the completions so far. Raises `StoreError`."""
        return read_rows(self.path / "samples.jsonl")

    # Under the lock.

    def begin(self, stage: JsonObject) -> None:
        """Start from nothing: remove what an earlier attempt left, and write `stage.json`.

        Raises `StoreError`.
        """
        self._remove("done")
        with raising_store_errors("read", self.path):
            names = sorted(entry.name for entry in os.scandir(self.path))
        for name in names:
            if name != "lock":
                self._remove(name)
        write_json(self.path / "stage.json", stage)
        with raising_store_errors("make", self.checkpoints):
            self.checkpoints.mkdir()
            sync_folder(self.path)

    def resume(self, step: int) -> None:
        """Go back to the checkpoint of a step: later reports are removed, so that no step is
        reported twice. Raises `StoreError`.
        """
        steps = self.steps()
        if step not in steps:
            raise StoreError("resume", self.checkpoints / str(step), "there is no such checkpoint")
        self._remove("done")
        for later in steps:
            if later > step:
                self._remove(f"checkpoints/{later}")
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_rows(self.path / name, lambda row: _step(row) <= step)

    def forget_evals(self, step: int) -> None:
        """Remove what evals reported at a step, which will run again. Raises `StoreError`."""

        def other(row: JsonObject) -> bool:
            return (
                row.get("step") != step or "loss" in row or ("reward" in row and "eval" not in row)
            )

        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_rows(self.path / name, other)

    def remove_checkpoint(self, step: int) -> None:
        """Remove a checkpoint. Raises `StoreError`."""
        self._remove(f"checkpoints/{step}")

    def metrics_writer(self) -> RowWriter:
        """Open the metrics to append rows `{"step": ..., ...}`. Raises `StoreError`."""
        return RowWriter(self.path / "metrics.jsonl")

    def samples_writer(self) -> RowWriter:
        """Open the completions to append rows `{"step": ..., ...}`. Raises `StoreError`."""
        return RowWriter(self.path / "samples.jsonl")

    def finish(self, summary: JsonObject) -> None:
        """Mark the stage as done: sync all files, then write `done`.

        `summary` is stored in it, such as the final metrics. Raises `StoreError`.
        """
        sizes = sync_tree(self.path)
        files = {
            name: size
            for name, size in sizes.items()
            if name not in _UNLISTED and not name.endswith(PART_SUFFIX)
        }
        write_json(self.path / "done", {"time": time.time(), "summary": summary, "files": files})

    def _remove(self, name: str) -> None:
        """Remove a file or folder; it is renamed first, so no part of it counts as complete."""
        path = self.path / name
        away = self.path / f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}"
        with raising_store_errors("remove", path):
            try:
                path.rename(away)
            except FileNotFoundError:
                return
            sync_folder(path.parent)
            if away.is_dir() and not away.is_symlink():
                shutil.rmtree(away)
            else:
                away.unlink()


@dataclass(frozen=True)
class Store:
    """A store; one that does not exist reads as empty, and reading does not create it."""

    root: Path
    _plans: dict[str, dict[str, dict[str, JsonObject]]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Run -> stage -> node -> fingerprint, as far as runs were read."""

    # The protocol `tunelang.compiler.stage_states.StoreView`, for planning.

    def finished(self, digest: str) -> bool:
        """Return whether a stage is done and all of its files exist. Raises `StoreError`."""
        return self.folder(digest).done() is not None

    def resumable(self, digest: str) -> int | None:
        """Return the step of the last complete checkpoint. Raises `StoreError`."""
        folder = self.folder(digest)
        steps = folder.steps()
        return steps[-1] if steps and folder.stage() is not None else None

    def begun(self, digest: str) -> bool:
        """Return whether work on a stage began. Raises `StoreError`."""
        return self.folder(digest).stage() is not None

    def earlier(self, stage: str) -> dict[str, JsonObject]:
        """Return the fingerprints of a stage's nodes by id, in the last run that had the stage.

        Raises `StoreError`.
        """
        for name in self._run_names():
            fingerprints = self._fingerprints(name).get(stage)
            if fingerprints:
                return fingerprints
        return {}

    # Stages.

    @property
    def contents(self) -> Path:
        """Path of the cache of digests of the files that specs name."""
        return self.root / "contents.json"

    def folder(self, digest: str) -> StageFolder:
        """Return the folder of a stage, for reading."""
        return StageFolder(self.root / "stages" / digest)

    @contextmanager
    def hold(
        self,
        digest: str,
        wait: float | None = 0.0,
        on_wait: Callable[[Holder | None], None] | None = None,
    ) -> Iterator[StageFolder]:
        """Lock the folder of a stage, and yield it for writing; it is created if it does not exist.

        Waits for another process as `locks.lock` does. After waiting, callers have to check again
        whether the stage is done. Raises `Locked` and other `StoreError`s.
        """
        folder = self.folder(digest)
        self._make(folder.path)
        with lock(folder.path / "lock", wait, on_wait):
            yield folder

    def _make(self, folder: Path) -> None:
        ignore = self.root / ".gitignore"
        with raising_store_errors("make", folder):
            folder.mkdir(parents=True, exist_ok=True)
            fresh = not ignore.exists()
        if fresh:  # the store is no part of the user's repository
            write_atomically(ignore, b"*\n")

    # Runs.

    def begin_run(self, spec: str, command: tuple[str, ...], plan: JsonObject) -> str:
        """Enter a run with its plan as JSON; returns its id. Raises `StoreError`."""
        now = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
        name = f"{stamp}.{int(now % 1 * 1e6):06}Z-{secrets.token_hex(2)}"
        self._make(self.root / "runs")
        entry = {
            "started": now,
            "spec": spec,
            "command": list(command),
            "stages": {s["node"]: s["fingerprint"]["digest"] for s in plan["stages"]},
            "ended": None,
            "outcome": None,
            "plan": plan,
        }
        write_json(self._run_path(name), entry)
        return name

    def end_run(self, run: str, outcome: str) -> None:
        """Enter how a run ended. Raises `StoreError`."""
        entry = self._entry(run)
        write_json(self._run_path(run), {**entry, "ended": time.time(), "outcome": outcome})

    def plan(self, run: str) -> JsonObject:
        """Return the plan of a run, as JSON. Raises `StoreError`."""
        plan: JsonObject = self._entry(run)["plan"]
        return plan

    def _run_path(self, run: str) -> Path:
        return self.root / "runs" / f"{run}.json"

    def _run_names(self) -> list[str]:
        folder = self.root / "runs"
        with raising_store_errors("read", folder):
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                return []
        entries = (name for name in names if name.endswith(".json") and not name.startswith("."))
        return sorted((name.removesuffix(".json") for name in entries), reverse=True)

    def _entry(self, run: str) -> JsonObject:
        path = self._run_path(run)
        entry = read_json(path)
        if not isinstance(entry, dict):
            raise StoreError("read", path, "there is no such run")
        return entry

    def _fingerprints(self, run: str) -> dict[str, dict[str, JsonObject]]:
        if run not in self._plans:
            by_stage: dict[str, dict[str, JsonObject]] = {}
            for stage in self.plan(run)["stages"]:
                by_stage.setdefault(stage["stage"], {})[stage["node"]] = stage["fingerprint"]
            self._plans[run] = by_stage
        return self._plans[run]


def _step(row: JsonObject) -> float:
    """Return the step of a row; infinity for a row without one."""
    step = row.get("step")
    return step if isinstance(step, int) else float("inf")
