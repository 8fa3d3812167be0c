"""Rules for rewards and sampling: groups to compare, completions that fit and are looked at."""

from __future__ import annotations

from collections.abc import Iterator

from tunelang.dsl.messages import declaration_conflicts
from tunelang.dsl.program import Declared, Program
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data, policy_stages, rewards, stages
from tunelang.dsl.vocabulary.base import Node, RewardExpression, TextExpression


def check_policy(context: RuleContext, declared: Declared, stage: policy_stages.Policy) -> None:
    """Check a policy optimisation: its group, rollout, reference and reward."""
    rollout = stage.rollout
    if stage.group < 2 and (stage.advantage != "gae" or stage.refill):
        context.report(
            declaration_conflicts.group_too_small(context.span(declared, "group"), declared)
        )
    if rollout.temperature == 0:
        context.report(
            declaration_conflicts.greedy(context.span(declared, "rollout.temperature"), declared)
        )
    if stage.reference is not None and stage.kl is None:
        context.report(
            declaration_conflicts.reference_without_kl(context.span(declared, "reference"))
        )
    limit = context.span(declared, "rollout.max_tokens")
    check_context(context, stage, rollout.max_tokens, rollout.max_prompt or 0, limit)
    parts = list(_reward_parts(stage.reward, context.program))
    for part in parts:
        if isinstance(part, rewards.Overlong) and part.buffer > rollout.max_tokens:
            span = context.argument(part, "buffer", context.span(declared, "reward"))
            context.report(
                declaration_conflicts.overlong_buffer(span, part.buffer, rollout.max_tokens, limit)
            )
    if not any(_depends_on_completion(part) for part in parts):
        context.report(declaration_conflicts.constant_reward(context.span(declared, "reward")))


def check_generate(context: RuleContext, declared: Declared, value: rewards.Generate) -> None:
    """Check that several samples of a prompt can differ."""
    if value.samples > 1 and value.temperature == 0 and value.beams is None:
        span = context.span(declared, "samples")
        context.report(declaration_conflicts.greedy_samples(span, value.samples))


def check_context(
    context: RuleContext, stage: stages.Training, completion: int, prompt: int, span: Span
) -> None:
    """Check that prompt and completion, in tokens, fit into the model's context."""
    model = context.base_model(stage.from_)
    if model is None:
        return
    owner = context.model_owner(model)
    name = owner.name if owner is not None else ""
    context_length = getattr(model, "context", None) or context.context_lengths.get(name)
    if context_length is not None and completion + max(prompt, 1) > context_length:
        context_span = context.span(owner, "context") if owner else None
        context.report(
            declaration_conflicts.beyond_context(
                span, completion, prompt, context_length, name, context_span
            )
        )


def _depends_on_completion(part: Node) -> bool:
    if isinstance(part, rewards.RewardConstant | rewards.RewardOperator | rewards.BySource):
        return False
    fields = [getattr(part, name) for name in type(part).model_fields]
    templates = [value for value in fields if isinstance(value, TextExpression)]
    return not templates or any(_reads_completion(template) for template in templates)


def _reads_completion(template: TextExpression) -> bool:
    if isinstance(template, data.TemplateText):
        return "{completion}" in template.text
    inner = [getattr(template, name) for name in type(template).model_fields]
    return any(_reads_completion(part) for part in inner if isinstance(part, TextExpression))


def _reward_parts(reward: RewardExpression, program: Program) -> Iterator[Node]:
    """Yield every part of a reward, declared rewards that it names included."""
    if isinstance(reward, rewards.RewardRef):
        declared = program.declarations.get(reward.name)
        if declared is None:  # reported already; a part that depends on the completion
            yield rewards.Length.unvalidated()
        elif isinstance(declared.value, rewards.RewardKind):
            yield declared.value
        else:
            yield from _reward_parts(declared.value, program)
        return
    yield reward
    if isinstance(reward, rewards.RewardOperator):
        for operand in reward.operands:
            yield from _reward_parts(operand, program)
    elif isinstance(reward, rewards.BySource):
        for part in reward.sources.values():
            yield from _reward_parts(part, program)
