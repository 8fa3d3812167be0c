"""Preference stages in a pipeline: margins against those at the start, and use by later stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pipeline import tiny

STAGES = """
data pairs : jsonl {
  path     = "pairs.jsonl"
  prompt   = "{a}+{b}="
  chosen   = "{good}"
  rejected = "{bad}"
}
data marked : jsonl {
  path     = "marked.jsonl"
  prompt   = "{a}+{b}="
  response = "{c}"
  label    = "{right}"
}
eval preferred : preference { data = pairs, limit = 16 }

"""
REST = "length = 12 steps, batch = 4 sequences, log_every = 1 step, mesh = axes(data = 1)"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that has run up to `baseline`, with pairs and labelled answers."""
    spec = tiny.workspace(tmp_path_factory.mktemp("preferences"))
    pairs = [
        {"a": a, "b": b, "good": a + b, "bad": a + b + 1 + (a * b) % 3}
        for a in range(5) for b in range(5)
    ]  # fmt: skip
    marked = [
        {"a": row["a"], "b": row["b"], "c": row[name], "right": name == "good"}
        for row in pairs for name in ("good", "bad")
    ]  # fmt: skip
    for name, rows in (("pairs", pairs), ("marked", marked)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (spec.parent / f"{name}.jsonl").write_text(text)
    text = spec.read_text()
    spec.write_text(text[: text.index("stage specialist")] + STAGES)
    tiny.run(spec)
    return spec


def with_stages(workspace: Path, folder: Path, *stages: str) -> Path:
    """Copy a workspace and add stages to its spec."""
    spec = tiny.copy(workspace, folder / "copy")
    spec.write_text(spec.read_text() + "\n".join(stages))
    return spec


@pytest.mark.parametrize(
    "stage",
    [
        "dpo { data = pairs, beta = 0.5",
        "dpo { data = pairs, loss = ipo, reference_log_probs = live",
        "dpo { data = pairs, reference = base, adapter = lora(rank = 4), packing = false",
        "dpo { data = pairs, adapter = lora(rank = 4), reference_log_probs = live",
        "simpo { data = pairs",
        "orpo { data = pairs",
        "kto { data = marked, beta = 0.5",
        "kto { data = pairs, adapter = lora(rank = 8), beta = 1.0",
    ],
)
def test_every_preference_stage_widens_the_margin(
    workspace: Path, tmp_path: Path, stage: str
) -> None:
    text = f"stage judged : {stage}, from = baseline, {REST}, evals = [preferred]"
    rate = 3e-3 if "kto" in stage else 1e-2
    spec = with_stages(workspace, tmp_path, f"{text}, optimizer = adamw(lr = {rate}) }}")
    tiny.run(spec)
    rows = tiny.step_metrics(spec, "judged")
    assert np.mean([row["margin"] for row in rows[-4:]]) > rows[0]["margin"]
    if "simpo" not in stage and "orpo" not in stage and "base," not in stage:
        assert abs(rows[0]["margin"]) < 1e-4  # nothing has moved from the reference
    assert tiny.summary(spec, "judged")["metrics"]["preferred.accuracy"] > 0.6


CHAIN = """
stage judge : reward_model {{ from = baseline, data = pairs, {REST}, evals = [preferred]
  optimizer = adamw(lr = 1e-2), centring = 0.01 }}
reward helpful : learned {{ from = judge }}
reward taste : rubric {{ judge = local(baseline), criteria = criterion("Right"), on_error = 0.5 }}
stage tries : sample {{ from = baseline, data = sums, samples = 4, score = helpful
  rollout = sampling(max_tokens = 4), keep = helpful > -100 }}
data good : sampled {{ from = tries }}
data ranked : sampled {{ from = tries, rows = pairs }}
stage tuned : sft {{ from = baseline, data = good, {REST} }}
stage moved : dpo {{ from = baseline, data = ranked, {REST} }}
stage policy : grpo {{ from = baseline, data = sums, reward = 0.5 * helpful + correct + taste
  length = 2 steps, batch = 2 prompts, group = 4, rollout = sampling(max_tokens = 4) }}
stage soup : merge {{ from = tuned, others = [moved], method = ties(density = 50%)
  evals = [fluency] }}
stage after : sft {{ from = soup, data = good, {REST} }}
stage table : evaluate {{ models = [baseline, tuned, soup], evals = [accuracy, fluency] }}
stage ranks : evaluate {{ models = [baseline, judge], evals = [preferred] }}
"""


def test_chain_from_pairs_to_a_merged_model_runs(workspace: Path, tmp_path: Path) -> None:
    spec = with_stages(workspace, tmp_path, CHAIN.format(REST=REST))
    tiny.run(spec)

    def summary(stage: str) -> dict[str, Any]:
        return tiny.summary(spec, stage)

    assert summary("judge")["metrics"]["preferred.accuracy"] > 0.7
    tries = tiny.stage_folder(spec, "tries").path
    rows = [json.loads(line) for line in (tries / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == summary("tries")["metrics"]["rows"]
    assert {"a", "b", "c", "prompt", "completion", "target", "reward"} <= rows[0].keys()
    pairs = [json.loads(line) for line in (tries / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    table = summary("table")["table"]
    assert set(table) == {"baseline", "tuned", "soup"}
    assert table["soup"]["fluency.loss"] == pytest.approx(
        summary("soup")["metrics"]["fluency.loss"]
    )
    assert summary("ranks")["table"]["judge"]["preferred.accuracy"] > 0.7
    for row in tiny.step_metrics(spec, "policy"):
        assert row["reward/taste"] == 0.5  # what it says is no score
        assert {"reward/helpful", "reward/correct"} <= row.keys()
    again = tiny.run(spec)
    assert all(line.endswith("again") for line in again.lines)
