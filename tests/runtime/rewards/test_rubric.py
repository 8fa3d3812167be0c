"""Requests to a judge and the scores in its answers."""

from __future__ import annotations

from typing import Any

import pytest

from tunelang.dsl.vocabulary.data import TemplateText
from tunelang.dsl.vocabulary.rewards import Criterion, Rubric
from tunelang.runtime.rewards.reward_parts import CompletionRow
from tunelang.runtime.rewards.rubric import request, rubric_scorer, verdict

CRITERIA = (Criterion(text="Short", weight=3.0), Criterion(text="Kind"))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"scores": [10, 10]}', 1.0),
        ('Thinking {hm} about [1, 2, 3]... {"scores": [0, 10]} done', 0.25),
        ('{"scores": [99, -4]}', 0.75),
        ("[2, 2.0]", 0.2),
        ('{"scores": [1]}', "the judge gave no 2 scores: {\"scores\": [1]}"),
        ('{"scores": ["a", 2]}', 'the judge gave no 2 scores: {"scores": ["a", 2]}'),
        ("", "the judge gave no 2 scores: "),
    ],
)  # fmt: skip
def test_verdict_is_read_from_the_last_scores(reply: str, value: Any) -> None:
    kind = Rubric.model_construct(criteria=CRITERIA)
    assert verdict(kind, reply) == value


def test_instructions_of_the_spec_replace_the_stock_text() -> None:
    kind = Rubric.model_construct(
        judge=None,
        criteria=CRITERIA,
        instructions=TemplateText.unvalidated(text="Look at {completion} by {criteria}"),
        on_error=0.0,
    )
    row = CompletionRow({"completion": "this"}, "data", 4)
    assert request(kind, row).startswith("Look at this by 1. Short\n2. Kind\n")
    scorer = rubric_scorer(kind, lambda requests: ["[10, 10]"] * len(requests), "x")
    scored, unscored = scorer([row, CompletionRow({}, "d", 1)])
    assert scored == 1.0
    assert isinstance(unscored, str)
