"""Turns episodes into the rows that rewards read, and into records with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from tunelang.runtime.data.examples import Example
from tunelang.runtime.generation.episodes import Episodes, token_texts
from tunelang.runtime.rewards.reward_functions import Scores
from tunelang.runtime.rewards.reward_parts import CompletionRow
from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.training.metrics import SampleRecord

_ROLES = ("prompt", "response", "target", "system")


def reward_rows(
    renderer: Renderer, examples: Sequence[Example], episodes: Episodes, texts: Sequence[str]
) -> list[CompletionRow]:
    """Return the row of each episode; episode `i` belongs to example `i // group`."""
    rows = []
    for index, (episode, text) in enumerate(zip(episodes, texts, strict=True)):
        example = examples[index // episodes.group]
        roles = {
            role: getattr(example, role) for role in _ROLES if getattr(example, role) is not None
        }
        if example.messages is not None:
            roles["messages"] = [
                {"role": message.role, "content": message.content} for message in example.messages
            ]
        fields = {**example.fields, **roles, "completion": text}
        tokens = episode.tokens
        rows.append(
            CompletionRow(
                fields, example.source, len(tokens), partial(token_texts, renderer, tokens)
            )
        )
    return rows


def sample_records(
    examples: Sequence[Example], episodes: Episodes, texts: Sequence[str], scores: Scores
) -> Iterator[SampleRecord]:
    """Yield each episode with its scores."""
    for index, text in enumerate(texts):
        yield SampleRecord(
            examples[index // episodes.group],
            text,
            int(episodes.lengths[index]),
            float(scores.values[index]),
            {name: float(values[index]) for name, values in scores.parts.items()},
        )
