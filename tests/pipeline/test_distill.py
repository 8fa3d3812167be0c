"""Distillation in a pipeline: divergence against that at the start; stored against live teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import tiny

SMALL = """
model little : transformer { tokenizer = letters, layers = 1, width = 8, heads = 2, context = 32 }
"""
REST = (
    "length = 12 steps, batch = 4 sequences, log_every = 1 step, mesh = axes(data = 1),"
    " optimizer = adamw(lr = 1e-2), evals = [fluency]"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that has run up to `baseline`, with a smaller model."""
    spec = tiny.workspace(tmp_path_factory.mktemp("distill"))
    text = spec.read_text()
    spec.write_text(text[: text.index("stage specialist")] + SMALL)
    tiny.run(spec)
    return spec


def distill(workspace: Path, folder: Path, settings: str) -> tuple[list[Any], dict[str, Any]]:
    """Run a stage `distill`; returns metrics of its steps, and its summary."""
    spec = tiny.copy(workspace, folder / "copy")
    stage = f"stage student : distill {{ from = little, data = sums, {REST}, {settings} }}"
    spec.write_text(spec.read_text() + stage)
    tiny.run(spec)
    return tiny.step_metrics(spec, "student"), tiny.summary(spec, "student")


@pytest.mark.parametrize(
    "settings",
    [
        "teacher = baseline, divergence = jensen_shannon(0.3), temperature = 2.0, hard = 20%",
        "teacher = baseline, top_k = 8, teacher_log_probs = ahead",
        "teacher = baseline, attention = maps(), features = hidden(), hard = 50%",
        "teacher = baseline, divergence = reverse_kl(), on_policy = 50%, packing = false,"
        " rollout = sampling(max_tokens = 4)",
    ],
)
def test_distillation_lowers_the_divergence(workspace: Path, tmp_path: Path, settings: str) -> None:
    rows, summary = distill(workspace, tmp_path, settings)
    assert rows[-1]["divergence"] < rows[0]["divergence"]
    if "maps" in settings:
        assert rows[-1]["attention_loss"] < rows[0]["attention_loss"]
        assert rows[-1]["feature_loss"] < rows[0]["feature_loss"]
    metrics = summary["metrics"]
    assert metrics["teacher/fluency.loss"] > 0
    assert 0 < metrics["size_ratio"] < 1
    assert metrics["decode_speed_ratio"] > 0


def test_stored_teacher_equals_the_live_one(workspace: Path, tmp_path: Path) -> None:
    live, _ = distill(workspace, tmp_path / "live", "teacher = baseline, top_k = 8")
    ahead, _ = distill(
        workspace, tmp_path / "ahead", "teacher = baseline, top_k = 8, teacher_log_probs = ahead"
    )
    for one, other in zip(live, ahead, strict=True):
        assert one["divergence"] == pytest.approx(other["divergence"], rel=1e-2)
