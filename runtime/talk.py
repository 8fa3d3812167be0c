"""`tune generate`, `tune chat`, `tune export`: the model that a stage yielded, in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.stages import Export
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.decode_loop import make_engine
from tunelang.runtime.evaluate import capacity_of, texts_of
from tunelang.runtime.examples import Example, Message
from tunelang.runtime.execute import compile_cache
from tunelang.runtime.export import export
from tunelang.runtime.origins import Origin, Origins, loaded
from tunelang.runtime.prepare import prepare
from tunelang.runtime.rollout import Prompt, rollout
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.store import Store
from tunelang.runtime.workshop import Model, Workshop


@dataclass(frozen=True)
class Speaker:
    """A model with its parameters."""

    model: Model
    params: Any

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
        engine = make_engine(
            model.architecture,
            slots=min(64, 1 << (count - 1).bit_length()),
            capacity=capacity_of(model, longest, sampling.max_tokens),
            dtype=model.dtype,
        )
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


def open_speaker(program: Program, store: Store, stage: str) -> Speaker:
    """Open what a stage yielded, or, of a stage that is not done, its last checkpoint.

    Of a sweep the first branch that is done is taken, unless `stage` names one. Raises
    `UnknownStage`, `MissingInputError` and `StoreError`.
    """
    origin, model, _ = _opened(program, store, stage)
    return Speaker(model, loaded(origin, model, make_layout(), 0))


def write(
    program: Program, store: Store, stage: str, folder: Path, apart: bool, dtype: str
) -> list[str]:
    """Write what a stage yielded to a folder; returns the names of the files.

    Raises what `open_speaker` and `export` raise.
    """
    origin, model, workshop = _opened(program, store, stage)
    kind = Export.fixed(adapter="apart" if apart else "merged", dtype=dtype)
    layout = make_layout(fsdp=len(workshop.devices))
    return export(origin, kind, model, layout, folder, f"{origin.node} {apart} {dtype}")


def _opened(program: Program, store: Store, stage: str) -> tuple[Origin, Model, Workshop]:
    compile_cache(store.root / "cache" / "xla")
    prepared = prepare(program, store, only=[stage])
    workshop = Workshop(program, store.root / "cache", tuple(jax.devices()))
    origin = Origins(prepared.plan, prepared.graph, store, workshop).latest(stage)
    return origin, workshop.model(origin.model), workshop


def chat(speaker: Speaker, sampling: Sampling) -> None:
    """Take turns with the user until an empty line or the end of the input."""
    messages: list[Message] = []
    while True:
        try:
            asked = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not asked:
            return
        messages.append(Message("user", asked))
        answer = speaker.answer(messages, sampling, len(messages))
        messages.append(Message("assistant", answer))
        print(answer.strip())
