"""From a spec on disk to a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunelang.dsl.check import check_file
from tunelang.runtime.planning.prepare import Prepared, prepare
from tunelang.runtime.store.run_store import Store

KTO = """\
tokenizer letters : bytes {{}}
model m : transformer {{
  layers = 2, width = 32, heads = 2, tokenizer = letters, context = 64
}}
hardware pod : gpu {{ kind = "h200", devices = 8 }}
run {{ on = pod }}
data d : jsonl {{ path = "d.jsonl", prompt = "{{q}}", {roles} }}
stage s : kto {{ from = m, data = d, batch = 8 sequences, length = 10 steps }}
"""


def plan(tmp_path: Path, text: str) -> Prepared:
    (tmp_path / "spec.tune").write_text(text)
    (tmp_path / "d.jsonl").write_text('{"q": "1+1=", "a": "2", "b": "3", "good": 1}\n')
    program = check_file(tmp_path / "spec.tune").program
    assert program is not None
    return prepare(program, Store(tmp_path / "store"))


@pytest.mark.parametrize(
    ("roles", "length"),
    [
        ('response = "{a}", label = "{good}"', 64),
        ('chosen = "{a}", rejected = "{b}"', 128),
    ],
)
def test_labelled_answers_are_planned_at_the_context_and_pairs_at_twice_the_context(
    tmp_path: Path, roles: str, length: int
) -> None:
    assert plan(tmp_path, KTO.format(roles=roles)).layout("s").length == length
