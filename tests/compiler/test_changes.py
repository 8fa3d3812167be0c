"""Sentences about a stale stage, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compiler.workspace import PIPELINE, prints, write
from tunelang.compiler.changes import changes, wording
from tunelang.compiler.fingerprint import Fingerprint
from tunelang.dsl.vocabulary.policy_stages import Policy

TUNED = "tuned[optimizer.lr=1e-6]"


def sentences(node: str, old: dict[str, Fingerprint], new: dict[str, Fingerprint]) -> list[str]:
    return [wording(change) for change in changes(old[node], new[node])]


CASES = [
    ("length = 2 epochs", "length = 3 epochs", "warm", ["`length`: 2 epochs → 3 epochs"]),
    ("length = 2 epochs", "length = 3 epochs", "polished", ["`tuned` has changed"]),
    ("length = 2 epochs", "length = 3 epochs", TUNED, ["`warm` has changed"]),
    ("seed = 17", "seed = 18", "warm", ["`run.seed`: 17 → 18"]),
    (
        "from   = tiny",
        "from   = tiny\n  optimizer = muon(lr = 1e-3)",
        "warm",
        ["`optimizer`: adamw → muon"],
    ),
    (
        "from   = tiny",
        "from   = tiny\n  optimizer = adamw(lr = 1e-3)",
        "warm",
        [
            "`optimizer.lr`: 1e-5 → 0.001",
            "`optimizer.warmup`: 3% → 0%",
            "`optimizer.decay`: cosine → constant",
        ],
    ),
    ('"Short"', '"Brief"', TUNED, ['`criteria[0].text` of `reward judged`: "Short" → "Brief"']),
    (
        'after("####", "{answer}")',
        '"{answer}"',
        "polished",
        ["`tuned` has changed", '`target` of `data sums`: after("####", "{answer}") → "{answer}"'],
    ),
    ("reward    = mixed", "reward    = right", TUNED, ["`reward`: mixed → right"]),
    (
        "best(accuracy)",
        "best(accuracy.length)",
        "polished",
        ["`keep` of `stage tuned`: best(accuracy) → best(accuracy.length)"],
    ),
    ("evals     = [accuracy]\n  keep      = best(accuracy)", "keep      = best(reward)", TUNED,
     ["`evals`: [accuracy] → []"]),
    ("evals     = [accuracy]", "evals     = [accuracy, accuracy]", TUNED,
     ["`evals[1]` is new: accuracy"]),
    (
        "75% * sums.split(test = 20%).train + 25% * spare_sums",
        "70% * sums.split(test = 20%).train + 30% * spare_sums",
        TUNED,
        [
            "`data blend`: 75% * sums.split(test = 20%).train + 25% * spare_sums →"
            " 70% * sums.split(test = 20%).train + 30% * spare_sums"
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "node", "expected"), CASES)
def test_changes_are_described_in_words(
    folder: Path, old: str, new: str, node: str, expected: list[str]
) -> None:
    assert old in PIPELINE
    before, after = prints(PIPELINE, folder), prints(PIPELINE.replace(old, new), folder)
    assert sentences(node, before, after) == expected


def test_formerly_empty_list_is_one_change(folder: Path) -> None:
    text = PIPELINE.replace("  evals  = [accuracy]\n", "")
    expected = ["`evals`: [] → [accuracy]"]
    assert sentences("warm", prints(text, folder), prints(PIPELINE, folder)) == expected


def test_changed_files_are_named(folder: Path) -> None:
    before = prints(PIPELINE, folder)
    write(folder / "rewards/mine.py", "def score(completion):\n    return 0.0\n")
    write(folder / "data/spare.jsonl", '{"question": "?", "answer": "6"}\n')
    assert sentences(TUNED, before, prints(PIPELINE, folder)) == [
        "`data/spare.jsonl` has other content",
        "`rewards/mine.py` has other content",
    ]


def test_changed_model_folder_is_named(folder: Path) -> None:
    before = prints(PIPELINE, folder)
    write(folder / "models/tiny/tokenizer.json", '{"other": 1}')
    assert sentences("warm", before, prints(PIPELINE, folder)) == [
        "`models/tiny` has other content"
    ]


def test_new_semantics_are_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prints(PIPELINE, folder)
    monkeypatch.setattr(Policy, "semantics", ("policy", 2))
    expected = ["this version computes it in another way (1 → 2)"]
    assert sentences(TUNED, before, prints(PIPELINE, folder)) == expected


def test_rename_together_with_a_change_is_not_reported(folder: Path) -> None:
    text = PIPELINE.replace("prosa", "prose").replace("judged", "graded").replace("0.5 *", "0.4 *")
    found = sentences(TUNED, prints(PIPELINE, folder), prints(text, folder))
    assert len(found) == 1
    assert found[0].startswith("`reward mixed`: 0.5 *")


def test_long_values_are_shown_from_their_first_difference(folder: Path) -> None:
    long = "0.5 * right + " * 9
    one = PIPELINE.replace("reward mixed = ", f"reward mixed = {long}0.25 * own + ")
    two = PIPELINE.replace("reward mixed = ", f"reward mixed = {long}0.75 * own + ")
    (found,) = sentences(TUNED, prints(one, folder), prints(two, folder))
    assert "0.25 * own" in found
    assert "0.75 * own" in found
    assert len(found) < 200


def test_equal_fingerprints_have_no_changes(folder: Path) -> None:
    found = prints(PIPELINE, folder)
    assert sentences("warm", found, found) == []
    assert sentences("warm", found, {"warm": found["polished"]})
