"""Opens the model that a stage yielded for `tune generate`, `tune chat` and `tune export`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from tunelang.dsl.diagnostics.tune_error import CommandError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.rewards import RewardRef
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.dsl.vocabulary.utility_stages import Export
from tunelang.runtime.data.examples import Example, Message
from tunelang.runtime.generation.episodes import completion_texts
from tunelang.runtime.generation.text_generator import TextGenerator
from tunelang.runtime.loading.initial_weights import Origin, load_generator
from tunelang.runtime.loading.model_export import export_model
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.pipeline.execute_plan import compile_cache
from tunelang.runtime.pipeline.weight_sources import WeightSources
from tunelang.runtime.planning.prepare import prepare
from tunelang.runtime.rewards.reward_functions import CompiledReward
from tunelang.runtime.rewards.reward_rows import reward_rows
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.store.run_store import Store


class UnscoredError(CommandError):
    """A reward scored no completion; its part `part` failed, `why` says how."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(run_failures.unscored(part, why))
        self.part = part
        self.why = why


def open_generator(program: Program, store: Store, stage: str) -> TextGenerator:
    """Open the model that a stage yielded, or the last checkpoint of a stage that is not done.

    From a sweep, the first branch that is done is taken unless `stage` names one. Raises
    `UnknownStage`, `MissingInputError` and `StoreError`.
    """
    origin, model, resources = _opened(program, store, stage)
    return load_generator(origin, model, resources.devices)


def open_ranked(
    program: Program, store: Store, stage: str, by: str | None, max_tokens: int
) -> tuple[TextGenerator, CompiledReward | None]:
    """Open the model of a stage, and the declared reward `by` for its completions.

    Completions have at most `max_tokens`. Raises what `open_generator` and `CompiledReward` raise.
    """
    origin, model, resources = _opened(program, store, stage)
    generator = load_generator(origin, model, resources.devices)
    if by is None:
        return generator, None
    return generator, CompiledReward(
        RewardRef.unvalidated(name=by), resources.reward_context(max_tokens)
    )


def write(
    program: Program, store: Store, stage: str, folder: Path, apart: bool, dtype: str
) -> list[str]:
    """Export the model of a stage to a folder; returns the names of the files.

    Raises what `open_generator` and `export` raise.
    """
    origin, model, resources = _opened(program, store, stage)
    kind = Export.unvalidated(adapter="apart" if apart else "merged", dtype=dtype)
    layout = make_layout(fsdp=len(resources.devices))
    return export_model(origin, kind, model, layout, folder, f"{origin.node} {apart} {dtype}")


def _opened(program: Program, store: Store, stage: str) -> tuple[Origin, Model, Resources]:
    compile_cache(store.root / "cache" / "xla")
    prepared = prepare(program, store, only=[stage])
    origins = WeightSources(prepared.plan, prepared.graph, store, program)
    resources = Resources(program, store.root / "cache", tuple(jax.devices()), origins)
    origin = origins.latest(stage)
    return origin, resources.model(origin.model), resources


def best_of(
    generator: TextGenerator,
    prompts: Sequence[str],
    sampling: Sampling,
    samples: int,
    seed: int,
    raw: bool,
    *,
    returned: int = 1,
    reward: CompiledReward | None = None,
) -> Iterator[str]:
    """Yield the `returned` best of `samples` completions of each prompt.

    They are ranked by the reward, which sees the prompt and the completion, or without a reward by
    the mean log-probability of a token, at the temperature. Raises `UnscoredError`.
    """
    renderer = generator.model.renderer
    episodes = generator.sample(prompts, sampling, samples, seed, raw)
    texts = completion_texts(renderer, episodes)
    values = episodes.log_probs.sum(1) / episodes.lengths
    if reward is not None:
        examples = [Example("", 0, {}, prompt=text) for text in prompts]
        scores = reward.score(reward_rows(renderer, examples, episodes, texts))
        if len({event.row for event in scores.events}) == len(texts):
            raise UnscoredError(scores.events[0].part, scores.events[0].why)
        values = scores.values
    for prompt, group in enumerate(values.reshape(-1, samples)):
        for sample in np.argsort(-group, kind="stable")[:returned].tolist():
            yield texts[prompt * samples + sample]


def chat(generator: TextGenerator, sampling: Sampling) -> None:
    """Chat with the user until an empty line or the end of the input."""
    messages: list[Message] = []
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            return
        messages.append(Message("user", prompt))
        answer = generator.answer(messages, sampling, len(messages))
        messages.append(Message("assistant", answer))
        print(answer.strip())
