"""Scores of whole answers, of all items of a corpus: by a language model their log-probability, by
a reward model its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.dsl.vocabulary.base import Measure
from tunelang.runtime.data.examples import Example, conversation
from tunelang.runtime.data.row_errors import WrongTypeError
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.objectives.answer_scores import segment_program
from tunelang.runtime.rewards.reward_parts import Row, Scorer
from tunelang.runtime.sharding import Layout
from tunelang.runtime.tokenize import packing
from tunelang.runtime.tokenize.chat_renderer import EmptyMaskError, Renderer
from tunelang.runtime.tokenize.chat_templates import ChatError
from tunelang.runtime.tokenize.token_cache import Corpus
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.workers.worker_pool import Result

TOKENS = 16_384
"""Tokens that one step of a program reads, about."""
_ROUND = 64

_TRUE = frozenset({"true", "yes", "1", "1.0"})
_FALSE = frozenset({"false", "no", "0", "0.0"})


@dataclass(frozen=True)
class Scored:
    """What a model makes of the items of a corpus, each array `[items, pieces]`."""

    values: NDArray[np.float32]
    """Summed log-probability in nats, or the score."""
    tokens: NDArray[np.float32]
    """Trained tokens."""


def score_answers(
    resources: Resources,
    corpus: Corpus,
    model: Model,
    params: Any,
    layout: Layout,
    limit: int | None = None,
) -> Scored:
    """Score each piece of the first items of a corpus once; without a limit, of all."""
    batch, items = epoch(corpus, limit, layout)
    a = model.architecture
    config = StepConfig(layout=layout, dtype=model.dtype, chunk=CHUNK)
    count = items.shape[-1] * corpus.pieces
    score = resources.cached(
        ("answers", a, str(model.dtype), layout, count),
        lambda: segment_program(a, config, count),
    )
    found = [np.asarray(each).reshape(*items.shape, corpus.pieces) for each in score(params, batch)]
    there = items >= 0
    size = int(items.max()) + 1
    values, tokens = (np.zeros((size, corpus.pieces), np.float32) for _ in found)
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
    rows = max(1, TOKENS // table.length // shards) * shards
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


def learned(resources: Resources, model: Model, params: Any, layout: Layout) -> Scorer:
    """Make a scorer of a reward model: the score of a completion as the answer to its prompt."""
    a, renderer = model.architecture, model.renderer
    config = StepConfig(layout=layout, dtype=model.dtype, chunk=CHUNK)
    score = resources.cached(
        ("answers", a, str(model.dtype), layout, 1), lambda: segment_program(a, config, 1)
    )

    def scores(rows: Sequence[Row]) -> Sequence[Result]:
        found = [_ids(renderer, _answered(row)) for row in rows]
        results: list[Result] = [
            ids if isinstance(ids, str) else f"it has more than {a.context} tokens" for ids in found
        ]
        fits = [at for at, ids in enumerate(found) if not isinstance(ids, str)]
        fits = [at for at in fits if len(found[at]) <= a.context]
        if not fits:
            return results
        longest = -(-max(len(found[at]) for at in fits) // _ROUND) * _ROUND
        shards = layout.batch_shards
        each = max(1, TOKENS // longest // shards) * shards
        # Few sizes, so that few programs are compiled.
        each = min(each, 1 << (max(len(fits), shards) - 1).bit_length())
        for start in range(0, len(fits), each):
            own = fits[start : start + each]
            tokens, segments = (np.zeros((1, each, longest), np.int32) for _ in range(2))
            for row, at in enumerate(own):
                tokens[0, row, : len(found[at])] = found[at]
                segments[0, row, : len(found[at])] = 1
            places = np.broadcast_to(np.arange(longest, dtype=np.int32), tokens.shape)
            batch = Batch(tokens, segments > 0, segments, places)
            values = np.asarray(score(params, batch)[0])[0, :, 0]
            for row, at in enumerate(own):
                results[at] = float(values[row])
        return results

    return scores


def _ids(renderer: Renderer, example: Example) -> Sequence[int] | str:
    """Return the tokens of a prompt and its answer, or why there are none."""
    try:
        return renderer.tokens(example).ids
    except EmptyMaskError:  # the empty answer: the prompt, and the end
        return [*renderer.prompt(example), *renderer.stops[:1]]
    except ChatError as error:
        return str(error)


def _answered(row: Row) -> Example:
    """Return the conversation of a completion."""
    fields = row.fields
    messages = fields.get("messages")
    turns = None if messages is None else conversation("messages", messages)
    if turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return Example(
        row.source,
        0,
        {},
        prompt=fields.get("prompt"),
        response=fields["completion"],
        messages=turns,
        system=fields.get("system"),
    )
