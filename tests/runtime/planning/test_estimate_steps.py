"""Steps that are estimated from the beginnings of files, against those of the data itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compiler.workspace import program
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.dsl.vocabulary.stages import Training
from tunelang.runtime.planning.estimate_steps import estimate_steps

LAYOUT = StageLayout(
    mesh={"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}, rows=16, length=128,
    micro_batches=1, remat="none", slots=None,
)  # fmt: skip
ROWS, LONG = 20_000, 50
SOURCES = """\
tokenizer letters : bytes {}
model m : transformer { tokenizer = letters, layers = 1, width = 16, heads = 2, context = 128 }
data d : jsonl { path = "rows.jsonl", prompt = "{q}", response = "{a}" }
data few : jsonl { path = "few.jsonl", prompt = "{q}", response = "{a}" }
data book : text { path = "book.txt", rows = paragraph }
data made : procedural { task = "knights_knaves", size = 300 }
data half = d.split(test = 50%).test
data mixed = 75% * d + 25% * few
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lengths")
    for name, count in (("rows", ROWS), ("few", 100)):
        lines = (
            json.dumps({"q": "x" * (LONG - row % 7), "a": "y" * (row % 7), "more": "z" * 30}) + "\n"
            for row in range(count)
        )
        (path / f"{name}.jsonl").write_text("".join(lines))
    (path / "book.txt").write_text("\n\n".join("word " * 20 for _ in range(1000)))
    return path


def estimate(folder: Path, stage: str) -> tuple[int, bool] | None:
    checked = program(SOURCES + stage, folder)
    value = checked.declarations["s"].branches[0].value
    assert isinstance(value, Training)
    return estimate_steps(checked, value, "m", LAYOUT, {})


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("data = d, length = 7 steps", 7),
        ("data = d, length = 2 epochs", 2 * ROWS * LONG / (16 * 128)),
        ("data = d, length = 2 epochs, packing = false", 2 * ROWS / 16),
        ("data = few, length = 1 epoch, packing = false", 7),
        ("data = d.take(160), length = 1 epoch, packing = false", 10),
        ("data = d.skip(4000), length = 1 epoch, packing = false", 1000),
        ("data = few.repeat(8), length = 1 epoch, packing = false", 50),
        ("data = half, length = 1 epoch, packing = false", ROWS / 32),
        ("data = mixed, length = 1 epoch, packing = false", (ROWS + 100) / 16),
        ("data = d, length = 1M tokens", 1e6 / (16 * 128)),
    ],
)
def test_steps_of_supervised_stages_are_estimated(folder: Path, more: str, expected: float) -> None:
    steps = estimate(folder, f"stage s : sft {{ from = m, batch = 16 sequences, {more} }}")
    assert steps is not None
    assert steps[0] == pytest.approx(expected, rel=0.02, abs=1)
    assert steps[1] == more.endswith("steps")


def test_steps_on_text_and_prompts_are_estimated(folder: Path) -> None:
    text = "stage s : pretrain { from = m, data = book, length = 1 epoch, batch = 16 sequences }"
    assert estimate(folder, text) == (pytest.approx(102_000 / (16 * 128), rel=0.02), False)
    policy = (
        "stage s : grpo { from = m, data = made, batch = 8 prompts, group = 4, length = 2 epochs\n"
        '  reward = exact("{completion}", "{target}"), rollout = sampling(max_tokens = 8) }'
    )
    assert estimate(folder, policy) == (75, False)


def test_steps_are_unknown_where_conditions_decide(folder: Path) -> None:
    text = "stage s : sft { from = m, data = DATA, length = 1 epoch, batch = 16 sequences }"
    assert estimate(folder, text.replace("DATA", "d.where(length < 9)")) is None
