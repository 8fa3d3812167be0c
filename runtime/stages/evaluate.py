"""The `evaluate` stage: several models measured by the same evals."""

from __future__ import annotations

from typing_extensions import override

from tunelang.dsl.vocabulary.utility_stages import Evaluate
from tunelang.runtime.stages.stage_kinds import Summary, TaskContext, TaskKind, register


@register
class EvaluateKind(TaskKind[Evaluate]):
    """Measures models."""

    stages = (Evaluate,)

    @override
    def run(self, stage: Evaluate, context: TaskContext) -> Summary:
        metrics: dict[str, float] = {}
        table: dict[str, dict[str, float]] = {}
        for reference in stage.models:
            weights = context.load(reference)
            _, values = context.measure(stage.evals, weights, weights.origin.evals)
            table[reference.name] = values
            metrics |= {f"{reference.name}/{name}": value for name, value in values.items()}
        return {"metrics": metrics, "table": table}
