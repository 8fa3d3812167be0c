"""The teacher's likeliest tokens at each token of the data, computed once and kept in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.evals.score_answers import epoch
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.objectives.distill_losses import TopK, top_k
from tunelang.runtime.sharding import Layout, jit
from tunelang.runtime.tokenize.token_cache import Corpus
from tunelang.runtime.training.cross_entropy import LogitInputs
from tunelang.runtime.training.objective import AnyArray, Batch, hidden_states
from tunelang.runtime.training.step_config import StepConfig

CHUNK = 64
"""Tokens of a sequence whose logits are in memory at once, of teacher and student."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherTokens:
    """The teacher's likeliest tokens at each token of a batch."""

    ids: AnyArray
    """`[batch, length, k]` int32."""
    log_probs: AnyArray
    """`[batch, length, k]` float32, in nats."""


@dataclass(frozen=True)
class TokenChoice:
    """Which of the teacher's tokens are compared, and how they are scored."""

    k: int
    """The number of likeliest tokens."""
    temperature: float
    vocabulary: int
    """Only the first so many tokens count: those that teacher and student have in common."""


def likeliest_tokens(
    hidden: jax.Array, teacher: Decoder, choice: TokenChoice, layout: Layout
) -> TopK:
    """Return the teacher's likeliest tokens at each token of a batch.

    `hidden` `[batch, length, width]` is the teacher's.
    """
    return top_k(
        LogitInputs(
            hidden, teacher.head_weight()[: choice.vocabulary], teacher.architecture.logit_cap
        ),
        k=choice.k,
        temperature=choice.temperature,
        chunk=CHUNK,
        layout=layout,
    )


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's likeliest tokens at each token of a corpus's items, in files."""

    ids: NDArray[np.int32]
    """`[tokens, k]`."""
    log_probs: NDArray[np.float16]
    """`[tokens, k]`, in nats."""
    offsets: NDArray[np.int64]
    """The first token of each item, `[items + 1]`."""

    def batch(self, items: NDArray[np.int64], length: int) -> TeacherTokens:
        """Return them for the items of sequences, `[sequences, most]`, -1 for none."""
        k = self.ids.shape[1]
        ids = np.zeros((len(items), length, k), np.int32)
        ids[:] = np.arange(k)  # padding: any tokens that differ
        log_probs = np.full((len(items), length, k), -np.log(2.0 * k), np.float32)
        for row, numbers in enumerate(items):
            start = 0
            for item in numbers[numbers >= 0]:
                first, last = self.offsets[item], self.offsets[item + 1]
                end = start + int(last - first)
                ids[row, start:end] = self.ids[first:last]
                log_probs[row, start:end] = self.log_probs[first:last]
                start = end
        return TeacherTokens(ids, log_probs)


def build_teacher_cache(
    choice: TokenChoice,
    corpus: Corpus,
    architecture: Architecture,
    params: Params,
    config: StepConfig,
    folder: Path,
) -> TeacherCache:
    """Run the teacher over all items once; files that are complete are read again."""
    lengths = np.concatenate([part.lengths for part in corpus.parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    shape = int(offsets[-1]), choice.k
    done = folder / "teacher.done"
    mode: Any = "r" if done.exists() else "w+"
    ids = np.memmap(folder / "teacher.ids", np.int32, mode, shape=shape)
    log_probs = np.memmap(folder / "teacher.log_probs", np.float16, mode, shape=shape)
    cache = TeacherCache(ids, log_probs, offsets)
    if not done.exists():
        graph, _ = abstract_decoder(architecture, config.dtype)

        def run_teacher(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            decoder = nnx.merge(graph, params)
            hidden, _ = hidden_states(decoder, batch, None, config)
            return likeliest_tokens(hidden, decoder, choice, config.layout)

        program = jit(run_teacher, config.layout)
        batches, items = epoch(corpus, None, config.layout)
        for step, numbers in enumerate(items):
            batch = jax.tree.map(lambda array, step=step: array[step], batches)
            _store(cache, numbers, *jax.device_get(program(params, batch)))
        ids.flush()
        log_probs.flush()
        done.touch()
    return cache


def _store(
    cache: TeacherCache,
    items: NDArray[np.int64],
    ids: NDArray[np.int32],
    log_probs: NDArray[np.float32],
) -> None:
    """Write the tokens of a batch's items into the cache."""
    for row, numbers in enumerate(items):
        start = 0
        for item in numbers[numbers >= 0]:
            first, last = cache.offsets[item], cache.offsets[item + 1]
            end = start + int(last - first)
            cache.ids[first:last] = ids[row, start:end]
            cache.log_probs[first:last] = log_probs[row, start:end]
            start = end


def remove_teacher_cache(folder: Path) -> None:
    """Remove the files, which are large."""
    for path in folder.glob("teacher.*"):
        path.unlink()
