"""Resources that the stages of a run share: data, tokenizers, models and compiled programs.

A program is compiled once for each architecture, layout and set of sizes, since stages of one
pipeline use the same ones; branches of a sweep differ in numbers only, and share all programs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax

from tunelang.compiler.models.adapters import storage_of
from tunelang.compiler.models.architecture import from_transformer, plain
from tunelang.compiler.models.presets import PRESETS
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import DataExpression, Function, Reference, RewardExpression
from tunelang.dsl.vocabulary.data import Procedural, Sampled
from tunelang.dsl.vocabulary.rewards import Endpoint, Learned, LocalJudge, RewardKind, Rubric
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.data.examples import Example, texts_of
from tunelang.runtime.data.stream import Library, Stream
from tunelang.runtime.errors import NotBuiltError
from tunelang.runtime.generation.engine_sizes import prompt_room, sampling_layout_over
from tunelang.runtime.loading.initial_weights import Origin, load_generator, load_merged
from tunelang.runtime.models import model_folder
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.rewards.endpoint import EndpointJudge
from tunelang.runtime.rewards.learned_scorer import learned_scorer
from tunelang.runtime.rewards.reward_parts import RewardContext, Scorer
from tunelang.runtime.rewards.rubric import Ask, rubric_scorer
from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.tokenize.open_tokenizer import open_renderer

_Resource = TypeVar("_Resource")


class StageResults(Protocol):
    """Finds the results of the program's stages."""

    def weights(self, reference: Reference) -> Origin:
        """Return the weights of a model or a stage that a reward refers to."""

    def sampled_rows(self, kind: Sampled) -> Path:
        """Return the file of rows that a `sample` stage wrote."""


@dataclass
class Resources:
    """Resources of one program, each opened at its first use."""

    program: Program
    cache: Path
    """A folder for files made from data: rows, tokens, fitted tokenizers."""
    devices: tuple[jax.Device, ...]
    stages: StageResults | None = None
    """Results of the program's stages; None where nothing is run."""
    library: Library = field(init=False)
    _opened: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.library = Library(self.program, self.cache, sampled=self._sampled)

    def cached(self, key: Hashable, make: Callable[[], _Resource]) -> _Resource:
        """Return the resource of a key, made at the first call."""
        if key not in self._opened:
            self._opened[key] = make()
        resource: _Resource = self._opened[key]
        return resource

    def renderer(self, name: str) -> Renderer:
        """Return a declared tokenizer with its chat template.

        Raises `BadTokenizerError`, `VocabularySizeError`, and what opening data raises.
        """
        kind = self.program.declarations[name].value

        def texts() -> Iterator[str]:
            for example in self.stream(kind.data, seed=0, shuffled=False).once():
                yield from texts_of(example)

        return self.cached(
            ("renderer", name),
            lambda: open_renderer(kind, self.program.folder, cache=self.cache, texts=texts),
        )

    def renderer_of(self, model: str) -> Renderer:
        """Return the tokenizer of a declared model; raises what `renderer` raises."""
        kind = self.program.declarations[model].value
        if kind.tokenizer is not None:
            return self.renderer(kind.tokenizer.name)
        folder = model_folder.find_folder(kind, self.program.folder)
        tokenizer = models.HuggingFace.model_construct(path=str(folder), chat=None, special=())
        return self.cached(
            ("renderer of", kind.path),
            lambda: open_renderer(tokenizer, self.program.folder, cache=self.cache),
        )

    def model(self, name: str) -> Model:
        """Return a declared model.

        Raises what `renderer` raises, and `BadWeightsError`.
        """
        kind, renderer = self.program.declarations[name].value, self.renderer_of(name)
        if isinstance(kind, models.Pretrained):
            folder = model_folder.find_folder(kind, self.program.folder)
            architecture = model_folder.with_vocabulary(
                model_folder.read_architecture(kind, folder), renderer.tokenizer.size
            )
            return Model(name, architecture, renderer, DTYPES[kind.dtype], storage_of(kind), folder)
        architecture = from_transformer(kind, renderer.tokenizer.size, PRESETS)
        return Model(name, architecture, renderer, DTYPES[kind.dtype], storage_of(kind))

    def stream(
        self,
        expression: DataExpression,
        *,
        seed: int,
        renderer: Renderer | None = None,
        shuffled: bool = True,
    ) -> Stream:
        """Return the examples of a data expression, in an order that the seed decides."""

        def measure(example: Example) -> int:
            assert renderer is not None
            if example.response is None and example.text is None:
                return len(renderer.prompt(example))
            return len(renderer.tokens(example))

        return self.library.stream(
            expression,
            seed=seed,
            measure=None if renderer is None else measure,
            shuffled=shuffled,
        )

    def prompts(
        self,
        expression: DataExpression,
        model: Model,
        sampling: Sampling,
        *,
        seed: int,
        shuffled: bool = True,
    ) -> tuple[Stream, int]:
        """Return the prompts that leave room for a completion, and the length of the longest.

        Raises what opening data raises, `BadRowError` under `on_long_row = stop`, and
        `NoRowsError`.
        """
        renderer, room = model.renderer, prompt_room(model.architecture, sampling)
        longest = 0

        def measure(example: Example) -> int:
            nonlocal longest
            count = len(renderer.prompt(example))
            longest = max(longest, count if count <= room else 0)
            return count

        stream = self.stream(expression, seed=seed, renderer=renderer, shuffled=shuffled)
        return self.library.drop_long(stream, measure, room), longest

    def reward_context(self, max_tokens: int) -> RewardContext:
        """Return the declarations that rewards of the program may refer to."""
        rewards = {declaration.name: declaration.value for declaration in self.program.of("reward")}
        data = {declaration.name: declaration.value for declaration in self.program.of("data")}
        expressions = {
            name: value for name, value in rewards.items() if isinstance(value, RewardExpression)
        }
        kinds = {name: value for name, value in rewards.items() if isinstance(value, RewardKind)}
        generators = {name: value for name, value in data.items() if isinstance(value, Procedural)}
        return RewardContext(
            declared=expressions,
            scorers={name: partial(self._scorer, name, kind) for name, kind in kinds.items()},
            on_error={name: kind.on_error for name, kind in kinds.items()},
            on_devices=frozenset(
                name
                for name, kind in kinds.items()
                if not (isinstance(kind, Rubric) and isinstance(kind.judge, Endpoint))
            ),
            generators=generators,
            folder=self.program.folder,
            max_tokens=max_tokens,
        )

    def _sampled(self, kind: Sampled) -> Path:
        if self.stages is None:
            feature = "reading the rows of a `sample` stage outside of a run"
            raise NotBuiltError(kind.from_.name, feature)
        return self.stages.sampled_rows(kind)

    def _scorer(self, name: str, kind: RewardKind) -> Scorer:
        if isinstance(kind, Learned):
            return self.cached(("learned", kind.from_), partial(self._learned, name, kind.from_))
        assert isinstance(kind, Rubric)
        judge = kind.judge
        ask = self.cached(("judge", judge), partial(self._judge, name, judge))
        return rubric_scorer(kind, ask, name)

    def _learned(self, name: str, reference: Reference) -> Scorer:
        origin, model = self._weights(name, reference)
        model = replace(model, architecture=replace(plain(model.architecture), scores=True))
        layout = sampling_layout_over(self.devices, model.architecture, model.dtype)
        return learned_scorer(model, load_merged(origin, model, layout, 0), layout)

    def _judge(self, name: str, judge: Function) -> Ask:
        if isinstance(judge, Endpoint):
            return EndpointJudge(judge, self.cache)
        assert isinstance(judge, LocalJudge)
        origin, model = self._weights(name, judge.model)
        return load_generator(origin, model, self.devices).judge

    def _weights(self, reward: str, reference: Reference) -> tuple[Origin, Model]:
        if self.stages is None:
            raise NotBuiltError(reward, "scoring by a model of the spec outside of a run")
        origin = self.stages.weights(reference)
        return origin, self.model(origin.model)
