"""Scores completions with a reward model, as the answers to their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.runtime.data.examples import Example, conversation
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.objectives.answer_scores import shared_segment_program
from tunelang.runtime.rewards.reward_parts import CompletionRow, Scorer
from tunelang.runtime.sharding import Layout
from tunelang.runtime.tokenize.chat_renderer import EmptyMaskError, Renderer
from tunelang.runtime.tokenize.chat_templates import ChatError
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.workers.worker_pool import Result

SCORED_TOKENS = 16_384
"""Approximate number of tokens that one step of a scoring program reads."""
_ROUND = 64
"""Sequences are padded to a multiple of this many tokens, so that few programs are compiled."""


def learned_scorer(model: Model, params: Params, layout: Layout) -> Scorer:
    """Make the scorer of a reward model, whose architecture has `scores`."""
    a, renderer = model.architecture, model.renderer
    config = StepConfig(layout=layout, dtype=model.dtype, chunk=CHUNK)
    program = shared_segment_program(a, config, 1)

    def score(rows: Sequence[CompletionRow]) -> Sequence[Result]:
        results: list[Result] = [""] * len(rows)
        sequences: dict[int, Sequence[int]] = {}  # row -> its tokens
        for index, row in enumerate(rows):
            ids = _tokens(renderer, _conversation(row))
            if isinstance(ids, str):
                results[index] = ids
            elif len(ids) > a.context:
                results[index] = f"it has more than {a.context} tokens"
            else:
                sequences[index] = ids
        if not sequences:
            return results
        longest = -(-max(map(len, sequences.values())) // _ROUND) * _ROUND
        shards = layout.batch_shards
        size = max(1, SCORED_TOKENS // longest // shards) * shards
        # Few sizes, so that few programs are compiled.
        size = min(size, 1 << (max(len(sequences), shards) - 1).bit_length())
        indices = list(sequences)
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            batch = _batch([sequences[index] for index in part], size, longest)
            values = np.asarray(program(params, batch)[0])[0, :, 0]
            for index, value in zip(part, values.tolist(), strict=False):
                results[index] = value
        return results

    return score


def _batch(sequences: Sequence[Sequence[int]], size: int, length: int) -> Batch:
    """Lay out sequences, each a segment of its own, as one step of `size` rows."""
    tokens, segments = (np.zeros((1, size, length), np.int32) for _ in range(2))
    for row, ids in enumerate(sequences):
        tokens[0, row, : len(ids)] = ids
        segments[0, row, : len(ids)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Batch(tokens, segments > 0, segments, positions)


def _tokens(renderer: Renderer, example: Example) -> Sequence[int] | str:
    """Return the tokens of a prompt and its answer, or the reason why there are none."""
    try:
        return renderer.tokens(example).ids
    except EmptyMaskError:  # the empty answer: the prompt, and the end
        return [*renderer.prompt(example), *renderer.stops[:1]]
    except ChatError as error:
        return str(error)


def _conversation(row: CompletionRow) -> Example:
    """Return the conversation whose last message is the completion."""
    fields = row.fields
    messages = fields.get("messages")
    history = None if messages is None else conversation("messages", messages)
    if history and history[-1].role == "assistant":
        history = history[:-1]
    return Example(
        row.source,
        0,
        {},
        prompt=fields.get("prompt"),
        response=fields["completion"],
        messages=history,
        system=fields.get("system"),
    )
