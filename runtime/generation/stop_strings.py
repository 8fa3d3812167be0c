"""Stop strings: ends an episode right after the token whose text completes one of them.

Text exists on the host only, so the decode loop returns every few steps and the host searches. Some
slots are past their end by then; since no token depends on later ones, cutting those off leaves
exactly the episode that stopped in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int32

from tunelang.runtime.generation.engine import Slots
from tunelang.runtime.tokenize.tokenizers import Tokenizer


@dataclass
class StopStrings:
    """Searches drawn tokens for stop strings."""

    tokenizer: Tokenizer
    strings: Sequence[str]
    ends: dict[int, int] = field(default_factory=dict)
    """Episode -> its length, where a string ended it."""
    _searched: dict[int, int] = field(default_factory=dict)
    """Episode -> the number of its first tokens without a string."""

    def ended(
        self,
        state: Slots,
        ran: Bool[np.ndarray, " slots"],
        episode_of_slot: Int32[np.ndarray, " slots"],
    ) -> Bool[np.ndarray, " slots"]:
        """Return which of the slots that `ran` have an episode that a string ended."""
        tokens, lengths = (
            np.asarray(array[episode_of_slot])
            for array in (state.completions.tokens, state.completions.lengths)
        )
        ended = np.zeros(len(episode_of_slot), np.bool_)
        for slot in np.flatnonzero(ran).tolist():
            episode = int(episode_of_slot[slot])
            end = self._end(episode, tokens[slot, : lengths[slot]].tolist())
            if end is not None:
                self.ends[episode] = end
                ended[slot] = True
        return ended

    def _end(self, episode: int, ids: list[int]) -> int | None:
        """Return the least number of tokens whose text contains a string."""
        # The whole text, because the text of some tokens depends on those before them. Only where
        # it contains a string are the new tokens gone through one by one.
        if self._contains(ids):
            for count in range(self._searched.pop(episode, 0) + 1, len(ids)):
                if self._contains(ids[:count]):
                    return count
            return len(ids)
        self._searched[episode] = len(ids)
        return None

    def _contains(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids, continues=True)
        return any(string in text for string in self.strings)
