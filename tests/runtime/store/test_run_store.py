"""The store: atomic files, locks between processes, and when a stage counts as done."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunelang.runtime.store import atomic_files
from tunelang.runtime.store.atomic_files import (
    JsonObject,
    RowWriter,
    StoreError,
    keep_rows,
    numbers,
    read_rows,
)
from tunelang.runtime.store.locks import Locked, lock, read_holder
from tunelang.runtime.store.run_store import Store, root

# Files.


def test_full_disk_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    atomic_files.write_json(path, {"a": 1})

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="no space left on device") as caught:
            atomic_files.write_json(path, {"a": 2})
    assert caught.value.path == path
    assert atomic_files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["file.json"]


def test_row_that_does_not_fit_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RowWriter(tmp_path / "rows") as rows:
        rows.append({"step": 1})
        write, calls = os.write, [0]

        def half(handle: int, content: bytes) -> int:
            calls[0] += 1
            if calls[0] > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, content[:5])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(StoreError, match="no space left"):
                rows.append({"step": 2})
        rows.append({"step": 3})
    assert read_rows(tmp_path / "rows").rows == ({"step": 1}, {"step": 3})


def test_non_finite_numbers_are_read_back(tmp_path: Path) -> None:
    with RowWriter(tmp_path / "rows") as rows:
        rows.append({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    text = (tmp_path / "rows").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (row,) = map(numbers, read_rows(tmp_path / "rows").rows)
    assert math.isnan(row.pop("a"))
    assert row == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1}


def test_damaged_lines_are_counted_and_cut_lines_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b'{"step":1}\n\xff\xfe\n[1]\n\n{"step":2}\n{"ste')
    content = read_rows(path)
    assert content.rows == ({"step": 1}, {"step": 2})
    assert content.damaged == 3
    with RowWriter(path) as rows:
        rows.append({"step": 3})
    assert read_rows(path).rows[-1] == {"step": 3}
    assert keep_rows(path, lambda row: row["step"] < 3) == 3
    assert path.read_text() == '{"step":1}\n{"step":2}\n'


def test_files_are_complete_after_a_kill(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from tunelang.runtime.store.atomic_files import RowWriter, write_json
folder = Path(sys.argv[1])
rows = RowWriter(folder / "rows")
print("ready", flush=True)
for n in range(10**9):
    write_json(folder / "value.json", {"n": n, "long": "x" * 5000})
    rows.append({"step": n, "long": "x" * 500})
"""
    choose = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.02 + choose.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(atomic_files.read_json(tmp_path / "value.json")["long"]) == 5000
        assert read_rows(tmp_path / "rows").damaged == 0


# Locks.

HOLD = """
import sys, time
from pathlib import Path
from tunelang.runtime.store.locks import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_refuses_waits_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(Locked, match=f"held by process {process.pid} on"), lock(path):
        pass
    holders: list[object] = []

    def record_and_kill(holder: object) -> None:
        holders.append(holder)
        process.kill()

    with lock(path, wait=30, on_wait=record_and_kill):
        assert len(holders) == 1
        last_holder = read_holder(path)
        assert last_holder is not None
        assert last_holder.pid == os.getpid()
    process.communicate()


def test_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with lock(path):
        child = subprocess.Popen(["sleep", "30"])
    with lock(path):
        pass
    child.kill()
    child.wait()


# Stages and runs.

DIGEST = "0123456789abcdef" * 2


def begin_stage(store: Store) -> None:
    with store.hold(DIGEST) as folder:
        folder.begin({"kind": "sft"})
        for step in (2, 4, 6):
            (folder.checkpoints / str(step)).mkdir()
            with folder.metrics_writer() as rows:
                rows.append({"step": step, "loss": 1.0})
        with folder.metrics_writer() as rows:
            rows.append({"step": 6, "accuracy.score": 0.5})


def test_reading_a_missing_store_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert not store.finished(DIGEST)
    assert store.resumable(DIGEST) is None
    assert store.earlier("a") == {}
    assert store.folder(DIGEST).metrics().rows == ()
    assert not (tmp_path / "store").exists()


def test_stage_is_done_only_with_all_of_its_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begin_stage(store)
    assert store.begun(DIGEST)
    assert store.resumable(DIGEST) == 6
    assert not store.finished(DIGEST)
    with store.hold(DIGEST) as folder:
        (folder.checkpoints / "6" / "data").write_text("weights")
        folder.finish({"steps": 6})
    assert store.finished(DIGEST)
    assert (tmp_path / ".gitignore").read_text() == "*\n"
    (store.folder(DIGEST).checkpoints / "6" / "data").write_text("weigh")
    assert not store.finished(DIGEST)
    (store.folder(DIGEST).checkpoints / "6" / "data").unlink()
    assert not store.finished(DIGEST)


def test_resuming_removes_later_reports(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begin_stage(store)
    with store.hold(DIGEST) as folder:
        folder.forget_evals(6)
        assert [row["step"] for row in folder.metrics().rows] == [2, 4, 6]
        folder.resume(4)
        assert folder.steps() == (2, 4)
        assert [row["step"] for row in folder.metrics().rows] == [2, 4]
        with pytest.raises(StoreError, match="there is no such checkpoint"):
            folder.resume(5)
        folder.begin({"kind": "sft"})
        assert folder.steps() == ()
        assert folder.metrics().rows == ()


def test_folder_of_another_process_is_locked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.hold(DIGEST), pytest.raises(Locked), store.hold(DIGEST):
        pass


def entry(node: str, digest: str) -> JsonObject:
    return {"node": node, "stage": node.split("[")[0], "fingerprint": {"digest": digest}}


def test_earlier_fingerprints_are_those_of_the_last_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.begin_run("a.tune", ("run",), {"stages": [entry("s[x=1]", "1"), entry("t", "2")]})
    store.end_run(first, "done")
    store.begin_run("a.tune", ("run",), {"stages": [entry("t", "3")]})
    entries = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").iterdir())]
    assert [run["outcome"] for run in entries] == ["done", None]
    store = Store(tmp_path)
    assert store.earlier("s") == {"s[x=1]": {"digest": "1"}}
    assert store.earlier("t") == {"t": {"digest": "3"}}
    assert store.plan(first)["stages"][0]["node"] == "s[x=1]"
    (tmp_path / "runs" / f"{first}.json").write_text("{")
    with pytest.raises(StoreError, match="it is not JSON"):
        store.plan(first)


def test_store_is_next_to_the_spec_by_default(tmp_path: Path) -> None:
    spec = tmp_path / "a.tune"
    assert root(spec, None, {}) == tmp_path / ".tune"
    assert root(spec, None, {"TUNE_STORE": "/elsewhere"}) == Path("/elsewhere")
    assert root(spec, tmp_path / "given", {"TUNE_STORE": "/elsewhere"}) == tmp_path / "given"
