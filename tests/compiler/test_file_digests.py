"""Digests of files and folders, and their cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.workspace import safetensors, write
from tunelang.compiler import file_digests
from tunelang.compiler.file_digests import ContentError, Contents, digest

OLD = 10**18
"""A time of change long ago, in nanoseconds."""


def aged(path: Path, at: int = OLD) -> Path:
    os.utime(path, ns=(at, at))
    return path


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_digest_depends_on_where_parts_end(one: list[bytes], two: list[bytes]) -> None:
    assert (digest(*one) == digest(*two)) == (one == two)


def test_cache_is_saved_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = aged(write(tmp_path / "a", "text")), tmp_path / "deep/cache.json"
    first = Contents.load(cache)
    found = first.file(path)
    first.save()
    monkeypatch.setattr(file_digests, "_whole", lambda _: pytest.fail("read again"))
    assert Contents.load(cache).file(path) == found


def test_changed_file_has_another_digest(tmp_path: Path) -> None:
    contents = Contents()
    path = aged(write(tmp_path / "a", "text"))
    found = contents.file(path)
    aged(write(path, "texT"), OLD + 1)
    assert contents.file(path) != found
    aged(write(path, "longer"))
    assert contents.file(path) != found


def test_a_file_changed_just_now_is_not_cached(tmp_path: Path) -> None:
    """It may change again within one tick of the clock that stamps files."""
    contents = Contents()
    path = write(tmp_path / "a", "text")
    found, stamp = contents.file(path), path.stat().st_mtime_ns
    aged(write(path, "texT"), stamp)
    assert contents.file(path) != found


@pytest.mark.parametrize("held", ["", "[]", "{", '{"format": 1}', '{"format": 1, "files": [1]}'])
def test_a_damaged_cache_is_empty(tmp_path: Path, held: str) -> None:
    cache = write(tmp_path / "cache.json", held)
    assert Contents.load(cache).known == {}


def test_failed_save_leaves_no_temporary_file(tmp_path: Path) -> None:
    contents = Contents.load(write(tmp_path / "file", "") / "cache.json")
    contents.file(aged(write(tmp_path / "a", "text")))
    contents.save()
    assert not list(tmp_path.glob(".*"))


def test_cache_contains_the_digests_of_its_files(tmp_path: Path) -> None:
    contents = Contents.load(tmp_path / "cache.json")
    path = aged(write(tmp_path / "a", "text"))
    held = contents.file(path)
    contents.save()
    assert json.loads((tmp_path / "cache.json").read_text())["files"] == {str(path): [4, OLD, held]}


def test_missing_and_unreadable_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="no such file"):
        Contents().file(tmp_path / "nothing")
    with pytest.raises(ContentError, match="no such file"):
        Contents().model(tmp_path / "nothing")


def test_names_in_a_model_folder_count(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write(folder / "config.json", "{}")
    before = Contents().model(folder)
    (folder / "config.json").rename(folder / "other.json")
    assert Contents().model(folder) != before
    (folder / "other.json").rename(folder / "config.json")
    moved = folder.rename(tmp_path / "moved")
    assert Contents().model(moved) == before


def test_tokenizer_and_model_have_separate_digests(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", "{}")
    write(tmp_path / "model.safetensors", safetensors(10))
    before = Contents().tokenizer(tmp_path)
    write(tmp_path / "model.safetensors", safetensors(20))
    write(tmp_path / "config.json", "{}")
    assert Contents().tokenizer(tmp_path) == before
    write(tmp_path / "tokenizer.json", "[]")
    assert Contents().tokenizer(tmp_path) != before


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20 - 1))
def test_small_weights_are_read_completely(
    tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    whole = bytearray(safetensors(2**20))
    write(folder / "m.safetensors", bytes(whole))
    before = Contents().model(folder)
    whole[len(whole) - 2**20 + at] ^= 1
    write(folder / "m.safetensors", bytes(whole))
    assert Contents().model(folder) != before


def test_large_weights_are_sampled(tmp_path: Path) -> None:
    size = file_digests.SAMPLES * file_digests.SAMPLE_BYTES * 2
    path = write(tmp_path / "m.safetensors", safetensors(size))
    before = Contents().model(tmp_path)
    whole = bytearray(path.read_bytes())
    for at in (10, len(whole) - size, len(whole) - 1):
        changed = bytearray(whole)
        changed[at] ^= 1
        write(path, bytes(changed))
        assert Contents().model(tmp_path) != before
    trained = bytes(whole[: len(whole) - size]) + b"\1" * size
    write(path, trained)
    assert Contents().model(tmp_path) != before


@pytest.mark.parametrize("held", [b"", b"123", b"\xff" * 8, b"\xff" * 99])
def test_broken_weights_are_read_completely(tmp_path: Path, held: bytes) -> None:
    write(tmp_path / "m.safetensors", held)
    before = Contents().model(tmp_path)
    write(tmp_path / "m.safetensors", held + b"1")
    assert Contents().model(tmp_path) != before
