"""Evaluations: completions scored, or the loss on given text, of one set of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import jax
import numpy as np

from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.rewards import EvalKind, Generate, Perplexity, Preference
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime import numeric, train
from tunelang.runtime.answers import epoch, score_answers
from tunelang.runtime.corpus import Corpus, tokenise
from tunelang.runtime.decode_loop import Engine, make_engine
from tunelang.runtime.examples import Example
from tunelang.runtime.rewards import Reward, Scores
from tunelang.runtime.rollout import Prompt, Rollouts, rollout
from tunelang.runtime.scorers import Row
from tunelang.runtime.sharding import Layout
from tunelang.runtime.workshop import Model, Workshop

MOST_SLOTS = 256
_ROUND = 32
"""Slots hold a multiple of so many tokens, so that stages share programs."""
_SEED = 20_210_707
"""Of all evaluations: the same prompts get the same draws at every step and in every stage."""

Params = Any


@dataclass(frozen=True)
class Completed:
    """A completion with all that there is to say about it."""

    example: Example
    text: str
    tokens: int
    reward: float
    parts: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """Return the completion as a line of `samples.jsonl`."""
        asked = self.example.prompt
        if asked is None and self.example.messages:
            asked = self.example.messages[-1].content
        return {
            "source": self.example.source,
            "prompt": asked,
            "completion": self.text,
            "target": self.example.target,
            "tokens": self.tokens,
            "reward": self.reward,
            "parts": {n: v for n, v in self.parts.items() if v == v},  # NaN: not asked
        }


@dataclass(frozen=True)
class Evaluation:
    """What an eval found."""

    metrics: Mapping[str, float]
    """By the metric's own name, such as `score`."""
    shown: tuple[Completed, ...] = ()


def evaluate(workshop: Workshop, name: str, model: Model, params: Params, layout: Layout) -> Any:
    """Run a declared eval; returns an `Evaluation`."""
    kind = workshop.program.declarations[name].value
    match kind:
        case Generate():
            return _generate(workshop, name, kind, model, params, layout)
        case Perplexity():
            return _perplexity(workshop, name, kind, model, params, layout)
        case Preference():
            return _preference(workshop, name, kind, model, params, layout)
    raise TypeError(f"not an eval: {type(kind).__name__}")


def named(reference: Reference, evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics under the names that a spec uses: `accuracy.score`."""
    return {f"{reference.name}.{name}": value for name, value in evaluation.metrics.items()}


# Completions.


def capacity_of(model: Model, longest: int, max_tokens: int) -> int:
    """Return the tokens of a slot for prompts of up to `longest` tokens."""
    wanted = -(-(longest + max_tokens) // _ROUND) * _ROUND
    return min(wanted, model.architecture.context)


def engine_of(
    workshop: Workshop, model: Model, slots: int, capacity: int, layout: Layout
) -> Engine:
    """Return the sampler's programs; those of equal sizes are shared by all stages."""
    return workshop.once(
        ("engine", model.architecture, str(model.dtype), slots, capacity, layout),
        lambda: make_engine(
            model.architecture, slots=slots, capacity=capacity, dtype=model.dtype, layout=layout
        ),
    )


def texts_of(model: Model, rollouts: Rollouts) -> list[str]:
    """Return the texts of completions, without the tokens that end them."""
    tokenizer, stops = model.renderer.tokenizer, model.renderer.stops
    return [
        tokenizer.decode(rollouts.completion(row), continues=True, hide=stops)
        for row in range(len(rollouts.lengths))
    ]


def rows_of(examples: Sequence[Example], rollouts: Rollouts, texts: Sequence[str]) -> list[Row]:
    """Return what the reward reads: completion `i` belongs to example `i // group`."""
    rows = []
    for at, text in enumerate(texts):
        example = examples[at // rollouts.group]
        roles = {
            role: getattr(example, role)
            for role in ("prompt", "response", "target", "system")
            if getattr(example, role) is not None
        }
        if example.messages is not None:
            roles["messages"] = [
                {"role": each.role, "content": each.content} for each in example.messages
            ]
        fields = {**example.fields, **roles, "completion": text}
        rows.append(Row(fields, example.source, int(rollouts.lengths[at])))
    return rows


def completed(
    examples: Sequence[Example], rollouts: Rollouts, texts: Sequence[str], scores: Scores
) -> Iterator[Completed]:
    """Give each completion with its reward."""
    for at, text in enumerate(texts):
        parts = {name: float(values[at]) for name, values in scores.parts.items()}
        yield Completed(
            examples[at // rollouts.group],
            text,
            int(rollouts.lengths[at]),
            float(scores.values[at]),
            parts,
        )


@dataclass(frozen=True)
class _Asked:
    """The prompts of an eval, tokenised."""

    examples: list[Example]
    prompts: list[Prompt]

    @property
    def longest(self) -> int:
        return max(len(prompt.tokens) for prompt in self.prompts)


def _asked(workshop: Workshop, name: str, kind: Generate, model: Model) -> _Asked:
    renderer = model.renderer

    def make() -> _Asked:
        stream = workshop.stream(kind.data, seed=0, renderer=renderer, shuffled=False)
        room = model.architecture.context - kind.max_tokens
        stream = workshop.library.within(stream, lambda e: len(renderer.prompt(e)), room)
        examples = list(islice(stream.once(), kind.limit))
        prompts = [Prompt(renderer.prompt(e), at) for at, e in enumerate(examples)]
        return _Asked(examples, prompts)

    return workshop.once(("asked", name, renderer.digest, model.architecture.context), make)


def _generate(
    workshop: Workshop, name: str, kind: Generate, model: Model, params: Params, layout: Layout
) -> Evaluation:
    asked = _asked(workshop, name, kind, model)
    sampling = Sampling.fixed(
        max_tokens=kind.max_tokens,
        temperature=kind.temperature,
        top_p=kind.top_p,
        top_k=kind.top_k,
    )
    count = len(asked.prompts) * kind.samples
    slots = min(MOST_SLOTS, 1 << (count - 1).bit_length())
    engine = engine_of(
        workshop, model, slots, capacity_of(model, asked.longest, kind.max_tokens), layout
    )
    found = rollout(
        engine,
        params,
        asked.prompts,
        sampling,
        group=kind.samples,
        stop_ids=model.renderer.stops,
        seed=_SEED,
        step=0,
        pad=model.renderer.tokenizer.pad,
        tokenizer=model.renderer.tokenizer,
    )
    texts = texts_of(model, found)
    reward = workshop.once(
        ("eval reward", name),
        lambda: Reward(kind.score, workshop.surroundings(kind.max_tokens)),
    )
    scores = reward.score(rows_of(asked.examples, found, texts))
    groups = scores.values.reshape(-1, kind.samples)
    metrics = {
        "score": float(groups.mean()),
        "length": float(found.lengths.mean()),
        "truncated": float(found.truncated.mean()),
    }
    if kind.samples > 1:
        metrics["pass_at_k"] = float((groups >= 1).any(1).mean())
        metrics["majority"] = _majority(texts, groups)
    by_source = _by_source(asked.examples, groups)
    if len(by_source) > 1:
        metrics |= {f"score/{source}": value for source, value in by_source.items()}
    every = list(completed(asked.examples, found, texts, scores))
    return Evaluation(metrics, tuple(every[: kind.show * kind.samples : kind.samples]))


def _majority(texts: Sequence[str], groups: np.ndarray[Any, Any]) -> float:
    """Share of prompts whose most common answer scores 1; the first of equally common ones.

    An answer is the last number of a completion, or its text where it has none.
    """
    right = 0
    samples = groups.shape[1]
    for at, values in enumerate(groups):
        answers: list[Any] = []
        for text in texts[at * samples : (at + 1) * samples]:
            number = numeric.last_number(text)
            answers.append(text.strip() if number is None else number)
        most = max(answers, key=answers.count)
        right += bool(values[answers.index(most)] >= 1)
    return right / len(groups)


def _by_source(examples: Sequence[Example], groups: np.ndarray[Any, Any]) -> dict[str, float]:
    names = np.array([example.source for example in examples])
    return {str(name): float(groups[names == name].mean()) for name in dict.fromkeys(names)}


# The loss.


def _perplexity(
    workshop: Workshop, name: str, kind: Perplexity, model: Model, params: Params, layout: Layout
) -> Evaluation:
    a = model.architecture
    program = train.Program(layout=layout, dtype=model.dtype)
    loss = workshop.once(
        ("loss", a, str(model.dtype), layout), lambda: train.loss_program(a, program)
    )
    batches = workshop.once(
        ("eval batches", name, model.renderer.digest, a.context, layout.batch_shards),
        lambda: epoch(_corpus(workshop, kind, model), kind.limit, layout)[0],
    )
    total, tokens = jax.device_get(loss(params, batches))
    mean = float(total / tokens)
    return Evaluation({"loss": mean, "perplexity": float(np.exp(np.float64(mean)))})


def _corpus(
    workshop: Workshop, kind: EvalKind, model: Model, answers: Sequence[str] = ("response",)
) -> Corpus:
    stream = workshop.stream(kind.data, seed=0, renderer=model.renderer, shuffled=False)
    return tokenise(
        stream,
        model.renderer,
        context=model.architecture.context,
        cache=workshop.cache,
        answers=answers,
    )


# Preferences.


def _preference(
    workshop: Workshop, name: str, kind: Preference, model: Model, params: Params, layout: Layout
) -> Evaluation:
    corpus = workshop.once(
        ("eval pairs", name, model.renderer.digest, model.architecture.context),
        lambda: _corpus(workshop, kind, model, ("chosen", "rejected")),
    )
    found = score_answers(workshop, corpus, model, params, layout, kind.limit)
    values = found.values.astype(np.float64)
    if kind.per_token and not model.architecture.scores:
        values = values / np.maximum(found.tokens, 1)
    margins = (values[:, 0] - values[:, 1])[found.tokens[:, 0] > 0]
    accuracy = float(np.mean((1 + np.sign(margins)) / 2))
    return Evaluation({"accuracy": accuracy, "margin": float(margins.mean())})
