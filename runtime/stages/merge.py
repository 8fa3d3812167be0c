"""The `merge` stage: one model made of several, and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC, FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.training import Dare, Ties
from tunelang.dsl.vocabulary.utility_stages import Merge
from tunelang.runtime.loading.weight_merging import merge_weights
from tunelang.runtime.stages.stage_kinds import Summary, TaskContext, TaskKind, register


@dataclass(eq=False)
class NotAlikeError(TuneError):
    """Two models cannot be merged: their names, `first` and `other`."""

    code = "not-alike"
    exit_code = WRONG_SPEC
    first: str
    other: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.not_alike(self.first, self.other)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="others")


@register
class MergeKind(TaskKind[Merge]):
    """Merges weights tensor by tensor."""

    stages = (Merge,)

    @override
    def run(self, stage: Merge, context: TaskContext) -> Summary:
        first = context.load(stage.from_)
        others = [context.load(reference) for reference in stage.others]
        for reference, other in zip(stage.others, others, strict=True):
            if other.model.architecture != first.model.architecture:
                raise NotAlikeError(stage.from_.name, reference.name)
        base = None
        if isinstance(stage.method, Ties | Dare):
            start = Reference.unvalidated(noun="model", name=first.origin.model)
            base = context.load(stage.base or start).params
        context.doing("merging")
        parameters = [first.params, *(other.params for other in others)]
        params = merge_weights(stage.method, parameters, base, context.seed(stage.seed))
        evals, metrics = context.measure(stage.evals, replace(first, params=params), {})
        context.save(params)
        return {
            "model": first.origin.model, "from": first.origin.node, "metrics": metrics,
            "evals": evals,
        }  # fmt: skip

    @override
    def resident_models(self, stage: Merge) -> int:
        return len(stage.others) + 1
