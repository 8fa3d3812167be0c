"""Scores of whole answers, of all items of a corpus: by a language model their log-probability, by
a reward model its score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.dsl.vocabulary.base import Measure
from tunelang.runtime.data.examples import Example
from tunelang.runtime.data.row_errors import WrongTypeError
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.objectives.answer_scores import shared_segment_program
from tunelang.runtime.rewards.learned_scorer import SCORED_TOKENS
from tunelang.runtime.sharding import Layout
from tunelang.runtime.tokenize import packing
from tunelang.runtime.tokenize.token_cache import Corpus
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.step_config import StepConfig

_ROUND = 64

_TRUE = frozenset({"true", "yes", "1", "1.0"})
_FALSE = frozenset({"false", "no", "0", "0.0"})


@dataclass(frozen=True)
class Scored:
    """What a model makes of the items of a corpus, each array `[items, segments]`."""

    values: NDArray[np.float32]
    """Summed log-probability in nats, or the score."""
    tokens: NDArray[np.float32]
    """Trained tokens."""


def score_answers(
    corpus: Corpus, model: Model, params: Any, layout: Layout, limit: int | None = None
) -> Scored:
    """Score each piece of the first items of a corpus once; without a limit, of all."""
    batch, items = epoch(corpus, limit, layout)
    a = model.architecture
    config = StepConfig(layout=layout, dtype=model.dtype, chunk=CHUNK)
    count = items.shape[-1] * corpus.segments_per_item
    score = shared_segment_program(a, config, count)
    found = [
        np.asarray(each).reshape(*items.shape, corpus.segments_per_item)
        for each in score(params, batch)
    ]
    there = items >= 0
    size = int(items.max()) + 1
    values, tokens = (np.zeros((size, corpus.segments_per_item), np.float32) for _ in found)
    values[items[there]], tokens[items[there]] = (each[there] for each in found)
    return Scored(values, tokens)


def epoch(corpus: Corpus, limit: int | None, layout: Layout) -> tuple[Batch, NDArray[np.int64]]:
    """Return the first items of a corpus once, packed, `[steps, batch, length]`; and the numbers of
    the items in each sequence, `[steps, batch, most]`, -1 where there is none.
    """
    share = 1.0 if limit is None else min(1.0, limit / corpus.order.epoch)
    most = max(int(part.lengths.max()) for part in corpus.parts)
    longest = min(corpus.longest, max(corpus.context, -(-most // _ROUND) * _ROUND))
    table = packing.plan(
        corpus,
        Measure.unvalidated(value=share, unit="epochs"),
        batch=1,
        packed=True,
        longest=longest,
    )
    shards = layout.batch_shards
    rows = max(1, SCORED_TOKENS // table.length // shards) * shards
    rows = min(rows, -(-table.steps // shards) * shards)
    found = [packing.batch_of(table, corpus, step) for step in range(table.steps)]
    items = [packing.items_of(table, corpus, step) for step in range(table.steps)]
    steps = -(-len(found) // rows)

    def stack(arrays: list[Any], empty: int = 0) -> np.ndarray[Any, Any]:
        whole = np.concatenate(arrays)
        padding = ((0, steps * rows - len(whole)), (0, 0))
        return np.pad(whole, padding, constant_values=empty).reshape(steps, rows, -1)

    batch = Batch(
        tokens=stack([one.tokens for one in found]),
        trained=stack([one.mask for one in found]),
        segments=stack([one.segments for one in found]),
        positions=stack([one.positions for one in found]),
    )
    return batch, stack(items, -1)


def label_of(example: Example) -> tuple[float]:
    """Return 1 for a desirable answer, 0 for another; raises `WrongTypeError`."""
    word = (example.label or "").strip().lower()
    if word not in _TRUE | _FALSE:
        raise WrongTypeError("label", "`true` or `false`", example.label)
    return (float(word in _TRUE),)


def margin_of(example: Example) -> tuple[float, float]:
    """Return a pair's margin, for both of its answers; raises `WrongTypeError`."""
    try:
        margin = float(example.margin or "")
    except ValueError:
        raise WrongTypeError("margin", "a number", example.margin) from None
    return margin, margin
