"""The queue of a rollout: episodes that have no slot yet, and the prompts prefilled for them.

A prompt is prefilled once, when the first episode of its group gets a slot; its cache is kept until
the last has one. Prompts are padded to a power of two of tokens and run `PREFILL` at a time or one
at a time, so that few programs are compiled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool

from tunelang.runtime.generation.engine import Admission, Engine, Prefilled, Slots
from tunelang.runtime.generation.episodes import Ints, Prompt
from tunelang.runtime.models.parameters import Params

PREFILL = 8
"""Prompts per prefill call; fewer than this many are prefilled one at a time."""
ADMIT = 8
"""Slots that one call of `admit` fills at most: its copies are this large."""
MIN_PADDED_TOKENS = 16
"""The least length that prompts are padded to, in tokens."""


class SlotQueue:
    """Hands free slots to the next episodes."""

    def __init__(
        self, engine: Engine, params: Params, prompts: Sequence[Prompt], group: int, pad: int
    ) -> None:
        self.engine, self.params, self.prompts = engine, params, prompts
        self.group, self.pad = group, pad
        self.waiting = deque(range(len(prompts) * group))
        self.episode_of_slot = np.zeros(engine.slots, np.int32)
        self.prefilled = 0
        self._ready: dict[int, tuple[Prefilled, int]] = {}  # prompt -> its prefill, and row in it

    def fill(
        self, state: Slots, active: Bool[np.ndarray, " slots"]
    ) -> tuple[Slots, Bool[np.ndarray, " slots"]]:
        """Hand the free slots to the next episodes; returns the slots and which are active now."""
        free = np.flatnonzero(~active)[: len(self.waiting)]
        slot_of_episode = {self.waiting.popleft(): int(slot) for slot in free}
        needed = {episode // self.group for episode in slot_of_episode}
        self._prefill(sorted(needed - self._ready.keys()))
        batches: dict[int, list[int]] = {}
        for episode in slot_of_episode:
            batches.setdefault(id(self._ready[episode // self.group][0]), []).append(episode)
        for episodes in batches.values():
            for part in _chunks(episodes, ADMIT):
                state = self._admit(state, part, [slot_of_episode[episode] for episode in part])
        filled = active.copy()
        filled[free] = True
        self.episode_of_slot[free] = list(slot_of_episode)
        # Only the prompt at the head of the queue can have episodes that wait.
        head = self.waiting[0] // self.group if self.waiting else None
        self._ready = {prompt: row for prompt, row in self._ready.items() if prompt == head}
        return state, filled

    def _prefill(self, needed: list[int]) -> None:
        """Run prompts, those of one padded length together."""
        buckets: dict[int, list[int]] = {}
        for prompt in needed:
            size = max(MIN_PADDED_TOKENS, power_of_two(len(self.prompts[prompt].tokens)))
            buckets.setdefault(min(size, self.engine.capacity), []).append(prompt)
        for length, members in buckets.items():
            together = len(members) // PREFILL * PREFILL
            for part in (*_chunks(members[:together], PREFILL), *_chunks(members[together:], 1)):
                tokens = np.full((len(part), length), self.pad, np.int32)
                for row, prompt in enumerate(part):
                    ids = self.prompts[prompt].tokens
                    tokens[row, : len(ids)] = ids
                lengths = np.array([len(self.prompts[prompt].tokens) for prompt in part], np.int32)
                prefilled = self.engine.prefill(self.params, tokens, lengths)
                self.prefilled += len(part)
                self._ready.update({prompt: (prefilled, row) for row, prompt in enumerate(part)})

    def _admit(self, state: Slots, episodes: Sequence[int], slots: Sequence[int]) -> Slots:
        """Put episodes, whose prompts were prefilled together, into slots."""

        def padded(values: Sequence[int], fill: int = 0) -> Ints:
            return np.array([*values, *[fill] * (ADMIT - len(values))], np.int32)

        members = [episode // self.group for episode in episodes]
        admission = Admission(
            row=padded([self._ready[prompt][1] for prompt in members]),
            slot=padded(slots, self.engine.slots),
            completion=padded(episodes),
            prompt=padded([self.prompts[prompt].index for prompt in members]),
            sample=padded([episode % self.group for episode in episodes]),
        )
        return self.engine.admit(state, self._ready[members[0]][0], admission)


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below the number."""
    return 1 << max(0, number - 1).bit_length()


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
