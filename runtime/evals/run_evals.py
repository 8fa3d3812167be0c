"""Runs evals of one set of parameters: scores of completions, perplexity, or preferences."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import jax
import numpy as np
from jaxtyping import Float64

from tunelang.compiler.costs.rollout_costs import MOST_SLOTS
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.rewards import EvalKind, Generate, Perplexity, Preference
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.data.examples import Example
from tunelang.runtime.evals import statistics
from tunelang.runtime.evals.score_answers import epoch, score_answers
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.engine_sizes import sampling_layout, slot_capacity, slot_count
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Episodes, Prompt, completion_texts
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.rewards import number_match
from tunelang.runtime.rewards.reward_functions import CompiledReward, Scores
from tunelang.runtime.rewards.reward_parts import CompletionRow, function_of
from tunelang.runtime.rewards.reward_rows import reward_rows, sample_records
from tunelang.runtime.sharding import Layout
from tunelang.runtime.tokenize.token_cache import Corpus, tokenise
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.objective import loss_program
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.user_functions import UserFunctionError
from tunelang.runtime.workers.worker_pool import Workers

_SEED = 20_210_707
"""The seed of all evals: the same prompts get the same draws at every step and in every stage."""


@dataclass(frozen=True)
class EvalResult:
    """The results of an eval."""

    metrics: Mapping[str, float]
    """Name of the metric, such as `score` -> its value."""
    shown: tuple[SampleRecord, ...] = ()
    """The completions that the run prints."""


def evaluate(
    resources: Resources, name: str, model: Model, params: Params, layout: Layout
) -> EvalResult:
    """Run a declared eval."""
    kind = resources.program.declarations[name].value
    match kind:
        case Generate():
            return _generate(resources, name, kind, model, params, layout)
        case Perplexity():
            return _perplexity(resources, name, kind, model, params, layout)
        case Preference():
            return _preference(resources, name, kind, model, params, layout)
    raise TypeError(f"not an eval: {type(kind).__name__}")


def qualified_metrics(reference: Reference, evaluation: EvalResult) -> dict[str, float]:
    """Return the metrics under the names that a spec uses: `accuracy.score`."""
    return {f"{reference.name}.{name}": value for name, value in evaluation.metrics.items()}


# Completions.


@dataclass(frozen=True)
class _Prompts:
    """The examples of an eval, and their prompts as tokens."""

    examples: list[Example]
    tokens: list[Prompt]

    @property
    def longest(self) -> int:
        return max(len(prompt.tokens) for prompt in self.tokens)


def _prompts(resources: Resources, name: str, kind: Generate, model: Model) -> _Prompts:
    renderer = model.renderer

    def make() -> _Prompts:
        stream, _ = resources.prompts(kind.data, model, _sampling(kind), seed=0, shuffled=False)
        examples = list(islice(stream.once(), kind.limit))
        tokens = [Prompt(renderer.prompt(e), index) for index, e in enumerate(examples)]
        return _Prompts(examples, tokens)

    return resources.cached(
        ("eval prompts", name, renderer.digest, model.architecture.context), make
    )


def _sampling(kind: Generate) -> Sampling:
    return Sampling.unvalidated(
        max_tokens=kind.max_tokens,
        temperature=kind.temperature,
        top_p=kind.top_p,
        top_k=kind.top_k,
    )


def _generate(
    resources: Resources, name: str, kind: Generate, model: Model, params: Params, layout: Layout
) -> EvalResult:
    prompts = _prompts(resources, name, kind, model)
    episodes = _episodes(resources, kind, model, params, layout, prompts)
    texts = completion_texts(model.renderer, episodes)
    rewards = [kind.score, *kind.also, *([] if kind.rank is None else [kind.rank])]
    context = resources.reward_context(kind.max_tokens)
    opened = resources.cached(
        ("eval rewards", name), lambda: [CompiledReward(reward, context) for reward in rewards]
    )
    rows = reward_rows(model.renderer, prompts.examples, episodes, texts)
    scores, *more_scores = [reward.score(rows) for reward in opened]
    groups = scores.values.reshape(-1, kind.samples)
    low, high = statistics.interval(groups)
    metrics = {
        "score": float(groups.mean()),
        "score_low": low,
        "score_high": high,
        "length": float(episodes.lengths.mean()),
        "truncated": float(episodes.truncated.mean()),
    }
    for expression, reward_scores in zip(kind.also, more_scores, strict=False):
        metrics[kind.called(expression)] = float(reward_scores.values.mean())
    if kind.samples > 1:
        metrics |= {f"pass_at_{k}": statistics.pass_at_k(groups, k) for k in kind.ks}
        answers = [_answer(text) for text in texts]
        answer_groups = [
            answers[start : start + kind.samples] for start in range(0, len(answers), kind.samples)
        ]
        metrics["majority"] = statistics.majority(answer_groups, groups)
    metrics |= _measured(resources, kind, rows, scores)
    if kind.rank is not None:
        chosen = more_scores[-1].values.reshape(groups.shape).argmax(1)
        metrics["best_of_n"] = float(groups[np.arange(len(groups)), chosen].mean())
    by_source = _by_source(prompts.examples, groups)
    if len(by_source) > 1:
        metrics |= {f"score/{source}": value for source, value in by_source.items()}
    records = list(sample_records(prompts.examples, episodes, texts, scores))
    return EvalResult(metrics, tuple(records[: kind.show * kind.samples : kind.samples]))


def _measured(
    resources: Resources, kind: Generate, rows: Sequence[CompletionRow], scores: Scores
) -> dict[str, float]:
    """Call the metrics of the user with a list for each field that all rows have."""
    metrics: dict[str, float] = {}
    for metric in kind.measured:
        shared = set.intersection(*(set(row.fields) for row in rows))
        fields = {name: [row.fields[name] for row in rows] for name in shared}
        pool = Workers(function_of(metric, resources.program.folder), metric.timeout, 1)
        try:
            (value,) = pool.call_all([{**fields, "score": scores.values.tolist()}])
        finally:
            pool.close()
        if isinstance(value, list):
            value = "it returned a list, not a number"
        if isinstance(value, str):
            raise UserFunctionError(metric.reference, value)
        metrics[metric.name] = value
    return metrics


def _episodes(
    resources: Resources,
    kind: Generate,
    model: Model,
    params: Params,
    layout: Layout,
    prompts: _Prompts,
) -> Episodes:
    """Sample, or search for, `samples` completions of each prompt."""
    if kind.beams is None:
        slots = slot_count(len(prompts.tokens) * kind.samples)
        sampler = Sampler.open(model, layout, _sampling(kind), slots=slots, longest=prompts.longest)
        return sampler.sample(params, prompts.tokens, group=kind.samples, seed=_SEED)
    a, dtype, beams = model.architecture, model.dtype, kind.beams
    capacity = slot_capacity(a, prompts.longest, kind.max_tokens)
    layout = sampling_layout(a, dtype, layout)
    size = slot_count(len(prompts.tokens), max(1, MOST_SLOTS // beams))
    search = resources.cached(
        ("search", a, str(dtype), size, beams, capacity, layout),
        lambda: make_search(
            a, prompts=size, beams=beams, capacity=capacity, dtype=dtype, layout=layout
        ),
    )
    return beam_search(
        search, params, prompts.tokens, max_tokens=kind.max_tokens,
        stop_ids=model.renderer.stops, pad=model.renderer.tokenizer.pad, returned=kind.samples,
    )  # fmt: skip


def _answer(text: str) -> Hashable:
    """Return the answer that a completion votes for: its last number, or its text."""
    number = number_match.last_number(text)
    return text.strip() if number is None else number


def _by_source(
    examples: Sequence[Example], groups: Float64[np.ndarray, "prompts samples"]
) -> dict[str, float]:
    names = np.array([example.source for example in examples])
    return {str(name): float(groups[names == name].mean()) for name in dict.fromkeys(names)}


# The loss.


def _perplexity(
    resources: Resources, name: str, kind: Perplexity, model: Model, params: Params, layout: Layout
) -> EvalResult:
    a = model.architecture
    config = StepConfig(layout=layout, dtype=model.dtype)
    loss = resources.cached(("loss", a, str(model.dtype), layout), lambda: loss_program(a, config))
    batches = resources.cached(
        ("eval batches", name, model.renderer.digest, a.context, layout.batch_shards),
        lambda: epoch(_corpus(resources, kind, model), kind.limit, layout)[0],
    )
    total, tokens = jax.device_get(loss(params, batches))
    mean = float(total / tokens)
    return EvalResult({"loss": mean, "perplexity": float(np.exp(np.float64(mean)))})


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
) -> EvalResult:
    corpus = resources.cached(
        ("eval pairs", name, model.renderer.digest, model.architecture.context),
        lambda: _corpus(resources, kind, model, ("chosen", "rejected")),
    )
    scores = score_answers(corpus, model, params, layout, kind.limit)
    values = scores.values.astype(np.float64)
    if kind.per_token and not model.architecture.scores:
        values = values / np.maximum(scores.tokens, 1)
    margins = (values[:, 0] - values[:, 1])[scores.tokens[:, 0] > 0]
    accuracy = float(np.mean((1 + np.sign(margins)) / 2))
    return EvalResult({"accuracy": accuracy, "margin": float(margins.mean())})
