"""A model in use: completions of prompts, turns of a conversation, verdicts of a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunelang.compiler.costs.judge_costs import VERDICT_SLOTS, VERDICT_TOKENS
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.data.examples import Example, Message
from tunelang.runtime.evals.run_evals import (
    capacity_of,
    rows_of,
    sampled_everywhere,
    slots_of,
    texts_of,
)
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.engine import Engine, make_engine
from tunelang.runtime.generation.rollout import Prompt, Rollouts, rollout
from tunelang.runtime.loading.initial_weights import Origin, loaded
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.rewards.reward_functions import Reward
from tunelang.runtime.sharding import Layout

_VERDICT = Sampling.unvalidated(max_tokens=VERDICT_TOKENS, temperature=0.0)
_SHORTEST = 64
"""Tokens of prompts that programs have room for, at least; then twice as many."""


class UnscoredError(Exception):
    """A reward has a value for no completion: what its part `part` lacks is in `why`."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(part, why)
        self.part = part
        self.why = why


@dataclass(frozen=True)
class TextGenerator:
    """A model with its parameters."""

    model: Model
    params: Any
    layout: Layout
    engines: dict[tuple[int, int], Engine] = field(default_factory=dict)
    """Slots and capacity -> the programs."""

    @classmethod
    def of(cls, origin: Origin, resources: Resources) -> TextGenerator:
        """Load a model, over all devices; raises what `loaded` and `Resources.model` raise."""
        model = resources.model(origin.model)
        layout = sampled_everywhere(resources, model)
        return cls(model, loaded(origin, model, layout, 0), layout)

    @property
    def slots(self) -> int:
        """How many completions it makes at once: 64 in each group of devices."""
        return VERDICT_SLOTS * self.layout.batch_shards

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, samples: int, seed: int, raw: bool
    ) -> Iterator[str]:
        """Give `samples` completions of each prompt in turn.

        `raw` goes on with the text itself; else the prompt is a user's turn of a conversation.
        """
        found = self._sample(self._tokens(prompts, raw), sampling, samples, seed)
        yield from texts_of(self.model, found)

    def best(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        samples: int,
        seed: int,
        raw: bool,
        *,
        returned: int = 1,
        reward: Reward | None = None,
    ) -> Iterator[str]:
        """Give of `samples` completions of each prompt the `returned` best.

        Best by the reward, which is given the prompt and the completion, or without one by the mean
        log-probability of a token, at the temperature. Raises `UnscoredError`.
        """
        found = self._sample(self._tokens(prompts, raw), sampling, samples, seed)
        texts = texts_of(self.model, found)
        values = found.log_probs.sum(1) / found.lengths
        if reward is not None:
            scores = reward.score(rows_of(self.model, _examples(prompts), found, texts))
            if len({event.row for event in scores.events}) == len(texts):
                raise UnscoredError(scores.events[0].part, scores.events[0].why)
            values = scores.values
        for at, group in enumerate(values.reshape(-1, samples)):
            for place in np.argsort(-group, kind="stable")[:returned].tolist():
                yield texts[at * samples + place]

    def search(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        raw: bool,
        *,
        beams: int,
        length_penalty: float = 1.0,
        returned: int = 1,
    ) -> Iterator[str]:
        """Give the `returned` best completions of each prompt that a beam search finds."""
        model = self.model
        asked, max_tokens = self._asked(self._tokens(prompts, raw), max_tokens)
        longest = max(len(prompt.tokens) for prompt in asked)
        program = make_search(
            model.architecture,
            prompts=slots_of(len(asked), max(1, self.slots // beams)),
            beams=beams,
            capacity=capacity_of(model, longest, max_tokens),
            dtype=model.dtype,
            layout=self.layout,
        )
        found = beam_search(
            program,
            self.params,
            asked,
            max_tokens=max_tokens,
            stop_ids=model.renderer.stops,
            pad=model.renderer.tokenizer.pad,
            length_penalty=length_penalty,
            returned=returned,
        )
        yield from texts_of(model, found)

    def answer(self, messages: Sequence[Message], sampling: Sampling, seed: int) -> str:
        """Return the model's next turn of a conversation."""
        example = Example("", 0, {}, messages=tuple(messages))
        tokens = self.model.renderer.prompt(example)
        return texts_of(self.model, self._sample([tokens], sampling, 1, seed))[0]

    def _tokens(self, prompts: Sequence[str], raw: bool) -> list[list[int]]:
        if raw:
            return [self._raw(text) for text in prompts]
        return [self.model.renderer.prompt(example) for example in _examples(prompts)]

    def _raw(self, text: str) -> list[int]:
        tokenizer = self.model.renderer.tokenizer
        start = [] if tokenizer.start is None else [tokenizer.start]
        return [*start, *tokenizer.encode(text)] or [tokenizer.pad]

    def _asked(self, tokens: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[Prompt], int]:
        """Return prompts, their beginning cut off, and the tokens of a completion that fit into
        the context with them.
        """
        context = self.model.architecture.context
        most = max(1, min(max_tokens, context - max(len(ids) for ids in tokens)))
        return [Prompt(ids[most - context :], at) for at, ids in enumerate(tokens)], most

    def _sample(
        self, tokens: Sequence[Sequence[int]], sampling: Sampling, samples: int, seed: int
    ) -> Rollouts:
        model = self.model
        asked, most = self._asked(tokens, sampling.max_tokens)
        count = len(tokens) * samples
        longest = max(_SHORTEST, *(len(prompt.tokens) for prompt in asked))
        sizes = (
            slots_of(count, self.slots),
            capacity_of(model, 1 << (longest - 1).bit_length(), most),
        )
        if sizes not in self.engines:
            slots, capacity = sizes
            self.engines[sizes] = make_engine(
                model.architecture, slots=slots, capacity=capacity, dtype=model.dtype,
                layout=self.layout,
            )  # fmt: skip
        return rollout(
            self.engines[sizes],
            self.params,
            asked,
            sampling.model_copy(update={"max_tokens": most}),
            group=samples,
            stop_ids=model.renderer.stops,
            seed=seed,
            step=0,
            pad=model.renderer.tokenizer.pad,
            tokenizer=model.renderer.tokenizer,
        )

    def judge(self, requests: Sequence[str]) -> list[str]:
        """Answer requests, each the user's only turn; see `judges.Ask`."""
        return list(self.complete(requests, _VERDICT, 1, 0, raw=False))


def _examples(prompts: Sequence[str]) -> list[Example]:
    return [Example("", 0, {}, prompt=text) for text in prompts]
