"""Episodes: the tokens sampled for prompts, one at a time and as arrays of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.tokenize.tokenizers import StreamDecoder

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

ASSISTANT = "assistant"
"""The author of turns that the model sampled."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete."""

    tokens: Sequence[int]
    """At least one."""
    index: int
    """Its index in the data, below 2**31. With the run's seed and the step it decides what is
    drawn: in one step, two prompts with the same index and tokens get the same completions."""


@dataclass(frozen=True)
class Turn:
    """Consecutive tokens of an episode that have one author."""

    author: str
    """A role of the conversation; `ASSISTANT` where the model sampled the turn."""
    tokens: list[int]
    log_probs: Floats
    """`[tokens]`, in nats, as in `Episodes.log_probs`."""
    mask: Bools
    """`[tokens]`: whether the loss counts the token."""


@dataclass(frozen=True)
class Episode:
    """A prompt and the turns that followed it."""

    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]
    truncated: bool
    """Ended by the limit of tokens, not by a stop token or string."""

    @property
    def tokens(self) -> list[int]:
        """The tokens of all turns."""
        return [token for turn in self.turns for token in turn.tokens]


@dataclass(frozen=True)
class Work:
    """Counts of the work that sampling did."""

    prefilled: int
    """Number of prompts that were prefilled."""
    decode_steps: int
    """Iterations of the decode loop: tokens drawn in each slot, whether it was active or not."""
    decode_calls: int
    """Number of calls of the decode program."""


@dataclass(frozen=True)
class Episodes:
    """Episodes as arrays, in the order of their prompts: those of prompt `i` are the rows from
    `i * group` to `(i + 1) * group`. Indexing gives one `Episode`.
    """

    prompts: tuple[tuple[int, ...], ...]
    group: int
    tokens: Ints
    """`[episodes, max_tokens]`: the tokens behind the prompt with the stop token, then padding."""
    lengths: Ints
    """`[episodes]`: the number of tokens, with the stop token."""
    log_probs: Floats
    """`[episodes, max_tokens]`, in nats: of each token under the model's own distribution at the
    temperature (at 1 where it is 0), without filters and penalty; 0 on padding. For the same
    parameters `cross_entropy.token_logprobs` gives the same values."""
    mask: Bools
    """`[episodes, max_tokens]`: true on tokens that the model sampled, which the loss counts."""
    truncated: Bools
    """`[episodes]`: ended by `max_tokens`, not by a stop token or string."""
    pad: int
    work: Work

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> Episode:
        if not 0 <= row < len(self):
            raise IndexError(row)
        span = slice(int(self.lengths[row]))
        turn = Turn(
            ASSISTANT,
            self.tokens[row, span].tolist(),
            self.log_probs[row, span],
            self.mask[row, span],
        )
        return Episode(self.prompts[row // self.group], (turn,), bool(self.truncated[row]))

    def __iter__(self) -> Iterator[Episode]:
        return (self[row] for row in range(len(self)))


def completion_texts(renderer: Renderer, episodes: Episodes) -> list[str]:
    """Return the text of each episode behind its prompt, without the tokens that end it."""
    return [
        renderer.tokenizer.decode(episode.tokens, continues=True, hide=renderer.stops)
        for episode in episodes
    ]


def token_texts(renderer: Renderer, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token; a character that several tokens make is the last one's."""
    decoder = StreamDecoder(renderer.tokenizer, renderer.stops)
    texts = [decoder.push(token) for token in tokens]
    return [*texts[:-1], texts[-1] + decoder.finish()] if texts else []
