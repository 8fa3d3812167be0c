"""Errors of specs that fail when planned or run, against the snapshots of `tests/ui/run`."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.test_ui import UI, assert_output
from tunelang.runtime.cli import app

RUN = UI / "run"
CASES = sorted(RUN.glob("*.tune"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_output_matches_the_snapshot(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bless: bool
) -> None:
    shutil.copytree(RUN / "files", tmp_path, dirs_exist_ok=True)
    shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TUNE_STORE", raising=False)
    stderr = ""
    for command in re.findall(r"^# \$ (.*)$", path.read_text("utf-8"), re.MULTILINE):
        program, *arguments = command.split()
        if program == "tune":
            result = CliRunner().invoke(app, arguments)
            stderr = re.sub(
                r"\b[0-9a-f]{32}\b", "DIGEST", result.stderr.replace(f"{tmp_path}/", "")
            )
        else:
            subprocess.run(command, shell=True, check=True)
    start = stderr.find("error[")
    assert start >= 0, stderr
    assert_output(
        path.with_suffix(".stderr"), f"{stderr[start:]}exit code {result.exit_code}\n", bless
    )
