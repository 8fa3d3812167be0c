"""Rubrics: a language model scores completions against criteria in plain words.

The judge is asked for a number from 0 to 10 for each criterion, as JSON; other text in its answer
is ignored. Identical requests of a batch are sent once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.rewards import Rubric
from tunelang.runtime.data.row_errors import MissingFieldError, WrongTypeError
from tunelang.runtime.data.text_templates import render
from tunelang.runtime.rewards.reward_parts import CompletionRow, Scorer
from tunelang.runtime.workers.worker_pool import Result

HIGHEST = 10.0
"""The score of a criterion that is met in full."""

_STOCK = """\
You are a strict judge. Read the task and the text that was written for it, and score the text by \
each criterion.

<task>
{task}
</task>

<text>
{completion}
</text>

Criteria:
{criteria}
"""
_FORM = """
Answer with JSON only: {"scores": [...]}, one number from 0 (not at all) to 10 (fully) for each \
criterion, in their order."""

Reply = str | Exception
Ask = Callable[[Sequence[str]], Sequence[Reply]]
"""Sends requests to a judge; returns for each the answer, or the error in its place."""


@dataclass(eq=False)
class JudgeDownError(TuneError):
    """A judge answered none of the requests of a batch; `why` is the error of the first."""

    code = "reward-fails"
    judge: str
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.judge_down(self.judge, self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(declaration=self.judge)


def rubric_scorer(kind: Rubric, ask: Ask, name: str) -> Scorer:
    """Make the scorer of a rubric; `ask` sends requests to its judge, `name` is for messages.

    The scorer raises `JudgeDownError` where the judge answers no request.
    """

    def score(rows: Sequence[CompletionRow]) -> Sequence[Result]:
        results: list[Result] = [""] * len(rows)
        rows_of_request: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            try:
                rows_of_request.setdefault(request(kind, row), []).append(index)
            except (MissingFieldError, WrongTypeError) as error:
                results[index] = str(error)
        replies = ask(list(rows_of_request))
        errors = [reply for reply in replies if isinstance(reply, Exception)]
        if errors and len(errors) == len(replies):
            raise JudgeDownError(name, str(errors[0]))
        for indices, reply in zip(rows_of_request.values(), replies, strict=True):
            result = str(reply) if isinstance(reply, Exception) else verdict(kind, reply)
            for index in indices:
                results[index] = result
        return results

    return score


def request(kind: Rubric, row: CompletionRow) -> str:
    """Return the request that asks the judge for the scores of a completion.

    Raises `MissingFieldError` and `WrongTypeError`.
    """
    numbered = enumerate(kind.criteria, 1)
    criteria = "\n".join(f"{number}. {criterion.text}" for number, criterion in numbered)
    fields = {**row.fields, "criteria": criteria}
    if kind.instructions is not None:
        return render(kind.instructions, fields) + "\n" + _FORM
    task = str(fields.get("prompt") or "(none)")
    completion = str(fields["completion"])
    return _STOCK.format(task=task, completion=completion, criteria=criteria) + _FORM


def verdict(kind: Rubric, reply: str) -> Result:
    """Return the weighted mean of the scores in a judge's answer, 0 to 1, or the fault in it.

    The last JSON in the answer that has as many numbers as there are criteria counts.
    """
    for value in reversed(list(_json_values(reply))):
        scores = value.get("scores") if isinstance(value, dict) else value
        if not isinstance(scores, list) or len(scores) != len(kind.criteria):
            continue
        if all(isinstance(score, int | float) and not isinstance(score, bool) for score in scores):
            weights = [criterion.weight for criterion in kind.criteria]
            clipped = [min(max(float(score), 0.0), HIGHEST) for score in scores]
            total = sum(w * s for w, s in zip(weights, clipped, strict=True))
            return total / (HIGHEST * sum(weights))
    excerpt = " ".join(reply.split())[:80]
    return f"the judge gave no {len(kind.criteria)} scores: {excerpt}"


def _json_values(text: str) -> Iterator[object]:
    """Yield the outermost JSON objects and lists in a text."""
    decoder = json.JSONDecoder()
    position = 0
    while (start := re.search(r"[{\[]", text[position:])) is not None:
        position += start.start()
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            position += 1
            continue
        yield value
