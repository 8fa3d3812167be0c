"""`tune generate`, `tune chat`, `tune export`: the model that a stage yielded, in use."""

from __future__ import annotations

from pathlib import Path

import jax

from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.rewards import RewardRef
from tunelang.dsl.vocabulary.stages import Export
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.data.examples import Message
from tunelang.runtime.generation.generator import TextGenerator
from tunelang.runtime.loading.initial_weights import Origin
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.pipeline.runner import compile_cache
from tunelang.runtime.pipeline.weight_sources import Origins
from tunelang.runtime.planning.prepare import prepare
from tunelang.runtime.rewards.reward_functions import Reward
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.export import export
from tunelang.runtime.store.run_store import Store


def open_speaker(program: Program, store: Store, stage: str) -> TextGenerator:
    """Open what a stage yielded, or, of a stage that is not done, its last checkpoint.

    Of a sweep the first branch that is done is taken, unless `stage` names one. Raises
    `UnknownStage`, `MissingInputError` and `StoreError`.
    """
    origin, _, resources = _opened(program, store, stage)
    return TextGenerator.of(origin, resources)


def open_ranked(
    program: Program, store: Store, stage: str, by: str | None, max_tokens: int
) -> tuple[TextGenerator, Reward | None]:
    """`open_speaker`, with a declared reward for completions of at most `max_tokens`, where `by`
    names one.

    Raises also what `Reward` raises.
    """
    origin, _, resources = _opened(program, store, stage)
    generator = TextGenerator.of(origin, resources)
    if by is None:
        return generator, None
    return generator, Reward(RewardRef.unvalidated(name=by), resources.surroundings(max_tokens))


def write(
    program: Program, store: Store, stage: str, folder: Path, apart: bool, dtype: str
) -> list[str]:
    """Write what a stage yielded to a folder; returns the names of the files.

    Raises what `open_speaker` and `export` raise.
    """
    origin, model, resources = _opened(program, store, stage)
    kind = Export.unvalidated(adapter="apart" if apart else "merged", dtype=dtype)
    layout = make_layout(fsdp=len(resources.devices))
    return export(origin, kind, model, layout, folder, f"{origin.node} {apart} {dtype}")


def _opened(program: Program, store: Store, stage: str) -> tuple[Origin, Model, Resources]:
    compile_cache(store.root / "cache" / "xla")
    prepared = prepare(program, store, only=[stage])
    resources = Resources(program, store.root / "cache", tuple(jax.devices()))
    origins = Origins(prepared.plan, prepared.graph, store, resources)
    resources.generator = lambda judge: TextGenerator.of(origins.anywhere(judge), resources).judge
    origin = origins.latest(stage)
    return origin, resources.model(origin.model), resources


def chat(generator: TextGenerator, sampling: Sampling) -> None:
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
        answer = generator.answer(messages, sampling, len(messages))
        messages.append(Message("assistant", answer))
        print(answer.strip())
