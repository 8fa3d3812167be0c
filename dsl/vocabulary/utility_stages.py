"""Stages that update no weights: sampling, merging, evaluation, export."""

from typing import Annotated

from pydantic import SerializeAsAny
from typing_extensions import override

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Data,
    Evals,
    Flag,
    HardwareRef,
    MaybeCount,
    MaybeReward,
    ModelRef,
    Reference,
    placement,
    result,
)
from tunelang.dsl.vocabulary.stages import Stage
from tunelang.dsl.vocabulary.training import Linear, Merging, Sampling


class Sample(Stage):
    """Sample completions of prompts, score and select them, as data of later stages (`sampled`)."""

    semantics = ("sample", 1)
    needs = (("prompt",), ("messages",))
    yields = "rows"
    metrics = {
        "score": "mean score of all completions",
        "kept": "share of completions that were kept",
        "solved": "share of prompts with a completion that was kept",
    }

    from_: ModelRef = result("What to sample from.", "from = baseline", alias="from")
    data: Data = result("The prompts; each is used once.", "data = math")
    limit: MaybeCount = result("Use only this many prompts, the first ones.", "limit = 200", None)
    samples: Count = result("Completions for each prompt.", "samples = 8", 1)
    rollout: Annotated[Sampling, types.Of("sampling")] = result(
        "How completions are sampled.",
        "rollout = sampling(max_tokens = 512)",
        Sampling.unvalidated(),
    )
    score: MaybeReward = result("What scores a completion.", "score = correct", None)
    keep: MaybeReward = result(
        "Keep only completions for which this is true, or above 0.", "keep = correct > 0.5", None
    )
    distinct: Flag = result(
        "Keep only one of several equal completions of a prompt.", "distinct = false", True
    )
    most: MaybeCount = result(
        "Keep at most this many completions of a prompt, those with the highest scores.",
        "most = 2",
        None,
    )
    seed: Annotated[int | None, types.Whole(low=0)] = result(
        "Seed of the stage. Default: derived from the run's.", "seed = 1", None
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)

    @property
    @override
    def models_run(self) -> tuple[Reference, ...]:
        return (self.from_,)


class Merge(Stage):
    """Merge the weights of models that have a common base into one model."""

    semantics = ("merge", 1)

    from_: ModelRef = result("The first model.", "from = math", alias="from")
    others: Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("model", "stage")), low=1)] = (
        result("The other models.", "others = [code, chat]")
    )
    method: Annotated[SerializeAsAny[Merging], types.Of("merging")] = result(
        "How weights are combined.", "method = ties(density = 20%)", Linear.unvalidated()
    )
    base: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "Their common base, from which differences are taken. Default: the model at the start"
        " of `from`.",
        "base = gemma",
        None,
    )
    evals: Evals = result("Evals of the merged model.", "evals = [accuracy]", ())
    seed: Annotated[int | None, types.Whole(low=0)] = result(
        "Seed of what is dropped at random. Default: derived from the run's.", "seed = 1", None
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)

    @property
    @override
    def models_run(self) -> tuple[Reference, ...]:
        return (self.from_,)


class Evaluate(Stage):
    """Run evals on several models and compare them."""

    semantics = ("evaluate", 1)
    yields = "figures"
    reads = {"models": ("model", "scores")}

    models: Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("model", "stage")), low=1)] = (
        result("The models to evaluate.", "models = [baseline, specialist]")
    )
    evals: Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("eval",)), low=1)] = result(
        "The evals to run.", "evals = [accuracy]"
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)

    @property
    @override
    def models_run(self) -> tuple[Reference, ...]:
        return self.models


class Export(Stage):
    """Write a model as `transformers` loads it: weights, configuration and tokenizer."""

    semantics = ("export", 1)
    yields = "files"

    from_: ModelRef = result("What to write.", "from = generalist", alias="from")
    path: Annotated[str, types.Path("output")] = result(
        "The folder. Files in it that the stage did not write are left alone.", 'path = "out/model"'
    )
    format: Annotated[str, types.Choice(("safetensors",))] = result(
        "File format of the weights.", "format = safetensors", "safetensors"
    )
    adapter: Annotated[str, types.Choice(("merged", "apart"))] = result(
        "Whether an adapter is merged into the weights, or written separately in PEFT's format.",
        "adapter = apart",
        "merged",
    )
    dtype: Annotated[str, types.Choice(("f32", "bf16", "f16"))] = result(
        "The precision of the weights.", "dtype = f32", "bf16"
    )
    shard: Annotated[int, types.Memory()] = result(
        "Size limit of one file.", "shard = 2 GB", 5 * 10**9
    )
