"""Rules for sweeps: a winner must be chosen where one model is used, by a metric that exists."""

from __future__ import annotations

from tunelang.dsl.messages import declaration_conflicts
from tunelang.dsl.program import Declared
from tunelang.dsl.references import references_in
from tunelang.dsl.rules.data_fields import declared_names
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.vocabulary import policy_stages, stages, training


def check_sweep(context: RuleContext, declared: Declared) -> None:
    """Check the `keep` of a stage: it needs branches, and a metric that the stage measures."""
    for branch in declared.branches:
        stage = branch.value
        keep = getattr(stage, "keep", None)
        if not isinstance(keep, training.Winner) or declared.damaged:
            return
        if not declared.fans_out and not inherits_branches(context, declared):
            context.report(declaration_conflicts.keep_without_each(context.span(declared, "keep")))
        if isinstance(keep, training.Best | training.Lowest) and isinstance(stage, stages.Training):
            _check_metric(context, declared, stage, keep)


def _check_metric(
    context: RuleContext,
    declared: Declared,
    stage: stages.Training,
    keep: training.Best | training.Lowest,
) -> None:
    span = context.argument(keep, "metric", context.span(declared, "keep"))
    known = list(stage.metrics)
    for reference in stage.evals:
        eval_ = context.declared(reference.name)
        if eval_ is None:
            return
        known += [eval_.name, *(f"{eval_.name}.{metric}" for metric in eval_.value.measures)]
    if isinstance(stage, policy_stages.Policy):
        known += [f"{name}.reward" for name in sorted(declared_names(stage.data, context.program))]
    if keep.metric in known:
        return
    head = context.declared(keep.metric) or context.declared(keep.metric.rpartition(".")[0])
    if head is not None and head.noun == "eval" and head.name not in [r.name for r in stage.evals]:
        has_evals = f"{declared.noun}.{declared.name}.evals" in context.program.origins
        evals_span = context.span(declared, "evals") if has_evals else None
        context.report(declaration_conflicts.metric_not_measured(span, head, declared, evals_span))
    else:
        context.report(declaration_conflicts.unknown_metric(span, keep.metric, declared, known))


def inherits_branches(context: RuleContext, declared: Declared) -> bool:
    """Return whether a stage fans out because a stage that it uses keeps all of its branches."""
    for branch in declared.branches:
        for _, reference in references_in(branch.value, ""):
            used = context.declared(reference.name)
            if used is None or used.noun != "stage" or used.name == declared.name:
                continue
            keeps_all = isinstance(getattr(used.branches[0].value, "keep", None), training.All)
            if keeps_all and (used.fans_out or inherits_branches(context, used)):
                return True
    return False


def check_winners(context: RuleContext) -> None:
    """Check that each stage that fans out, and is used as one model, names its winner."""
    for declared in context.program.declarations.values():
        for value in declared.values:
            for path, reference in references_in(value, ""):
                used = context.declared(reference.name)
                if used is None or used.noun != "stage" or not used.branches:
                    continue
                keep = getattr(used.branches[0].value, "keep", None)
                if keep is None and (used.fans_out or inherits_branches(context, used)):
                    span = context.span(declared, path.removeprefix("."))
                    context.report(declaration_conflicts.no_winner(span, used, context.span(used)))
