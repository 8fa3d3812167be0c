"""`tune generate` with a beam search or the best of several samples, against all the samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline import tiny
from tests.pipeline.tiny import tune
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
    """A pipeline with a base model, a reward model and several rewards."""
    spec = tiny.workspace(tmp_path_factory.mktemp("best"))
    pairs = ({"a": "x" * n, "b": n, "c": n + 1} for n in range(1, 5))
    (spec.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    spec.write_text(f"{spec.read_text()}\n{REWARDS}\n")
    tiny.run(spec, until=["base", "judge"])
    return spec


def open_generator(spec: Path, by: str | None):
    """Open the base model and a reward."""
    prepared, store = tiny.plan(spec)
    return open_ranked(prepared.program, store, "base", by, SAMPLING.max_tokens)


def test_best_samples_come_first(spec: Path) -> None:
    generator, reward = open_generator(spec, "plain")
    with reward:
        every = list(generator.complete(PROMPTS, SAMPLING, 8, 0, True))
        best = list(best_of(generator, PROMPTS, SAMPLING, 8, 0, True, returned=8, reward=reward))
        first = list(best_of(generator, PROMPTS, SAMPLING, 8, 0, True, reward=reward))
    for start in (0, 8):
        # Equally good ones stay in their order.
        assert best[start : start + 8] == sorted(
            every[start : start + 8], key=lambda text: "e" in text
        )
    assert {"e" in text for text in every} == {True, False}
    assert first == best[::8]
    likeliest = list(best_of(generator, PROMPTS, SAMPLING, 8, 0, True, returned=8))
    assert sorted(likeliest[:8]) == sorted(every[:8])


def test_learned_reward_sorts_samples(spec: Path) -> None:
    generator, reward = open_generator(spec, "helpful")
    with reward:
        best = list(best_of(generator, PROMPTS, SAMPLING, 4, 0, True, returned=4, reward=reward))
        rows = [
            CompletionRow({"prompt": PROMPTS[index // 4], "completion": text}, "", 6)
            for index, text in enumerate(best)
        ]
        scores = reward.score(rows)
    assert not scores.events
    by_prompt = scores.values.reshape(2, 4)
    assert (np.diff(by_prompt) <= 1e-5).all()
    assert np.ptp(by_prompt) > 0


def test_local_judge_is_asked(spec: Path) -> None:
    generator, reward = open_generator(spec, "taste")
    with reward, pytest.raises(UnscoredError, match="the judge gave no 1 scores"):
        list(best_of(generator, PROMPTS, SAMPLING, 2, 0, True, reward=reward))


def test_reward_without_its_fields_is_an_error(spec: Path) -> None:
    generator, reward = open_generator(spec, "correct")
    with reward, pytest.raises(UnscoredError, match="no field `target`"):
        list(best_of(generator, PROMPTS, SAMPLING, 2, 0, True, reward=reward))


def test_one_beam_is_greedy_and_several_differ(spec: Path) -> None:
    generator, _ = open_generator(spec, None)
    greedy = list(generator.complete(PROMPTS, Sampling(max_tokens=6, temperature=0.0), 1, 0, True))
    assert list(generator.search(PROMPTS, 6, True, beams=1)) == greedy
    several = list(generator.search(PROMPTS, 6, True, beams=5, returned=3))
    assert len(several) == 6
    assert len(set(several[:3])) == 3


def test_generate_command_takes_beams_and_best_of(spec: Path) -> None:
    def generate(*arguments: str) -> tuple[int, list[str], str]:
        done = tune("generate", spec, "base", "1+1=", "--max-tokens", "3", *arguments)
        return done.returncode, done.stdout.splitlines(), done.stderr

    code, lines, _ = generate("--beams", "4", "--samples", "2", "--length-penalty", "0")
    assert code == 0
    assert len(lines) >= 2
    assert generate("--best-of", "4", "--by", "short")[0] == 0
    code, _, stderr = generate("--best-of", "4", "--by", "broad")
    assert code == 2
    assert "the reward scores no completion: correct: no field `target`" in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--beams", "4", "--temperature", "1"), "does not sample"),
        (("--beams", "4", "--best-of", "2"), "not with --best-of"),
        (("--beams", "4", "-n", "5"), "more than there are"),
        (("--best-of", "1"), "--best-of"),
        (("--best-of", "4", "--temperature", "0"), "all completions"),
        (("--best-of", "4", "--by", "nobody"), "no reward is called `nobody`"),
        (("--by", "short"), "only with --best-of"),
        (("--length-penalty", "0"), "only with --beams"),
    ],
)
def test_contradicting_options_are_an_error(
    spec: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = tune("generate", spec, "base", "1+1=", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
