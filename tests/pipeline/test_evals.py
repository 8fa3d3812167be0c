"""Metrics of every kind of eval of two models, against each other."""

from __future__ import annotations

import pytest

from tests.pipeline import tiny

EVALS = """
eval guesses : generate {
  data = sums, score = close, max_tokens = 3, limit = 6, samples = 4, temperature = 1.0
  also = [correct, contains("{completion}", "1")], rank = close
}
eval searched : generate {
  data = sums, score = close, max_tokens = 3, limit = 6, beams = 3, samples = 2
}
eval greedy : generate { data = sums, score = close, max_tokens = 3, limit = 6, temperature = 0 }
eval beam   : generate { data = sums, score = close, max_tokens = 3, limit = 6, beams = 1 }
reward close = contains("{completion}", "{target}")
stage compared : evaluate {
  models = [base, baseline], evals = [guesses, searched, greedy, beam, fluency]
}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Metrics of each of two models under every kind of eval."""
    spec = tiny.workspace(tmp_path_factory.mktemp("evals"))
    text = spec.read_text()
    spec.write_text(text[: text.index("stage specialist")] + EVALS)
    tiny.run(spec)
    table: dict[str, dict[str, float]] = tiny.summary(spec, "compared")["table"]
    return table


@pytest.mark.parametrize("model", ["base", "baseline"])
def test_metrics_of_samples_agree_with_each_other(
    table: dict[str, dict[str, float]], model: str
) -> None:
    metrics = table[model]
    assert metrics["guesses.pass_at_1"] == pytest.approx(metrics["guesses.score"])
    assert (
        metrics["guesses.pass_at_1"] <= metrics["guesses.pass_at_2"] <= metrics["guesses.pass_at_4"]
    )
    # The ranking is the score, so the best of n is right wherever one of them is.
    assert metrics["guesses.best_of_n"] == pytest.approx(metrics["guesses.pass_at_4"])
    assert 0 <= metrics["guesses.majority"] <= metrics["guesses.pass_at_4"] + 1e-9
    assert metrics["guesses.score_low"] <= metrics["guesses.score"] <= metrics["guesses.score_high"]
    assert metrics["guesses.correct"] <= metrics["guesses.score"]  # the stricter match
    assert 0 <= metrics["guesses.contains"] <= 1


@pytest.mark.parametrize("model", ["base", "baseline"])
def test_search_with_one_beam_is_greedy(table: dict[str, dict[str, float]], model: str) -> None:
    metrics = table[model]
    for name in ("score", "length", "truncated"):
        assert metrics[f"beam.{name}"] == metrics[f"greedy.{name}"]
    assert metrics["searched.pass_at_2"] >= metrics["searched.score"]


def test_table_has_the_same_metrics_for_both_models(table: dict[str, dict[str, float]]) -> None:
    assert table["base"].keys() == table["baseline"].keys()
    assert table["base"]["fluency.loss"] != table["baseline"]["fluency.loss"]
