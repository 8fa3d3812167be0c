"""Rules for stages: start, length, batch and mesh, data and evals, outputs."""

from __future__ import annotations

from tunelang.dsl.messages import declaration_conflicts
from tunelang.dsl.program import Declared
from tunelang.dsl.references import references_in
from tunelang.dsl.rules.model_rules import device_count
from tunelang.dsl.rules.reward_rules import check_context
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.rules.sweep_rules import inherits_branches
from tunelang.dsl.vocabulary import (
    data,
    models,
    policy_stages,
    rewards,
    stages,
    supervised_stages,
    training,
    utility_stages,
)
from tunelang.dsl.vocabulary.base import DataExpression, Kind, Reference


def check_training(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    """Check a stage that updates weights."""
    _check_start(context, declared, stage)
    _check_warmup(context, declared, stage)
    _check_eval_spacing(context, declared, stage)
    _check_batch(context, declared, stage)
    _check_mesh_size(context, declared, stage)
    _check_roles(context, declared, stage)
    _check_eval_data(context, declared, stage)
    itself = Reference.unvalidated(noun="stage", name=declared.name)
    check_measurable(context, declared, itself, stage.evals)


def _check_start(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    start = context.declared(stage.from_.name)
    if start is None or (start.branches and start.branches[0].value.yields != "model"):
        return
    model, span = start.value, context.span(declared, "from")
    if isinstance(model, models.Pretrained) and model.weights and stage.adapter is None:
        context.report(
            declaration_conflicts.quantized_without_adapter(span, declared, model.weights)
        )
    if isinstance(model, models.Transformer) and isinstance(stage.adapter, training.Lora):
        context.report(declaration_conflicts.adapter_of_random(span, start))
    if isinstance(stage.adapter, training.Continued):
        if any(getattr(value, "adapter", None) is None for value in start.values):
            context.report(
                declaration_conflicts.nothing_to_continue(context.span(declared, "adapter"), start)
            )


def check_yields(context: RuleContext, declared: Declared) -> None:
    """Check that each stage that a declaration refers to yields what is used there."""
    reported: set[tuple[str, str]] = set()
    for value in declared.values:
        for path, reference in references_in(value, ""):
            stage = context.declared(reference.name)
            if stage is None or stage.noun != "stage" or not stage.branches:
                continue
            path = path.removeprefix(".")
            wanted = value.reads.get(path, ("model",)) if isinstance(value, Kind) else ("model",)
            if stage.branches[0].value.yields not in wanted and (path, stage.name) not in reported:
                reported.add((path, stage.name))
                context.report(
                    declaration_conflicts.yields_other(context.span(declared, path), stage, wanted)
                )


def check_measurable(
    context: RuleContext, declared: Declared, model: Reference, evals: tuple[Reference, ...]
) -> None:
    """Check that a reward model, which answers nothing, is measured by `preference` evals only."""
    measured = context.declared(model.name)
    if measured is None or not measured.branches:
        return
    if measured.branches[0].value.yields != "scores":
        return
    for reference in evals:
        eval_ = context.declared(reference.name)
        if eval_ is not None and not isinstance(eval_.value, rewards.Preference):
            span = context.span(declared, "evals")
            context.report(
                declaration_conflicts.eval_of_reward_model(span, model.name, reference.name)
            )


def _check_warmup(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    warmup, length = stage.optimizer.warmup, stage.length
    if warmup.unit == length.unit and warmup.value > length.value:
        span = context.span(declared, "optimizer.warmup")
        length_span = context.span(declared, "length")
        context.report(declaration_conflicts.warmup_too_long(span, warmup, length, length_span))


def _check_eval_spacing(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    """Check that the stage is long enough for the first evaluation between start and end."""
    if stage.length.unit == "steps" and (stage.eval_every or 0) > stage.length.value:
        context.report(
            declaration_conflicts.never_evaluated(
                context.span(declared, "eval_every"), stage.length
            )
        )


def _check_batch(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    """Check that the batch divides over the micro-batch and mesh that the stage pins."""
    group, formula = 1, ""
    if isinstance(stage, policy_stages.Policy):
        group = stage.group
        sequences = stage.batch * group
        formula = f"{stage.batch} prompts × group {group}"
        if sequences % stage.minibatches:
            span = context.span(declared, "minibatches")
            context.report(
                declaration_conflicts.minibatches(span, stage.batch, group, stage.minibatches)
            )
    elif isinstance(stage, supervised_stages.Supervised) and stage.batch.unit == "sequences":
        sequences = int(stage.batch.value)
        formula = f"{sequences}"
    else:
        return
    mesh = stage.mesh
    if mesh is None and stage.micro_batch is None:
        return
    parts = []
    if mesh is not None:
        parts += [(n, s) for n, s in (("data", mesh.data), ("fsdp", mesh.fsdp)) if s > 1]
    if stage.micro_batch is not None:
        parts.append(("micro-batch", stage.micro_batch))
    step = _replicas(mesh) * (stage.micro_batch or 1)
    if sequences % step:
        pinned = context.span(declared, "micro_batch" if stage.micro_batch else "mesh")
        span = context.span(declared, "batch")
        context.report(
            declaration_conflicts.batch_does_not_divide(
                span, sequences, formula, parts, step, group, pinned
            )
        )


def _check_mesh_size(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    """Check a pinned mesh against the size of the stage's own hardware."""
    mesh = stage.mesh
    devices = (
        None if context.elsewhere else device_count(context, stage.on or context.program.run.on)
    )
    if mesh is not None and devices is not None:
        size = _replicas(mesh) * mesh.tensor * mesh.expert * mesh.context
        if size != devices[0]:
            context.report(
                declaration_conflicts.mesh_size(context.span(declared, "mesh"), size, *devices)
            )


def _replicas(mesh: training.Axes | None) -> int:
    """Return the number of parts that a mesh divides a batch into."""
    return mesh.data * mesh.fsdp if mesh is not None else 1


def _check_roles(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    """Check that the data has the roles that the kind of stage trains on."""
    for rows in context.source_rows(stage.data):
        source = context.declared(rows.source)
        assert source is not None
        if not source.damaged and not any(rows.roles.issuperset(need) for need in stage.needs):
            span = context.span(declared, "data")
            context.report(
                declaration_conflicts.missing_role(span, declared, source, rows.roles, stage.needs)
            )


def _check_eval_data(context: RuleContext, declared: Declared, stage: stages.Training) -> None:
    """Check that the evals do not measure on rows that the stage trains on."""
    for reference in stage.evals:
        eval_ = context.declared(reference.name)
        if eval_ is None:
            continue
        if isinstance(eval_.value, rewards.Generate):
            span = context.span(eval_, "max_tokens")
            check_context(context, stage, eval_.value.max_tokens, 0, span)
        shared = _selected_rows(context, stage.data) & _selected_rows(context, eval_.value.data)
        if shared:
            file = min(shared)[0]
            context.report(
                declaration_conflicts.trains_on_eval(context.span(declared, "data"), eval_, file)
            )


def _selected_rows(
    context: RuleContext, expression: DataExpression, selection: str = ""
) -> set[tuple[str, str]]:
    """Return the files that an expression reads, each with the selection of rows from it.

    Equal pairs are equal rows. Other overlaps, as of `take(5)` and `take(10)`, are not detected.
    """
    match expression:
        case data.DataRef():
            declared = context.declared(expression.name)
            value = declared.value if declared is not None else None
            if isinstance(value, DataExpression):
                return _selected_rows(context, value, selection)
            return {(path, selection) for path in getattr(value, "path", ())}
        case data.Mixture():
            parts = (_selected_rows(context, part, selection) for part in expression.parts)
            return set().union(*parts)
        case data.Weighted():
            return _selected_rows(context, expression.of, selection)
        case data.Take() | data.Skip() | data.Where() | data.Split():
            step = expression.model_copy(update={"of": None})
            return _selected_rows(context, expression.of, f"{selection}{step!r}")
        case data.DataMethod():
            return _selected_rows(context, expression.of, selection)
    return set()


def check_outputs(context: RuleContext) -> None:
    """Check that no two stages, and no two branches of one, write into the same folder."""
    writers: dict[str, Declared] = {}
    for declared in context.program.of("stage"):
        for branch in declared.branches:
            if isinstance(branch.value, utility_stages.Export):
                path = branch.value.path.rstrip("/")
                if inherits_branches(context, declared) and not declared.fans_out:
                    span = context.span(declared, "from")
                    context.report(declaration_conflicts.every_branch(span, branch.value.path))
                if path in writers:
                    other = context.span(writers[path], "path")
                    context.report(
                        declaration_conflicts.same_output(
                            context.span(declared, "path"), path, other
                        )
                    )
                writers[path] = declared
