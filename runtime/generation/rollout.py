"""Rollouts: groups of completions of prompts, sampled with the training parameters themselves.

The host's half: a queue of completions, slots that they are handed to, and the values that come
back. The device's half is `decode_loop.py`. A prompt is prefilled once, when the first completion
of its group gets a slot; it is kept until the last has one. Prompts are padded to a power of two
of tokens and run eight at a time or one at a time, so that few programs are compiled.

No completion depends on how many slots there are, which one it ran in, or what ran beside it: its
random keys are those of (seed, step, prompt, sample, position), and slots do not see each other.

A stop string ends a completion right after the token with which the text of its tokens first
contains the string. Text exists on the host only, so the loop returns every few turns and the host
looks. Some slots have gone past their end by then, but since nothing depends on what comes later,
cutting that off leaves exactly the completion that stopped in time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation.engine import Admission, Engine, Prefilled, Request, Slots
from tunelang.runtime.generation.token_sampling import slot_settings
from tunelang.runtime.sharding import reshard_for_decoding
from tunelang.runtime.tokenize.tokenizers import Tokenizer

PREFILL = 8
"""Prompts that are run together where there are so many."""
ADMIT = 8
"""Slots that one call of `admit` fills at most: its copies are this large."""
SHORTEST = 16
"""The least length that prompts are padded to, in tokens."""
TEXT_TURNS = 16
"""Turns of the loop after which the host looks for stop strings."""

_NO_LIMIT = np.iinfo(np.int32).max

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete."""

    tokens: Sequence[int]
    """At least one."""
    index: int
    """Its index in the data, below 2**31. With the run's seed and the step it decides what is
    drawn: in one step, two prompts with the same index and tokens get the same completions."""


@dataclass(frozen=True)
class Work:
    """What a rollout took."""

    prefilled: int
    """Prompts that were prefilled."""
    turns: int
    """Turns of the loop: tokens drawn in each slot, whether it was active or not."""
    rounds: int
    """How often the loop was entered."""


@dataclass(frozen=True)
class Rollouts:
    """Completions, in the order of their prompts: those of prompt `i` are the rows from
    `i * group` to `(i + 1) * group`.
    """

    prompts: tuple[tuple[int, ...], ...]
    group: int
    tokens: Ints
    """`[completions, max_tokens]`: the stop token included; padding behind."""
    lengths: Ints
    """`[completions]`: the number of tokens, with the stop token."""
    log_probs: Floats
    """`[completions, max_tokens]`, in nats: of each token under the model's own distribution at the
    temperature (at 1 where it is 0), without filters and penalty; 0 behind the last. It is what
    `losses.token_logprobs` gives for the same parameters."""
    truncated: Bools
    """`[completions]`: ended by `max_tokens`, not by a stop token or string."""
    pad: int
    work: Work

    def completion(self, row: int) -> list[int]:
        """Return the tokens of one completion."""
        ids: list[int] = self.tokens[row, : self.lengths[row]].tolist()
        return ids


def rollout(
    engine: Engine,
    params: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    group: int,
    stop_ids: Sequence[int],
    seed: int,
    step: int,
    pad: int,
    tokenizer: Tokenizer | None = None,
) -> Rollouts:
    """Sample `group` completions of each prompt.

    `params` are the decoder's, as they are trained: they are arguments of every program, so the
    next call samples from what they are then. They are brought to where the engine has them, once
    for all completions. `stop_ids` end a completion and belong to it; so do
    the strings of `sampling.stop`, for which the `tokenizer` is needed. `seed` (the run's, of which
    32 bits count) and `step` (of training) decide what is drawn.

    Raises `ValueError` for a prompt that is empty or too long for a slot, a group below 1, and stop
    strings without a tokenizer.
    """
    _check(engine, prompts, sampling, group, tokenizer)
    params = reshard_for_decoding(params, engine.layout)
    count = len(prompts) * group
    queue = _Queue(engine, params, prompts, group, pad)
    watch = _StopStrings(tokenizer, sampling.stop) if tokenizer and sampling.stop else None
    penalised = sampling.repetition_penalty != 1
    # Rows to spare, so that a few more or fewer prompts use the same program.
    state = engine.empty(_power_of_two(count), sampling.max_tokens, penalised)
    stops = np.full(_power_of_two(max(4, len(stop_ids))), -1, np.int32)
    stops[: len(stop_ids)] = stop_ids
    settings = slot_settings(sampling, engine.slots)

    active = np.zeros(engine.slots, np.bool_)
    turns = rounds = 0
    while queue.waiting or active.any():
        state, active = queue.fill(state, active)
        waiting = len(queue.waiting)
        request = Request(
            settings,
            stops,
            np.uint32(seed % 2**32),
            np.int32(step),
            until_free=np.int32(min(engine.refill_at, waiting) if waiting else engine.slots),
            most=np.int32(TEXT_TURNS if watch else _NO_LIMIT),
        )
        state, taken = engine.decode(params, state, active, request)
        still = np.asarray(state.active)
        if watch:
            still = still & ~watch.ended(state, active, queue.owner)
        active, turns, rounds = still, turns + int(taken), rounds + 1
    work = Work(queue.prefilled, turns, rounds)
    return _rollouts(state, prompts, group, pad, watch.ends if watch else {}, work)


class _Queue:
    """The completions that have no slot yet, and the prompts that are prefilled for them."""

    def __init__(
        self, engine: Engine, params: Any, prompts: Sequence[Prompt], group: int, pad: int
    ) -> None:
        self.engine, self.params, self.prompts = engine, params, prompts
        self.group, self.pad = group, pad
        self.waiting = deque(range(len(prompts) * group))
        self.owner = np.zeros(engine.slots, np.int32)  # the completion of each slot
        self.prefilled = 0
        self._ready: dict[int, tuple[Prefilled, int]] = {}  # prompt -> where it is

    def fill(self, state: Slots, active: Bools) -> tuple[Slots, Bools]:
        """Hand the free slots to the next completions; returns which are active now."""
        free = np.flatnonzero(~active)[: len(self.waiting)]
        taken = {self.waiting.popleft(): int(slot) for slot in free}
        needed = {completion // self.group for completion in taken}
        self._prefill(sorted(needed - self._ready.keys()))
        batches: dict[int, list[int]] = {}
        for completion in taken:
            batches.setdefault(id(self._ready[completion // self.group][0]), []).append(completion)
        for completions in batches.values():
            for part in _parts(completions, ADMIT):
                state = self._admit(state, part, [taken[each] for each in part])
        now = active.copy()
        now[free] = True
        self.owner[free] = list(taken)
        # Only the prompt at the head of the queue may have completions that still wait.
        head = self.waiting[0] // self.group if self.waiting else None
        self._ready = {prompt: at for prompt, at in self._ready.items() if prompt == head}
        return state, now

    def _prefill(self, needed: list[int]) -> None:
        buckets: dict[int, list[int]] = {}
        for prompt in needed:
            size = max(SHORTEST, _power_of_two(len(self.prompts[prompt].tokens)))
            buckets.setdefault(min(size, self.engine.capacity), []).append(prompt)
        for length, members in buckets.items():
            whole = len(members) // PREFILL * PREFILL
            for part in (*_parts(members[:whole], PREFILL), *_parts(members[whole:], 1)):
                tokens = np.full((len(part), length), self.pad, np.int32)
                for row, prompt in enumerate(part):
                    ids = self.prompts[prompt].tokens
                    tokens[row, : len(ids)] = ids
                lengths = np.array([len(self.prompts[prompt].tokens) for prompt in part], np.int32)
                run = self.engine.prefill(self.params, tokens, lengths)
                self.prefilled += len(part)
                self._ready.update({prompt: (run, row) for row, prompt in enumerate(part)})

    def _admit(self, state: Slots, completions: Sequence[int], slots: Sequence[int]) -> Slots:
        """Put completions, whose prompts were prefilled together, into slots."""

        def padded(values: Sequence[int], rest: int = 0) -> Ints:
            return np.array([*values, *[rest] * (ADMIT - len(values))], np.int32)

        members = [completion // self.group for completion in completions]
        admission = Admission(
            row=padded([self._ready[prompt][1] for prompt in members]),
            slot=padded(slots, self.engine.slots),
            completion=padded(completions),
            prompt=padded([self.prompts[prompt].index for prompt in members]),
            sample=padded([completion % self.group for completion in completions]),
        )
        return self.engine.admit(state, self._ready[members[0]][0], admission)


@dataclass
class _StopStrings:
    """Looks for stop strings in what was drawn."""

    tokenizer: Tokenizer
    strings: Sequence[str]
    ends: dict[int, int] = field(default_factory=dict)
    """Completion -> its length, where a string ended it."""
    looked: dict[int, int] = field(default_factory=dict)
    """Completion -> how many of its tokens hold no string."""

    def ended(self, state: Slots, ran: Bools, owner: Ints) -> Bools:
        """Which slots hold a completion that a string ended, of those that `ran`, `[slots]`."""
        tokens, lengths = (
            np.asarray(array[owner]) for array in (state.written.tokens, state.written.lengths)
        )
        found = np.zeros(len(owner), np.bool_)
        for slot in np.flatnonzero(ran).tolist():
            completion = int(owner[slot])
            end = self._end(completion, tokens[slot, : lengths[slot]].tolist())
            if end is not None:
                self.ends[completion] = end
                found[slot] = True
        return found

    def _end(self, completion: int, ids: list[int]) -> int | None:
        """Return the least number of tokens whose text contains a string."""
        # The whole text, because the text of some tokens depends on those before them. Only where
        # it contains a string are the new tokens gone through one by one.
        if self._contains(ids):
            for count in range(self.looked.pop(completion, 0) + 1, len(ids)):
                if self._contains(ids[:count]):
                    return count
            return len(ids)
        self.looked[completion] = len(ids)
        return None

    def _contains(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, continues=True)
        return any(string in text for string in self.strings)


def _check(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    group: int,
    tokenizer: Tokenizer | None,
) -> None:
    if group < 1:
        raise ValueError(f"{group} completions of each prompt")
    if sampling.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    for prompt in prompts:
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.index} is empty")
        if len(prompt.tokens) + sampling.max_tokens > engine.capacity:
            raise ValueError(
                f"prompt {prompt.index} of {len(prompt.tokens)} tokens and a completion of"
                f" {sampling.max_tokens} for a slot of {engine.capacity}"
            )


def _rollouts(
    state: Slots,
    prompts: Sequence[Prompt],
    group: int,
    pad: int,
    ends: dict[int, int],
    work: Work,
) -> Rollouts:
    """Fetch what was written, and cut off what lies behind a stop string."""
    count = len(prompts) * group
    found = jax.device_get(state.written)
    lengths, stopped = found.lengths[:count].copy(), found.stopped[:count].copy()
    for completion, end in ends.items():
        lengths[completion], stopped[completion] = end, True
    inside = np.arange(found.tokens.shape[1]) < lengths[:, None]
    return Rollouts(
        prompts=tuple(tuple(prompt.tokens) for prompt in prompts),
        group=group,
        tokens=np.where(inside, found.tokens[:count], np.int32(pad)),
        lengths=lengths,
        log_probs=np.where(inside, found.log_probs[:count], np.float32(0)),
        truncated=~stopped,
        pad=pad,
        work=work,
    )


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below the number."""
    return 1 << max(0, number - 1).bit_length()


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
