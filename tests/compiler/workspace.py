"""A folder with everything that a spec of these tests names, and Programs made from text."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tunelang.compiler.file_digests import Contents
from tunelang.compiler.fingerprint import Fingerprint, fingerprints
from tunelang.compiler.graph import build
from tunelang.dsl.check import check
from tunelang.dsl.diagnostics import render
from tunelang.dsl.program import Program
from tunelang.dsl.syntax.source import Source


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def safetensors(size: int, fill: bytes = b"\0") -> bytes:
    """A safetensors file with one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + fill * size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(5)]
    write(tmp_path / "data/sums.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "data/spare.jsonl", '{"question": "2*3?", "answer": "#### 6"}\n')
    write(tmp_path / "data/table.csv", "question,answer\n1?,2\n")
    write(tmp_path / "data/prose.txt", "Some words.\n")
    write(tmp_path / "rewards/mine.py", "def score(completion):\n    return 1.0\n")
    write(tmp_path / "rewards/spare.py", "def score(completion):\n    return 0.5\n")
    write(tmp_path / "models/tiny/config.json", '{"model_type": "llama"}')
    write(tmp_path / "models/tiny/tokenizer.json", "{}")
    write(tmp_path / "models/tiny/model.safetensors", safetensors(100))
    write(tmp_path / "pieces.model", b"pieces")
    return tmp_path


def program(text: str, folder: Path) -> Program:
    checked = check(Source("test.tune", text, folder))
    assert checked.program is not None, render.text(checked.diagnostics)
    return checked.program


def prints(text: str, folder: Path) -> dict[str, Fingerprint]:
    """Node -> fingerprint, with nothing cached."""
    return fingerprints(build(program(text, folder)), Contents())


def digests(text: str, folder: Path) -> dict[str, str]:
    return {node: found.digest for node, found in prints(text, folder).items()}


PIPELINE = """\
run { seed = 17, name = "pipeline" }
model tiny : pretrained { path = "models/tiny" }
data sums : jsonl {
  path     = "data/sums.jsonl"
  prompt   = "{question}"
  response = "{answer}"
  target   = after("####", "{answer}")
}
data prosa : text { path = "data/prose.txt" }
data blend = 75% * sums.split(test = 20%).train + 25% * spare_sums
data spare_sums : jsonl { path = "data/spare.jsonl", prompt = "{question}", response = "{answer}", target = "{answer}" }
reward right = numeric_match("{completion}", "{target}")
reward own   = python("rewards/mine.py:score")
reward mixed = 0.5 * by_source(sums = right, spare_sums = own) + 0.5 * judged
reward judged : rubric { judge = local(warm), criteria = [criterion("Short")] }
eval accuracy : generate { data = sums.split(test = 20%).test, score = right }
stage warm : sft {
  from   = tiny
  data   = sums
  length = 2 epochs
  batch  = 4 sequences
  evals  = [accuracy]
}
stage tuned : grpo {
  from      = warm
  data      = blend
  reward    = mixed
  group     = 4
  batch     = 4 prompts
  length    = 10 steps
  optimizer = adamw(lr = each(1e-6, 3e-6))
  evals     = [accuracy]
  keep      = best(accuracy)
}
stage polished : sft {
  from   = tuned
  data   = sums
  length = 1 epoch
  batch  = 4 sequences
}
stage out : export { from = polished, path = "out/model" }
"""
