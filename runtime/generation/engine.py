"""The device's half of a rollout: slots of a KV cache, and the jitted loop that fills them.

Four programs. `empty` makes the slots, `prefill` runs prompts, `admit` copies a prefilled prompt
into the slots of its completions, and `decode` draws tokens in all slots at once, in one
`lax.while_loop`. `episode_sampler.py` calls them.

A step of the loop draws a token from the hidden state that a slot holds, then runs the decoder on
it. So the first token of a completion, whose hidden state comes from the prefill, is drawn by the
same code as all others, and to admit a prompt is to copy.

What is drawn is written straight to the row of its completion. So the results have the order of
the prompts whatever slot they ran in, and the host fetches them once, at the end; when a slot
becomes free, it only has to learn which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from numpy.typing import NDArray

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.generation.token_sampling import SlotSettings, sample_tokens, token_keys
from tunelang.runtime.models.decode_step import DecodeWeights, decode_step, decode_weights
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.kv_cache import KEYS, VALUES, Cache, empty_cache, insert
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.sharding import Axes, Layout, constrain, jit, platform

ProgramInput = Array | NDArray[Any] | np.generic
"""An array that the host passes to a program: numpy as a rule, which is the same on every host."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Completions:
    """The tokens drawn so far, a row for each completion, with spare rows at the end."""

    tokens: Array
    """`[rows, max_tokens]` int32."""
    log_probs: Array
    """`[rows, max_tokens]` float32: `plain_log_prob` of `token_sampling.Draw`, in nats."""
    lengths: Array
    """`[rows]` int32: the number of tokens drawn; the rest of the row is 0."""
    stopped: Array
    """`[rows]` bool: whether the last token is a stop token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """The state of the decode loop."""

    cache: Cache
    hidden: Array
    """`[slots, width]`: of each slot's last token; the next one is drawn from it."""
    seen: Array | None
    """`[slots, vocab]` bool: the tokens of prompt and completion so far; only where there is a
    repetition penalty."""
    active: Array
    """`[slots]` bool: whether the slot's completion goes on."""
    completion: Array
    """`[slots]` int32: the row of `written` that the slot writes."""
    prompt: Array
    """`[slots]` int32: the index of its prompt in the data, for its random keys."""
    sample: Array
    """`[slots]` int32: which of the prompt's group, for its random keys."""
    drawn: Array
    """`[slots]` int32: tokens of its completion so far."""
    completions: Completions


class Prefilled(NamedTuple):
    """Prompts that the decoder has run, ready to be admitted."""

    hidden: Array
    """`[prompts, width]`: of each prompt's last token."""
    cache: Cache
    tokens: Array
    """`[prompts, length]` int32."""


class Admission(NamedTuple):
    """Assigns prompts to slots, all `[count]` int32; a slot beyond the last is left out."""

    row: ProgramInput
    """The row of the prompt in `Prefilled`."""
    slot: ProgramInput
    completion: ProgramInput
    prompt: ProgramInput
    sample: ProgramInput


class DecodeRequest(NamedTuple):
    """The arguments of `decode`, all as arrays: to change any of them compiles nothing."""

    settings: SlotSettings
    stop_ids: ProgramInput
    """`[stops]` int32; -1 for none."""
    seed: ProgramInput
    """uint32 scalar: the run's."""
    step: ProgramInput
    """int32 scalar: the training step."""
    until_free: ProgramInput
    """int32 scalar: the loop ends when so many slots are free."""
    max_steps: ProgramInput
    """int32 scalar: the loop ends after so many steps."""


@dataclass(frozen=True)
class Engine:
    """The compiled programs of sampling for one architecture and one set of sizes."""

    slots: int
    capacity: int
    """Tokens of a slot: prompt and completion."""
    refill_at: int
    """Free slots at which the loop returns, so that the host refills them."""
    empty: Callable[[int, int, bool], Slots]
    """`(rows, max_tokens, whether there is a repetition penalty) -> slots`."""
    prefill: Callable[[Params, ProgramInput, ProgramInput], Prefilled]
    """`(params, tokens [prompts, length], lengths [prompts]) -> prefilled`."""
    admit: Callable[[Slots, Prefilled, Admission], Slots]
    """The slots that go in are used up."""
    decode: Callable[[Params, Slots, ProgramInput, DecodeRequest], tuple[Slots, Array]]
    """`(params, slots, keep, request) -> slots, steps`. Slots that `keep` `[slots]` leaves out end
    before the first step. The slots that go in are used up."""
    layout: Layout | None = None
    """The layout of the parameters that the programs take."""


def make_engine(
    architecture: Architecture,
    *,
    slots: int,
    capacity: int,
    dtype: DTypeLike = jnp.float32,
    layout: Layout | None = None,
) -> Engine:
    """Make the programs of sampling; each compiles at its first call.

    `slots` completions run at once, each of at most `capacity` tokens with its prompt. `dtype`, of
    activations and cache, and `layout` should be those of the training program, whose parameters
    the programs take as they are. The loop returns when an eighth of the slots are free. Raises
    `ValueError` where a size is out of range.

    To refill slots inside the loop, the cache of every prompt of the step would have to be in
    memory. To return for each free slot would cost a round trip to the host and a copy for every
    completion; to return only when all are free would leave slots idle until the longest
    completion ends.
    """
    if not 1 <= capacity <= architecture.context:
        raise ValueError(
            f"slots of {capacity} tokens for a context of {architecture.context} tokens"
        )
    if slots < 1:
        raise ValueError(f"{slots} slots")
    graph, _ = abstract_decoder(architecture, dtype)
    copied = copies_weights(architecture, dtype, layout)

    def empty(rows: int, max_tokens: int, penalised: bool) -> Slots:
        state = _empty(architecture, slots, capacity, dtype, rows, max_tokens, penalised)
        return _placed(layout, state)

    def prefill(params: Params, tokens: Array, lengths: Array) -> Prefilled:
        decoder: Decoder = nnx.merge(graph, params)
        hidden, cache = decoder.prefill(tokens, lengths, layout=layout)
        return Prefilled(hidden, cache, tokens)

    def admit(state: Slots, prompts: Prefilled, admission: Admission) -> Slots:
        return _placed(layout, _admit(state, prompts, admission))

    def decode(
        params: Params, state: Slots, keep: Array, request: DecodeRequest
    ) -> tuple[Slots, Array]:
        decoder: Decoder = nnx.merge(graph, params)
        if copied and architecture.adapters:
            decoder = decoder.merge_adapters()
        state = replace(state, active=state.active & keep)
        return _decode_loop(decoder, state, request, layout, copied)

    return Engine(
        slots, capacity, max(1, slots // 8),
        empty=jit(empty, layout, static_argnums=(0, 1, 2)),
        prefill=jit(prefill, layout),
        admit=jit(admit, layout, donate_argnums=0),
        decode=jit(decode, layout, donate_argnums=1),
        layout=layout,
    )  # fmt: skip


def copies_weights(architecture: Architecture, dtype: DTypeLike, layout: Layout | None) -> bool:
    """Return whether a decode loop copies the weights once, ahead of its steps.

    It does where every step would convert or copy them. Quantised weights are not copied: that
    would take the memory that they save.
    """
    quantised = architecture.storage in ("nf4", "int8")
    return not quantised and (dtype != jnp.float32 or platform(layout) == "cpu")


def _decode_loop(
    decoder: Decoder, state: Slots, request: DecodeRequest, layout: Layout | None, copied: bool
) -> tuple[Slots, Array]:
    """Run decode steps until enough slots are free, or the limit; returns also their number."""
    graph, params = nnx.split(decoder)
    copies = decode_weights(decoder) if copied else None
    slots = state.active.shape[0]

    def unfinished(carry: tuple[Slots, Array]) -> Array:
        state, steps = carry
        free = slots - jnp.sum(state.active, dtype=jnp.int32)
        return (free < jnp.asarray(request.until_free)) & (steps < jnp.asarray(request.max_steps))

    def step(carry: tuple[Slots, Array]) -> tuple[Slots, Array]:
        state, steps = carry
        decoder: Decoder = nnx.merge(graph, params)
        weights = decode_weights(decoder) if copies is None else copies
        return _placed(layout, _step(decoder, weights, state, request, layout)), steps + 1

    return jax.lax.while_loop(unfinished, step, (state, jnp.zeros((), jnp.int32)))


def _empty(
    architecture: Architecture,
    slots: int,
    capacity: int,
    dtype: DTypeLike,
    rows: int,
    max_tokens: int,
    penalised: bool,
) -> Slots:
    def zeros(*shape: int, dtype: DTypeLike = jnp.int32) -> Array:
        return jnp.zeros(shape, dtype)

    return Slots(
        cache=empty_cache(architecture, slots, capacity, dtype),
        hidden=zeros(slots, architecture.width, dtype=dtype),
        seen=zeros(slots, architecture.vocabulary, dtype=bool) if penalised else None,
        active=zeros(slots, dtype=bool),
        completion=zeros(slots),
        prompt=zeros(slots),
        sample=zeros(slots),
        drawn=zeros(slots),
        completions=Completions(
            tokens=zeros(rows, max_tokens),
            log_probs=zeros(rows, max_tokens, dtype=jnp.float32),
            lengths=zeros(rows),
            stopped=zeros(rows, dtype=bool),
        ),
    )


def _admit(state: Slots, prompts: Prefilled, admission: Admission) -> Slots:
    """Copy prefilled prompts into slots, over all state of the slots' last completions."""
    row, slot = jnp.asarray(admission.row), jnp.asarray(admission.slot)

    def put(into: Array, values: ProgramInput | bool | int) -> Array:
        return into.at[slot].set(values, mode="drop")

    seen = state.seen
    if seen is not None:
        seen = put(seen, _occurring(prompts, seen.shape[1])[row])
    return Slots(
        # Keys and values behind the prompt stay as they were: attention does not look behind
        # `lengths`, and a token is written before it is looked at.
        cache=insert(state.cache, prompts.cache, row, slot),
        hidden=put(state.hidden, prompts.hidden[row]),
        seen=seen,
        active=put(state.active, True),
        completion=put(state.completion, admission.completion),
        prompt=put(state.prompt, admission.prompt),
        sample=put(state.sample, admission.sample),
        drawn=put(state.drawn, 0),
        completions=state.completions,
    )


def _occurring(prompts: Prefilled, vocab: int) -> Array:
    """Return which tokens occur in each prompt, bool `[prompts, vocab]`."""
    count, length = prompts.tokens.shape
    inside = jnp.arange(length) < prompts.cache.lengths[:, None]
    tokens = jnp.where(inside, prompts.tokens, vocab)
    rows = jnp.arange(count)[:, None]
    return jnp.zeros((count, vocab), bool).at[rows, tokens].set(True, mode="drop")


def _step(
    decoder: Decoder,
    weights: DecodeWeights,
    state: Slots,
    request: DecodeRequest,
    layout: Layout | None,
) -> Slots:
    """Draw one token in every slot, record it where the slot is active, and run the decoder."""
    completions = state.completions
    seed, step = jnp.asarray(request.seed), jnp.asarray(request.step)
    keys = token_keys(seed, step, state.prompt, state.sample, state.drawn)
    draw = sample_tokens(
        decoder.logits(state.hidden, weights.head), keys, request.settings, state.seen
    )
    stopped = jnp.any(draw.token[:, None] == request.stop_ids, axis=-1)
    drawn = state.drawn + state.active
    active = state.active & ~stopped & (drawn < completions.tokens.shape[1])
    # A slot that is not active writes to a row out of bounds, which is dropped.
    row = jnp.where(state.active, state.completion, completions.tokens.shape[0])
    completions = Completions(
        tokens=completions.tokens.at[row, state.drawn].set(draw.token, mode="drop"),
        log_probs=completions.log_probs.at[row, state.drawn].set(draw.plain_log_prob, mode="drop"),
        lengths=completions.lengths.at[row].set(drawn, mode="drop"),
        stopped=completions.stopped.at[row].set(stopped, mode="drop"),
    )
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(seen.shape[0]), draw.token].set(True)
    hidden, cache = decode_step(decoder, draw.token, state.cache, weights, layout=layout)
    # A finished slot's length stays, or it would grow past the capacity while the slot waits.
    cache = replace(cache, lengths=jnp.where(active, cache.lengths, state.cache.lengths))
    return replace(
        state,
        cache=cache,
        hidden=hidden,
        seen=seen,
        active=active,
        drawn=drawn,
        completions=completions,
    )


def abstract_slots(
    architecture: Architecture,
    slots: int,
    capacity: int,
    dtype: DTypeLike,
    rows: int,
    max_tokens: int,
    layout: Layout,
) -> Slots:
    """Return the slots as shapes and shardings, which `decode.lower` takes for arrays."""
    state = jax.eval_shape(
        lambda: _empty(architecture, slots, capacity, dtype, rows, max_tokens, False)
    )

    def place(array: Array, axes: Axes) -> Any:
        sharding = layout.sharding(axes, array.shape)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return _map_axes(place, state)


def _placed(layout: Layout | None, state: Slots) -> Slots:
    """Constrain the slots to one layout for every program, or they would be copied in between."""
    return _map_axes(lambda array, axes: constrain(layout, array, axes), state)


def _map_axes(place: Callable[[Array, Axes], Array], state: Slots) -> Slots:
    """Call `place` with each array of the slots and its logical axes."""

    def replicated(array: Array) -> Array:
        return place(array, (None,) * array.ndim)

    def batch_split(array: Array) -> Array:
        return place(array, ("batch", None))

    return Slots(
        cache=Cache(
            tuple(place(keys, KEYS) for keys in state.cache.keys),
            tuple(place(values, VALUES) for values in state.cache.values),
            replicated(state.cache.lengths),
        ),
        hidden=batch_split(state.hidden),
        seen=None if state.seen is None else batch_split(state.seen),
        active=replicated(state.active),
        completion=replicated(state.completion),
        prompt=replicated(state.prompt),
        sample=replicated(state.sample),
        drawn=replicated(state.drawn),
        completions=jax.tree.map(replicated, state.completions),
    )
