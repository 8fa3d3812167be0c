"""`tune generate` with a beam search, and with the best of several samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny
from tests.pipeline.test_run import tune
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.commands.generate import UnscoredError, best_of, open_ranked
from tunelang.runtime.rewards.reward_parts import CompletionRow

REWARDS = """
reward plain = 1 - contains("{completion}", "e") - contains("{prompt}", "7")
data pairs : jsonl { path = "pairs.jsonl", prompt = "{a}:", chosen = "{b}", rejected = "{c}" }
stage judge : reward_model {
  from = base, data = pairs, length = 2 steps, batch = 2 sequences, mesh = axes(data = 1)
  optimizer = adamw(lr = each(1e-2, 1e-3)), evals = [preferred], keep = best(preferred)
}
eval preferred : preference { data = pairs }
reward helpful : learned { from = judge }
reward taste   : rubric { judge = local(base), criteria = criterion("Right"), on_error = 0.5 }
"""
PROMPTS = ("line 7 of", "the")
SAMPLING = Sampling(max_tokens=6, temperature=1.0)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tiny.workspace(tmp_path_factory.mktemp("best"))
    pairs = ({"a": "x" * n, "b": n, "c": n + 1} for n in range(1, 5))
    (spec.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    spec.write_text(f"{spec.read_text()}\n{REWARDS}\n")
    tiny.run(spec, until=["base", "judge"])
    return spec


def opened(spec: Path, by: str | None):
    prepared, store = tiny.planned(spec)
    return open_ranked(prepared.program, store, "base", by, SAMPLING.max_tokens)


def test_the_best_of_several_samples(spec: Path) -> None:
    generator, reward = opened(spec, "plain")
    with reward:
        every = list(generator.complete(PROMPTS, SAMPLING, 8, 0, True))
        found = list(best_of(generator, PROMPTS, SAMPLING, 8, 0, True, returned=8, reward=reward))
        first = list(best_of(generator, PROMPTS, SAMPLING, 8, 0, True, reward=reward))
    for at in (0, 8):
        # Equally good ones stay in their order.
        assert found[at : at + 8] == sorted(every[at : at + 8], key=lambda text: "e" in text)
    assert {"e" in text for text in every} == {True, False}
    assert first == found[::8]
    likeliest = list(best_of(generator, PROMPTS, SAMPLING, 8, 0, True, returned=8))
    assert sorted(likeliest[:8]) == sorted(every[:8])


def test_learned_reward_that_no_stage_reads_chooses_the_best_samples(spec: Path) -> None:
    generator, reward = opened(spec, "helpful")
    with reward:
        found = list(best_of(generator, PROMPTS, SAMPLING, 4, 0, True, returned=4, reward=reward))
        rows = [
            CompletionRow({"prompt": PROMPTS[index // 4], "completion": text}, "", 6)
            for index, text in enumerate(found)
        ]
        scores = reward.score(rows)
    assert not scores.events
    by_prompt = scores.values.reshape(2, 4)
    assert (np.diff(by_prompt) <= 1e-5).all()
    assert np.ptp(by_prompt) > 0


def test_local_judge_that_no_stage_asks_is_asked(spec: Path) -> None:
    generator, reward = opened(spec, "taste")
    with reward, pytest.raises(UnscoredError, match="the judge gave no 1 scores"):
        list(best_of(generator, PROMPTS, SAMPLING, 2, 0, True, reward=reward))


def test_a_reward_without_its_fields(spec: Path) -> None:
    generator, reward = opened(spec, "correct")
    with reward, pytest.raises(UnscoredError, match="no field `target`"):
        list(best_of(generator, PROMPTS, SAMPLING, 2, 0, True, reward=reward))


def test_beams(spec: Path) -> None:
    generator, _ = opened(spec, None)
    greedy = list(generator.complete(PROMPTS, Sampling(max_tokens=6, temperature=0.0), 1, 0, True))
    assert list(generator.search(PROMPTS, 6, True, beams=1)) == greedy
    several = list(generator.search(PROMPTS, 6, True, beams=5, returned=3))
    assert len(several) == 6
    assert len(set(several[:3])) == 3


def test_the_command(spec: Path) -> None:
    def generate(*arguments: str) -> tuple[int, list[str], str]:
        found = tune("generate", spec, "base", "1+1=", "--max-tokens", "3", *arguments)
        return found.returncode, found.stdout.splitlines(), found.stderr

    code, lines, _ = generate("--beams", "4", "--samples", "2", "--length-penalty", "0")
    assert code == 0
    assert len(lines) >= 2
    assert generate("--best-of", "4", "--by", "short")[0] == 0
    code, _, said = generate("--best-of", "4", "--by", "broad")
    assert code == 2
    assert "the reward scores no completion: correct: no field `target`" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--beams", "4", "--temperature", "1"), "draws nothing"),
        (("--beams", "4", "--best-of", "2"), "not with --best-of"),
        (("--beams", "4", "-n", "5"), "more than it is chosen from"),
        (("--best-of", "1"), "--best-of"),
        (("--best-of", "4", "--temperature", "0"), "all are the same"),
        (("--best-of", "4", "--by", "nobody"), "no reward is called `nobody`"),
        (("--by", "short"), "only with --best-of"),
        (("--length-penalty", "0"), "only with --beams"),
    ],
)
def test_what_does_not_go_together(spec: Path, arguments: tuple[str, ...], message: str) -> None:
    found = tune("generate", spec, "base", "1+1=", *arguments)
    assert found.returncode == 2
    assert message in found.stderr
