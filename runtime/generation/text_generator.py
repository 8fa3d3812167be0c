"""Generates with one loaded model: completions, chat turns, verdicts of a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunelang.compiler.costs.judge_costs import VERDICT_SLOTS, VERDICT_TOKENS
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.data.examples import Example, Message
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.engine_sizes import slot_capacity, slot_count
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Episodes, Prompt, completion_texts
from tunelang.runtime.generation.slot_queue import power_of_two
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.sharding import Layout

_VERDICT = Sampling.unvalidated(max_tokens=VERDICT_TOKENS, temperature=0.0)
_SHORTEST = 64
"""Least length of prompts that programs are made for, in tokens; longer ones double it."""


@dataclass(frozen=True)
class TextGenerator:
    """A model with its parameters, in a layout for decoding."""

    model: Model
    params: Params
    layout: Layout

    @property
    def slots(self) -> int:
        """Completions that are sampled at once: 64 in each group of devices."""
        return VERDICT_SLOTS * self.layout.batch_shards

    def sample(
        self, prompts: Sequence[str], sampling: Sampling, samples: int, seed: int, raw: bool
    ) -> Episodes:
        """Sample `samples` episodes of each prompt.

        `raw` continues the text itself; else the prompt is a user's turn of a conversation.
        """
        return self._sample(self._tokens(prompts, raw), sampling, samples, seed)

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, samples: int, seed: int, raw: bool
    ) -> Iterator[str]:
        """Yield the texts of `samples` completions of each prompt, sampled as by `sample`."""
        yield from completion_texts(
            self.model.renderer, self.sample(prompts, sampling, samples, seed, raw)
        )

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
        """Yield the texts of the `returned` best completions of each prompt, by beam search."""
        model = self.model
        cut, max_tokens = self._cut(self._tokens(prompts, raw), max_tokens)
        longest = max(len(prompt.tokens) for prompt in cut)
        search = make_search(
            model.architecture,
            prompts=slot_count(len(cut), max(1, self.slots // beams)),
            beams=beams,
            capacity=slot_capacity(model.architecture, longest, max_tokens),
            dtype=model.dtype,
            layout=self.layout,
        )
        best = beam_search(
            search,
            self.params,
            cut,
            max_tokens=max_tokens,
            stop_ids=model.renderer.stops,
            pad=model.renderer.tokenizer.pad,
            length_penalty=length_penalty,
            returned=returned,
        )
        yield from completion_texts(model.renderer, best)

    def answer(self, messages: Sequence[Message], sampling: Sampling, seed: int) -> str:
        """Return the model's next turn of a conversation."""
        renderer = self.model.renderer
        tokens = renderer.prompt(Example("", 0, {}, messages=tuple(messages)))
        return completion_texts(renderer, self._sample([tokens], sampling, 1, seed))[0]

    def judge(self, requests: Sequence[str]) -> list[str]:
        """Return the answer to each request, which is the user's only turn (a `rubric.Ask`)."""
        return list(self.complete(requests, _VERDICT, 1, 0, raw=False))

    def _tokens(self, prompts: Sequence[str], raw: bool) -> list[list[int]]:
        if raw:
            return [self._raw(text) for text in prompts]
        return [self.model.renderer.prompt(Example("", 0, {}, prompt=text)) for text in prompts]

    def _raw(self, text: str) -> list[int]:
        tokenizer = self.model.renderer.tokenizer
        start = [] if tokenizer.start is None else [tokenizer.start]
        return [*start, *tokenizer.encode(text)] or [tokenizer.pad]

    def _cut(self, tokens: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[Prompt], int]:
        """Return prompts without the beginning that does not fit into the context, and the number
        of tokens of a completion that fit behind them.
        """
        context = self.model.architecture.context
        fitting = max(1, min(max_tokens, context - max(len(ids) for ids in tokens)))
        return [Prompt(ids[fitting - context :], i) for i, ids in enumerate(tokens)], fitting

    def _sample(
        self, tokens: Sequence[Sequence[int]], sampling: Sampling, samples: int, seed: int
    ) -> Episodes:
        prompts, max_tokens = self._cut(tokens, sampling.max_tokens)
        longest = max(_SHORTEST, *(len(prompt.tokens) for prompt in prompts))
        sampler = Sampler.open(
            self.model,
            self.layout,
            sampling.model_copy(update={"max_tokens": max_tokens}),
            slots=slot_count(len(tokens) * samples, self.slots),
            longest=power_of_two(longest),
        )
        return sampler.sample(self.params, prompts, group=samples, seed=seed)
