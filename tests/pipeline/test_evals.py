"""Evals in every form, of models side by side."""

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
    spec = tiny.workspace(tmp_path_factory.mktemp("evals"))
    text = spec.read_text()
    spec.write_text(text[: text.index("stage specialist")] + EVALS)
    tiny.run(spec)
    prepared, store = tiny.planned(spec)
    done = store.folder(prepared.plan.by_node["compared"].digest).done()
    assert done is not None
    found: dict[str, dict[str, float]] = done["summary"]["table"]
    return found


@pytest.mark.parametrize("model", ["base", "baseline"])
def test_what_samples_tell(table: dict[str, dict[str, float]], model: str) -> None:
    found = table[model]
    assert found["guesses.pass_at_1"] == pytest.approx(found["guesses.score"])
    assert found["guesses.pass_at_1"] <= found["guesses.pass_at_2"] <= found["guesses.pass_at_4"]
    # What ranks is what scores, so the best is found wherever there is one.
    assert found["guesses.best_of_n"] == pytest.approx(found["guesses.pass_at_4"])
    assert 0 <= found["guesses.majority"] <= found["guesses.pass_at_4"] + 1e-9
    assert found["guesses.score_low"] <= found["guesses.score"] <= found["guesses.score_high"]
    assert found["guesses.correct"] <= found["guesses.score"]  # the stricter match
    assert 0 <= found["guesses.contains"] <= 1


@pytest.mark.parametrize("model", ["base", "baseline"])
def test_a_search_with_one_beam_is_greedy(table: dict[str, dict[str, float]], model: str) -> None:
    found = table[model]
    for name in ("score", "length", "truncated"):
        assert found[f"beam.{name}"] == found[f"greedy.{name}"]
    assert found["searched.pass_at_2"] >= found["searched.score"]


def test_models_stand_side_by_side(table: dict[str, dict[str, float]]) -> None:
    assert table["base"].keys() == table["baseline"].keys()
    assert table["base"]["fluency.loss"] != table["baseline"]["fluency.loss"]
