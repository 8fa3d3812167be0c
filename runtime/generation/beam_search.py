"""Beam search: finds the completions of highest score of each prompt; nothing is random.

A score is the sum of a completion's log-probabilities over its length to the power of the length
penalty. The search is that of `transformers` 5 (`do_sample=False, early_stopping=False`):

- of all continuations of a prompt's beams, the likeliest are candidates, as many as leave `beams`
  that go on however many of them stop;
- one that stops counts only if it is among the `beams` likeliest of its step;
- the search ends when the likeliest beam, at its present length, scores no more than the worst
  of `beams` finished completions.

A prompt is prefilled once and its cache copied into the slots of its beams. Every step gathers the
cache of the beams that go on, so it copies the cache once in addition to attention's reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.generation.engine import ProgramInput, copies_weights
from tunelang.runtime.generation.episodes import Episodes, Floats, Ints, Prompt, Work
from tunelang.runtime.generation.slot_queue import MIN_PADDED_TOKENS, power_of_two
from tunelang.runtime.models.decode_step import DecodeWeights, decode_step, decode_weights
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.kv_cache import KEYS, VALUES, Cache, empty_cache, insert
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.sharding import Layout, constrain, jit, reshard_for_decoding

_Tree = TypeVar("_Tree")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paths:
    """Completions of each prompt, the best first."""

    tokens: Array
    """`[prompts, paths, capacity]` int32; 0 behind the last."""
    log_probs: Array
    """`[prompts, paths, capacity]` float32: of each token, in nats."""
    lengths: Array
    """`[prompts, paths]` int32."""
    stopped: Array
    """`[prompts, paths]` bool: whether the last token is a stop token."""
    scores: Array
    """`[prompts, paths]` float32: the sum of the log-probabilities, over the length to the power of
    the penalty once the path is finished; `-inf` where there is no path."""


class SearchRequest(NamedTuple):
    """The arguments of a search, as arrays: to change a value compiles nothing."""

    stop_ids: ProgramInput
    """`[stops]` int32."""
    max_tokens: ProgramInput
    """int32 scalar."""
    length_penalty: ProgramInput
    """float32 scalar."""


@dataclass(frozen=True)
class Search:
    """The compiled program of a search for one architecture and one set of sizes."""

    prompts: int
    """Prompts that are searched at once."""
    beams: int
    capacity: int
    """Tokens of a slot: prompt and completion."""
    run: Callable[[Params, ProgramInput, ProgramInput, SearchRequest], tuple[Paths, Array]]
    """`(params, tokens [prompts, length], lengths [prompts], request) -> paths, steps`. A length of
    0 is a row without a prompt."""
    layout: Layout | None = None
    """The layout of the parameters that the program takes."""


@dataclass(frozen=True)
class Beams(Episodes):
    """The best completions of each prompt, the best first.

    Where a prompt has fewer (`beams` is more than there are sequences), the length of the last is 0
    and their score `-inf`.
    """

    scores: Floats
    """`[completions]`."""


class _State(NamedTuple):
    cache: Cache
    """A slot for each beam, those of a prompt side by side."""
    hidden: Array
    """`[prompts * beams, width]`: of each beam's last token."""
    beams: Paths
    finished: Paths
    active: Array
    """`[prompts]` bool: whether a beam may still beat the finished paths."""
    steps: Array
    """int32 scalar: the tokens of each beam so far."""


def make_search(
    architecture: Architecture,
    *,
    prompts: int,
    beams: int,
    capacity: int,
    dtype: DTypeLike = jnp.float32,
    layout: Layout | None = None,
) -> Search:
    """Make the program of a search; it compiles once for each padded length of prompts.

    `capacity`, `dtype` and `layout` are those of `engine.make_engine`. Raises `ValueError` where a
    size is out of range.
    """
    if not 1 <= capacity <= architecture.context:
        raise ValueError(
            f"slots of {capacity} tokens for a context of {architecture.context} tokens"
        )
    if prompts < 1 or beams < 1:
        raise ValueError(f"{beams} beams of {prompts} prompts")
    graph, _ = abstract_decoder(architecture, dtype)
    copied = copies_weights(architecture, dtype, layout)

    def run(
        params: Params, tokens: Array, lengths: Array, request: SearchRequest
    ) -> tuple[Paths, Array]:
        decoder: Decoder = nnx.merge(graph, params)
        if copied and architecture.adapters:
            decoder = decoder.merge_adapters()
        hidden, prefilled = decoder.prefill(tokens, jnp.maximum(lengths, 1), layout=layout)
        rows, slots = jnp.repeat(jnp.arange(prompts), beams), jnp.arange(prompts * beams)
        cache = empty_cache(architecture, prompts * beams, capacity, dtype)
        no_paths = _no_paths(prompts, beams, capacity)
        state = _State(
            insert(cache, prefilled, rows, slots),
            hidden[rows],
            # One beam of each prompt, or all would be the same.
            replace(no_paths, scores=no_paths.scores.at[:, 0].set(0)),
            no_paths,
            lengths > 0,
            jnp.zeros((), jnp.int32),
        )
        values = nnx.split(decoder)
        copies = decode_weights(decoder) if copied else None

        def step(state: _State) -> _State:
            decoder: Decoder = nnx.merge(*values)
            weights = decode_weights(decoder) if copies is None else copies
            return _step(decoder, weights, state, request, layout)

        state = jax.lax.while_loop(
            lambda state: jnp.any(state.active), step, _placed(layout, state)
        )
        return state.finished, state.steps

    return Search(prompts, beams, capacity, jit(run, layout), layout)


def beam_search(
    search: Search,
    params: Params,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    stop_ids: Sequence[int],
    pad: int,
    length_penalty: float = 1.0,
    returned: int = 1,
) -> Beams:
    """Find the `returned` best completions of each prompt.

    `params` are the decoder's, as they are trained. `stop_ids` end a completion and belong to it.
    With `length_penalty` 0 a score is the log-probability of the completion, with 1 the mean of its
    tokens; beyond, long ones are favoured. Nothing depends on which prompts are searched together.

    Raises `ValueError` for no prompt, one that is empty or too long for a slot, and more
    completions than beams.
    """
    if not 1 <= returned <= search.beams:
        raise ValueError(f"{returned} completions of {search.beams} beams")
    lengths = [len(prompt.tokens) for prompt in prompts]
    if not lengths or min(lengths) < 1 or max_tokens < 1:
        raise ValueError("a completion of no token, or no prompt for it")
    if max(lengths) + max_tokens > search.capacity:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and a completion of {max_tokens}"
            f" for a slot of {search.capacity}"
        )
    request = SearchRequest(
        np.array(stop_ids, np.int32), np.int32(max_tokens), np.float32(length_penalty)
    )
    params = reshard_for_decoding(params, search.layout)
    batches = [
        prompts[start : start + search.prompts] for start in range(0, len(prompts), search.prompts)
    ]
    results = [
        jax.device_get(search.run(params, *_padded(batch, search, pad), request))
        for batch in batches
    ]

    def join(*arrays: np.ndarray) -> np.ndarray:
        joined = np.concatenate(arrays)[: len(prompts), :returned]
        return joined.reshape(-1, *joined.shape[2:])

    best = jax.tree.map(join, *(paths for paths, _ in results))
    mask = np.arange(max_tokens) < best.lengths[:, None]
    return Beams(
        prompts=tuple(tuple(prompt.tokens) for prompt in prompts),
        group=returned,
        tokens=np.where(mask, best.tokens[:, :max_tokens], np.int32(pad)),
        lengths=best.lengths,
        log_probs=best.log_probs[:, :max_tokens],
        mask=mask,
        truncated=~best.stopped,
        pad=pad,
        work=Work(len(prompts), sum(int(steps) for _, steps in results), len(results)),
        scores=best.scores,
    )


def _padded(prompts: Sequence[Prompt], search: Search, pad: int) -> tuple[Ints, Ints]:
    """Return the tokens of prompts, `[search.prompts, length]`, and their lengths."""
    lengths = np.zeros(search.prompts, np.int32)
    lengths[: len(prompts)] = [len(prompt.tokens) for prompt in prompts]
    length = min(max(MIN_PADDED_TOKENS, power_of_two(int(lengths.max()))), search.capacity)
    tokens = np.full((search.prompts, length), pad, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.tokens)] = prompt.tokens
    return tokens, lengths


def _no_paths(prompts: int, paths: int, capacity: int) -> Paths:
    shape = prompts, paths
    return Paths(
        tokens=jnp.zeros((*shape, capacity), jnp.int32),
        log_probs=jnp.zeros((*shape, capacity), jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        stopped=jnp.zeros(shape, bool),
        scores=jnp.full(shape, -jnp.inf),
    )


def _step(
    decoder: Decoder,
    weights: DecodeWeights,
    state: _State,
    request: SearchRequest,
    layout: Layout | None,
) -> _State:
    """Extend the beams of every prompt by a token."""
    prompts, beams = state.beams.scores.shape
    log_probs = jax.nn.log_softmax(decoder.logits(state.hidden, weights.head))
    vocab = log_probs.shape[-1]
    log_probs = log_probs.reshape(prompts, beams, vocab)
    sums = (state.beams.scores[..., None] + log_probs).reshape(prompts, -1)
    candidate_count = min(1 + jnp.size(request.stop_ids), vocab) * beams
    sums, candidates = jax.lax.top_k(sums, candidate_count)
    parent, token = candidates // vocab, candidates % vocab
    length, penalty = state.steps + 1, jnp.asarray(request.length_penalty)
    stopped = jnp.any(token[..., None] == jnp.asarray(request.stop_ids), axis=-1)
    ended = stopped | (length == request.max_tokens)
    paths = _take(state.beams, parent)
    token_log_probs = jnp.take_along_axis(log_probs.reshape(prompts, -1), candidates, axis=1)
    extended = Paths(
        tokens=paths.tokens.at[:, :, state.steps].set(token),
        log_probs=paths.log_probs.at[:, :, state.steps].set(token_log_probs),
        lengths=jnp.full_like(token, length),
        stopped=stopped,
        scores=jnp.where(ended, -jnp.inf, sums),
    )
    scores, beam = jax.lax.top_k(extended.scores, beams)

    divisor = length.astype(jnp.float32) ** penalty
    counted = ended & (jnp.arange(candidate_count) < beams) & state.active[:, None]
    ended_paths = replace(extended, scores=jnp.where(counted, sums / divisor, -jnp.inf))
    contenders = jax.tree.map(
        lambda *arrays: jnp.concatenate(arrays, axis=1), state.finished, ended_paths
    )
    finished = _take(contenders, jax.lax.top_k(contenders.scores, beams)[1])

    cache_by_prompt = jax.tree.map(
        lambda array: array.reshape(prompts, beams, *array.shape[1:]), state.cache
    )
    slots = _take(cache_by_prompt, _take(parent, beam))
    cache = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), slots)
    hidden, cache = decode_step(
        decoder, _take(token, beam).reshape(-1), cache, weights, layout=layout
    )
    active = state.active & (scores[:, 0] / divisor > finished.scores[:, -1])
    return _placed(layout, _State(cache, hidden, _take(extended, beam), finished, active, length))


def _take(tree: _Tree, indices: Array) -> _Tree:
    """Take elements of each prompt: from arrays `[prompts, n, ...]` at `[prompts, m]`."""

    def take(array: Array, indices: Array) -> Array:
        # Any other mode looks at every element that is taken, and the cache is large.
        return array.at[indices].get(mode="promise_in_bounds")

    taken: _Tree = jax.tree.map(lambda array: jax.vmap(take)(array, indices), tree)
    return taken


def _placed(layout: Layout | None, state: _State) -> _State:
    """Constrain the state to its layout."""

    def replicated(array: Array) -> Array:
        return constrain(layout, array, (None,) * array.ndim)

    return _State(
        Cache(
            tuple(constrain(layout, keys, KEYS) for keys in state.cache.keys),
            tuple(constrain(layout, values, VALUES) for values in state.cache.values),
            replicated(state.cache.lengths),
        ),
        constrain(layout, state.hidden, ("batch", None)),
        *jax.tree.map(replicated, state[2:]),
    )
