"""A model in use: completions of prompts, turns of a conversation, verdicts of a judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.decode_loop import Engine, make_engine
from tunelang.runtime.evaluate import capacity_of, texts_of
from tunelang.runtime.examples import Example, Message
from tunelang.runtime.rollout import Prompt, rollout
from tunelang.runtime.workshop import Model

_VERDICT = Sampling.fixed(max_tokens=256, temperature=0.0)


@dataclass(frozen=True)
class Speaker:
    """A model with its parameters."""

    model: Model
    params: Any
    engines: dict[tuple[int, int], Engine] = field(default_factory=dict)
    """Slots and capacity -> the programs."""

    def complete(
        self, prompts: Sequence[str], sampling: Sampling, samples: int, seed: int, raw: bool
    ) -> Iterator[str]:
        """Give `samples` completions of each prompt in turn.

        `raw` goes on with the text itself; else the prompt is a user's turn of a conversation.
        """
        renderer = self.model.renderer
        tokens = [
            self._raw(text) if raw else renderer.prompt(Example("", 0, {}, prompt=text))
            for text in prompts
        ]
        yield from self._sample(tokens, sampling, samples, seed)

    def answer(self, messages: Sequence[Message], sampling: Sampling, seed: int) -> str:
        """Return the model's next turn of a conversation."""
        example = Example("", 0, {}, messages=tuple(messages))
        tokens = self.model.renderer.prompt(example)
        return next(self._sample([tokens], sampling, 1, seed))

    def _raw(self, text: str) -> list[int]:
        tokenizer = self.model.renderer.tokenizer
        start = [] if tokenizer.start is None else [tokenizer.start]
        return [*start, *tokenizer.encode(text)] or [tokenizer.pad]

    def _sample(
        self, tokens: Sequence[Sequence[int]], sampling: Sampling, samples: int, seed: int
    ) -> Iterator[str]:
        model, context = self.model, self.model.architecture.context
        room = context - max(len(ids) for ids in tokens)
        sampling = sampling.model_copy(
            update={"max_tokens": max(1, min(sampling.max_tokens, room))}
        )
        longest = context - sampling.max_tokens
        count = len(tokens) * samples
        sizes = (
            min(64, 1 << (count - 1).bit_length()),
            capacity_of(model, longest, sampling.max_tokens),
        )
        if sizes not in self.engines:
            slots, capacity = sizes
            self.engines[sizes] = make_engine(
                model.architecture, slots=slots, capacity=capacity, dtype=model.dtype
            )
        engine = self.engines[sizes]
        found = rollout(
            engine,
            self.params,
            [Prompt(ids[-longest:], at) for at, ids in enumerate(tokens)],
            sampling,
            group=samples,
            stop_ids=model.renderer.stops,
            seed=seed,
            step=0,
            pad=model.renderer.tokenizer.pad,
            tokenizer=model.renderer.tokenizer,
        )
        yield from texts_of(model, found)

    def judge(self, requests: Sequence[str]) -> list[str]:
        """Answer requests, each the user's only turn; see `judges.Ask`."""
        return list(self.complete(requests, _VERDICT, 1, 0, raw=False))
