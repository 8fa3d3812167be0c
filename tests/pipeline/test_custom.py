"""A pipeline with functions of the user, against one with the built-in words that they repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import tiny
from tunelang.dsl.check import check_file
from tunelang.runtime.commands.diagnose import diagnose
from tunelang.runtime.errors import StageFailed

FUNCTIONS = """
import jax, jax.numpy as jnp

def sums(most):
    return [{"a": a, "b": b, "c": a + b} for a in range(most) for b in range(4)]

def surprise(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]

def line(progress):
    return 1 - progress

def centred(rewards):
    return rewards - rewards.mean(1, keepdims=True)

def term(ratio, advantages):
    return -ratio * advantages

def digits(completion, score, a):
    assert len(completion) == len(score) == len(a)
    return sum(text.strip().isdigit() for text in completion) / len(completion)
"""
STAGES = """
data additions : python {{
  function = "own.py:sums"
  settings = settings(most = 5)
  prompt = "{{a}}+{{b}}=", response = "{{c}}", target = "{{c}}"
}}
eval answers : generate {{
  data = additions, score = correct, max_tokens = 4, limit = 8, measured = python("own.py:digits")
}}
stage taught : sft {{
  from = tiny, data = additions, length = 6 steps, batch = 8 sequences, log_every = 1 step
  mesh = axes(data = 1), {sft}
  optimizer = adamw(lr = 1e-2, decay = {decay})
  evals = [answers]
}}
stage polished : grpo {{
  from = taught, data = additions, reward = correct + short, group = 4, batch = 4 prompts
  length = 2 steps, rollout = sampling(max_tokens = 4), optimizer = adamw(lr = 1e-3)
  advantage = {advantage}, clip = none, {grpo} log_every = 1 step, mesh = axes(data = 1)
}}
"""


def run_stages(folder: Path, **words: str) -> list[dict[str, Any]]:
    """Run both stages with some words filled in; returns their metrics."""
    spec = tiny.workspace(folder)
    (folder / "own.py").write_text(FUNCTIONS)
    text = spec.read_text()
    spec.write_text(text[: text.index("stage base")] + STAGES.format(**words))
    tiny.run(spec)
    return tiny.metrics(spec, "taught") + tiny.metrics(spec, "polished")


def test_user_functions_equal_the_built_in_words(tmp_path: Path) -> None:
    user_rows = run_stages(
        tmp_path / "own",
        sft='loss = python("own.py:surprise")',
        decay='python("own.py:line")',
        advantage='python("own.py:centred")',
        grpo='loss = python("own.py:term"),',
    )
    built_in_rows = run_stages(
        tmp_path / "plain", sft="", decay="linear", advantage="group_mean", grpo=""
    )
    for one, other in zip(user_rows, built_in_rows, strict=True):
        for name in ("loss", "learning_rate", "reward", "grad_norm", "answers.digits"):
            assert (name in one) == (name in other)
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (name, one)
    assert any("answers.digits" in row for row in user_rows)


def test_error_in_a_user_function_is_reported_at_its_line(tmp_path: Path) -> None:
    spec = tiny.workspace(tmp_path)
    (tmp_path / "own.py").write_text(FUNCTIONS.replace("[..., 0]", ""))
    text = spec.read_text()
    words = {"decay": "linear", "advantage": "group_mean", "grpo": ""}
    stages = STAGES.format(sft='loss = python("own.py:surprise")', **words)
    spec.write_text(text[: text.index("stage base")] + stages)
    with pytest.raises(StageFailed) as caught:
        tiny.run(spec)
    program = check_file(spec).program
    assert program is not None
    diagnostic, exit_code = diagnose(caught.value, program)
    assert exit_code == 3
    assert diagnostic.title.startswith("own.py:surprise: it returned the shape")
    assert diagnostic.where.span.text == 'python("own.py:surprise")'


def test_changed_function_changes_the_fingerprint(tmp_path: Path) -> None:
    words = {
        "decay": "linear", "advantage": "group_mean", "grpo": "",
        "sft": 'loss = python("own.py:surprise")',
    }  # fmt: skip
    spec = tiny.workspace(tmp_path)
    (tmp_path / "own.py").write_text(FUNCTIONS)
    text = spec.read_text()
    spec.write_text(text[: text.index("stage base")] + STAGES.format(**words))
    before = tiny.plan(spec)[0].plan.by_node["taught"].digest
    (tmp_path / "own.py").write_text(FUNCTIONS + "\n# changed\n")
    assert tiny.plan(spec)[0].plan.by_node["taught"].digest != before
