"""Evaluations: completions scored, or the loss on given text, of one set of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from tunelang.compiler.costs.rollout_costs import MOST_SLOTS, sampling_tensor
from tunelang.compiler.layout.hardware import chip_of
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.rewards import EvalKind, Generate, Perplexity, Preference
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.data.examples import Example
from tunelang.runtime.evals import statistics
from tunelang.runtime.evals.score_answers import epoch, score_answers
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.engine import Engine, make_engine
from tunelang.runtime.generation.rollout import Prompt, Rollouts, rollout
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.rewards import number_match
from tunelang.runtime.rewards.reward_functions import Reward, Scores
from tunelang.runtime.rewards.reward_parts import Row, function_of
from tunelang.runtime.sharding import DECODE_RULES, Layout, make_layout, sampling
from tunelang.runtime.tokenize.token_cache import Corpus, tokenise
from tunelang.runtime.tokenize.tokenizers import StreamDecoder
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.objective import loss_program
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.user_functions import CustomError
from tunelang.runtime.workers.worker_pool import Workers

_ROUND = 32
"""Slots hold a multiple of so many tokens, so that stages share programs."""
_SEED = 20_210_707
"""Of all evaluations: the same prompts get the same draws at every step and in every stage."""

Params = Any


@dataclass(frozen=True)
class Evaluation:
    """What an eval found."""

    metrics: Mapping[str, float]
    """By the metric's own name, such as `score`."""
    shown: tuple[SampleRecord, ...] = ()


def evaluate(resources: Resources, name: str, model: Model, params: Params, layout: Layout) -> Any:
    """Run a declared eval; returns an `Evaluation`."""
    kind = resources.program.declarations[name].value
    match kind:
        case Generate():
            return _generate(resources, name, kind, model, params, layout)
        case Perplexity():
            return _perplexity(resources, name, kind, model, params, layout)
        case Preference():
            return _preference(resources, name, kind, model, params, layout)
    raise TypeError(f"not an eval: {type(kind).__name__}")


def named(reference: Reference, evaluation: Evaluation) -> dict[str, float]:
    """Return the metrics under the names that a spec uses: `accuracy.score`."""
    return {f"{reference.name}.{name}": value for name, value in evaluation.metrics.items()}


# Completions.


def capacity_of(model: Model, longest: int, max_tokens: int) -> int:
    """Return the tokens of a slot for prompts of up to `longest` tokens."""
    wanted = -(-(longest + max_tokens) // _ROUND) * _ROUND
    return min(wanted, model.architecture.context)


def sampled_on(architecture: Architecture, dtype: Any, layout: Layout) -> Layout:
    """Return where to sample from a model that has a layout for training: with whole weights in
    each group of devices, or no turn would be done before it has gathered them all.
    """
    count, chip = layout.mesh.size, chip_of(layout.mesh.devices.flat[0].device_kind)
    if count == 1 or layout.rules is DECODE_RULES:
        return layout
    width = np.dtype(dtype).itemsize
    tensor = 1 if chip is None else sampling_tensor(architecture, width, count, chip.memory)
    return sampling(layout, count // tensor, tensor)


def sampled_everywhere(resources: Resources, model: Model) -> Layout:
    """Return where a model lies that is only sampled from, or asked: on all devices."""
    everywhere = make_layout(fsdp=len(resources.devices), devices=resources.devices)
    return sampled_on(model.architecture, model.dtype, everywhere)


def slots_of(count: int, most: int = MOST_SLOTS) -> int:
    """Return how many of `count` completions to sample at once, over all devices."""
    return min(most, 1 << (count - 1).bit_length())


def engine_of(
    resources: Resources, model: Model, slots: int, capacity: int, layout: Layout
) -> Engine:
    """Return the sampler's programs; those of equal sizes are shared by all stages."""
    layout = sampled_on(model.architecture, model.dtype, layout)
    return resources.cached(
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


def rows_of(
    model: Model, examples: Sequence[Example], rollouts: Rollouts, texts: Sequence[str]
) -> list[Row]:
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
        pieces = partial(_pieces, model, rollouts, at)
        rows.append(Row(fields, example.source, int(rollouts.lengths[at]), pieces))
    return rows


def _pieces(model: Model, rollouts: Rollouts, row: int) -> list[str]:
    """Return the text of each token of a completion: a character is that of its last one."""
    decoder = StreamDecoder(model.renderer.tokenizer, model.renderer.stops)
    found = [decoder.push(int(token)) for token in rollouts.completion(row)]
    return [*found[:-1], found[-1] + decoder.finish()] if found else []


def completed(
    examples: Sequence[Example], rollouts: Rollouts, texts: Sequence[str], scores: Scores
) -> Iterator[SampleRecord]:
    """Give each completion with its reward."""
    for at, text in enumerate(texts):
        parts = {name: float(values[at]) for name, values in scores.parts.items()}
        yield SampleRecord(
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


def _asked(resources: Resources, name: str, kind: Generate, model: Model) -> _Asked:
    renderer = model.renderer

    def make() -> _Asked:
        stream = resources.stream(kind.data, seed=0, renderer=renderer, shuffled=False)
        room = model.architecture.context - kind.max_tokens
        stream = resources.library.within(stream, lambda e: len(renderer.prompt(e)), room)
        examples = list(islice(stream.once(), kind.limit))
        prompts = [Prompt(renderer.prompt(e), at) for at, e in enumerate(examples)]
        return _Asked(examples, prompts)

    return resources.cached(("asked", name, renderer.digest, model.architecture.context), make)


def _generate(
    resources: Resources, name: str, kind: Generate, model: Model, params: Params, layout: Layout
) -> Evaluation:
    asked = _asked(resources, name, kind, model)
    capacity = capacity_of(model, asked.longest, kind.max_tokens)
    found = _completions(resources, kind, model, params, layout, asked.prompts, capacity)
    texts = texts_of(model, found)
    rewards = [kind.score, *kind.also, *([] if kind.rank is None else [kind.rank])]
    around = resources.surroundings(kind.max_tokens)
    opened = resources.cached(
        ("eval rewards", name), lambda: [Reward(each, around) for each in rewards]
    )
    rows = rows_of(model, asked.examples, found, texts)
    scores, *others = [reward.score(rows) for reward in opened]
    groups = scores.values.reshape(-1, kind.samples)
    low, high = statistics.interval(groups)
    metrics = {
        "score": float(groups.mean()),
        "score_low": low,
        "score_high": high,
        "length": float(found.lengths.mean()),
        "truncated": float(found.truncated.mean()),
    }
    for expression, other in zip(kind.also, others, strict=False):
        metrics[kind.called(expression)] = float(other.values.mean())
    if kind.samples > 1:
        metrics |= {f"pass_at_{k}": statistics.pass_at_k(groups, k) for k in kind.ks}
        answers = [_answer(text) for text in texts]
        each = [answers[at : at + kind.samples] for at in range(0, len(answers), kind.samples)]
        metrics["majority"] = statistics.majority(each, groups)
    metrics |= _measured(resources, kind, rows, scores)
    if kind.rank is not None:
        chosen = others[-1].values.reshape(groups.shape).argmax(1)
        metrics["best_of_n"] = float(groups[np.arange(len(groups)), chosen].mean())
    by_source = _by_source(asked.examples, groups)
    if len(by_source) > 1:
        metrics |= {f"score/{source}": value for source, value in by_source.items()}
    every = list(completed(asked.examples, found, texts, scores))
    return Evaluation(metrics, tuple(every[: kind.show * kind.samples : kind.samples]))


def _measured(
    resources: Resources, kind: Generate, rows: Sequence[Row], scores: Scores
) -> dict[str, float]:
    """Call the user's own metrics with a list of each field that all rows have."""
    found: dict[str, float] = {}
    for own in kind.measured:
        shared = set.intersection(*(set(row.fields) for row in rows))
        fields = {name: [row.fields[name] for row in rows] for name in shared}
        pool = Workers(function_of(own, resources.program.folder), own.timeout, 1)
        try:
            (value,) = pool.call_all([{**fields, "score": scores.values.tolist()}])
        finally:
            pool.close()
        if isinstance(value, list):
            value = "it returned a list, not a number"
        if isinstance(value, str):
            raise CustomError(own.reference, value)
        found[own.name] = value
    return found


def _completions(
    resources: Resources,
    kind: Generate,
    model: Model,
    params: Params,
    layout: Layout,
    prompts: Sequence[Prompt],
    capacity: int,
) -> Rollouts:
    """Sample, or search for, `samples` completions of each prompt."""
    stops, pad = model.renderer.stops, model.renderer.tokenizer.pad
    a, dtype = model.architecture, model.dtype
    if kind.beams is not None:
        beams = kind.beams
        layout = sampled_on(a, dtype, layout)
        size = slots_of(len(prompts), max(1, MOST_SLOTS // beams))
        search = resources.cached(
            ("search", a, str(dtype), size, beams, capacity, layout),
            lambda: make_search(
                a, prompts=size, beams=beams, capacity=capacity, dtype=dtype, layout=layout
            ),
        )
        return beam_search(
            search, params, prompts, max_tokens=kind.max_tokens, stop_ids=stops, pad=pad,
            returned=kind.samples,
        )  # fmt: skip
    settings = Sampling.unvalidated(
        max_tokens=kind.max_tokens,
        temperature=kind.temperature,
        top_p=kind.top_p,
        top_k=kind.top_k,
    )
    slots = slots_of(len(prompts) * kind.samples)
    engine = engine_of(resources, model, slots, capacity, layout)
    return rollout(
        engine, params, prompts, settings, group=kind.samples, stop_ids=stops, seed=_SEED, step=0,
        pad=pad, tokenizer=model.renderer.tokenizer,
    )  # fmt: skip


def _answer(text: str) -> Any:
    """Return the answer that a completion votes for: its last number, or its text."""
    number = number_match.last_number(text)
    return text.strip() if number is None else number


def _by_source(examples: Sequence[Example], groups: np.ndarray[Any, Any]) -> dict[str, float]:
    names = np.array([example.source for example in examples])
    return {str(name): float(groups[names == name].mean()) for name in dict.fromkeys(names)}


# The loss.


def _perplexity(
    resources: Resources, name: str, kind: Perplexity, model: Model, params: Params, layout: Layout
) -> Evaluation:
    a = model.architecture
    config = StepConfig(layout=layout, dtype=model.dtype)
    loss = resources.cached(("loss", a, str(model.dtype), layout), lambda: loss_program(a, config))
    batches = resources.cached(
        ("eval batches", name, model.renderer.digest, a.context, layout.batch_shards),
        lambda: epoch(_corpus(resources, kind, model), kind.limit, layout)[0],
    )
    total, tokens = jax.device_get(loss(params, batches))
    mean = float(total / tokens)
    return Evaluation({"loss": mean, "perplexity": float(np.exp(np.float64(mean)))})


def _corpus(
    resources: Resources, kind: EvalKind, model: Model, answers: Sequence[str] = ("response",)
) -> Corpus:
    stream = resources.stream(kind.data, seed=0, renderer=model.renderer, shuffled=False)
    return tokenise(
        stream,
        model.renderer,
        context=model.architecture.context,
        cache=resources.cache,
        answers=answers,
    )


# Preferences.


def _preference(
    resources: Resources, name: str, kind: Preference, model: Model, params: Params, layout: Layout
) -> Evaluation:
    corpus = resources.cached(
        ("eval pairs", name, model.renderer.digest, model.architecture.context),
        lambda: _corpus(resources, kind, model, ("chosen", "rejected")),
    )
    found = score_answers(resources, corpus, model, params, layout, kind.limit)
    values = found.values.astype(np.float64)
    if kind.per_token and not model.architecture.scores:
        values = values / np.maximum(found.tokens, 1)
    margins = (values[:, 0] - values[:, 1])[found.tokens[:, 0] > 0]
    accuracy = float(np.mean((1 + np.sign(margins)) / 2))
    return Evaluation({"accuracy": accuracy, "margin": float(margins.mean())})
