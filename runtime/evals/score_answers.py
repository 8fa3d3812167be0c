"""Scores the answers of a corpus: their log-probabilities, or the scores of a reward model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int, Shaped

from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.dsl.vocabulary.base import Measure
from tunelang.runtime.data.examples import Example
from tunelang.runtime.data.row_errors import WrongTypeError
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
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
class AnswerScores:
    """Scores of the answers of each item of a corpus."""

    values: Float32[np.ndarray, "items answers"]
    """Summed log-probability in nats, or the score."""
    tokens: Float32[np.ndarray, "items answers"]
    """Number of trained tokens."""


def score_answers(
    corpus: Corpus, model: Model, params: Params, layout: Layout, limit: int | None = None
) -> AnswerScores:
    """Score each answer of the first `limit` items of a corpus once; of all without a limit."""
    batch, items = epoch(corpus, limit, layout)
    a = model.architecture
    config = StepConfig(layout=layout, dtype=model.dtype, chunk=CHUNK)
    count = items.shape[-1] * corpus.segments_per_item
    score = shared_segment_program(a, config, count)
    values_and_tokens = [
        np.asarray(array).reshape(*items.shape, corpus.segments_per_item)
        for array in score(params, batch)
    ]
    is_item = items >= 0
    size = int(items.max()) + 1
    results = []
    for packed in values_and_tokens:
        by_item = np.zeros((size, corpus.segments_per_item), np.float32)
        by_item[items[is_item]] = packed[is_item]
        results.append(by_item)
    values, tokens = results
    return AnswerScores(values, tokens)


def epoch(
    corpus: Corpus, limit: int | None, layout: Layout
) -> tuple[Batch, Int[np.ndarray, "steps batch segments"]]:
    """Pack the first items of a corpus, each once, as `[steps, batch, length]`.

    Returns also the indices of the items in each sequence, -1 where there is none.
    """
    share = 1.0 if limit is None else min(1.0, limit / corpus.order.epoch)
    longest_item = max(int(part.lengths.max()) for part in corpus.parts)
    longest = min(corpus.longest, max(corpus.context, -(-longest_item // _ROUND) * _ROUND))
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
    sequences = [packing.batch_of(table, corpus, step) for step in range(table.steps)]
    items = [packing.items_of(table, corpus, step) for step in range(table.steps)]
    steps = -(-len(sequences) // rows)

    def stack(
        arrays: list[Shaped[np.ndarray, "1 length"]], fill: int = 0
    ) -> Shaped[np.ndarray, "steps batch length"]:
        joined = np.concatenate(arrays)
        padding = ((0, steps * rows - len(joined)), (0, 0))
        return np.pad(joined, padding, constant_values=fill).reshape(steps, rows, -1)

    batch = Batch(
        tokens=stack([sequence.tokens for sequence in sequences]),
        trained=stack([sequence.mask for sequence in sequences]),
        segments=stack([sequence.segments for sequence in sequences]),
        positions=stack([sequence.positions for sequence in sequences]),
    )
    return batch, stack(items, -1)


def label_of(example: Example) -> tuple[float]:
    """Return 1 for a desirable answer, 0 for an undesirable one; raises `WrongTypeError`."""
    word = (example.label or "").strip().lower()
    if word not in _TRUE | _FALSE:
        raise WrongTypeError("label", "`true` or `false`", example.label)
    return (float(word in _TRUE),)


def margin_of(example: Example) -> tuple[float, float]:
    """Return the margin of a pair, once for each answer; raises `WrongTypeError`."""
    try:
        margin = float(example.margin or "")
    except ValueError:
        raise WrongTypeError("margin", "a number", example.margin) from None
    return margin, margin
