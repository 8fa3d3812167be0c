"""Rules for the inputs of rewards: fields, roles and sources of the data that is scored."""

from __future__ import annotations

from tunelang.dsl.messages import outside
from tunelang.dsl.messages.outside import Use
from tunelang.dsl.messages.wording import nearest
from tunelang.dsl.program import Declared
from tunelang.dsl.rules.data_fields import SourceRows
from tunelang.dsl.rules.data_rules import check_field_of_sources
from tunelang.dsl.rules.function_rules import check_parameters, check_reward_function
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import custom, data, rewards
from tunelang.dsl.vocabulary.base import DataExpression, Node, RewardExpression


def check_reward_inputs(
    context: RuleContext,
    user: Declared,
    attribute: str,
    reward: RewardExpression,
    scored: DataExpression,
) -> None:
    """Check that a reward finds what it reads in the data that its user samples from.

    `attribute` is the attribute of `user` that holds the reward.
    """
    span = context.span(user, attribute)
    used = (span, f"used by `{user.name}` here")
    _check(context, reward, context.source_rows(scored), span, used)


def _check(
    context: RuleContext, reward: Node, sources: list[SourceRows], span: Span, used: Use
) -> None:
    match reward:
        case rewards.RewardRef():
            declared = context.declared(reward.name)
            if declared is not None:
                _check(context, declared.value, sources, context.span(declared), used)
        case rewards.RewardOperator():
            for operand in reward.operands:
                _check(context, operand, sources, span, used)
        case rewards.BySource():
            _check_by_source(context, reward, sources, span, used)
        case rewards.Verified():
            _check_verified(context, reward, sources, span, used)
            _check_templates(context, reward, sources, span, used)
        case custom.Python():
            place = context.argument(reward, "reference", span)
            function = check_reward_function(context, reward, place)
            if function is not None:
                supplied = ("completion", custom.COMPLETION_TOKENS)
                check_parameters(
                    context, function, reward.reference, place, supplied, sources, used
                )
        case rewards.Rubric():
            pass
        case RewardExpression():
            _check_templates(context, reward, sources, span, used)


def _check_verified(
    context: RuleContext, reward: rewards.Verified, sources: list[SourceRows], span: Span, used: Use
) -> None:
    """Check that generators made the data: only they can verify an answer."""
    for source in sources:
        if source.kind != "procedural":
            place = context.argument(reward, "", span)
            context.report(outside.needs_procedural(place, source.source, used))
            break


def _check_templates(
    context: RuleContext, reward: Node, sources: list[SourceRows], span: Span, used: Use
) -> None:
    """Check that every source has the fields and roles of a reward's templates."""
    for name in type(reward).model_fields:
        template = getattr(reward, name)
        if not isinstance(template, Node):
            continue
        for field, place in context.template_places(template, context.argument(reward, name, span)):
            if field in data.ROLES:
                _check_role(context, field, sources, place, used)
            else:
                check_field_of_sources(context, field, place, sources, ("completion",), used)


def _check_role(
    context: RuleContext, role: str, sources: list[SourceRows], span: Span, used: Use
) -> None:
    for source in sources:
        missing = role not in source.roles and source.fields is not None
        if missing and role not in (source.fields or ()):
            context.report(outside.role_not_there(span, role, source.source, source.roles, used))
            break


def _check_by_source(
    context: RuleContext, reward: rewards.BySource, sources: list[SourceRows], span: Span, used: Use
) -> None:
    """Check that each part has its source, and each source its part."""
    names = [source.source for source in sources]
    place = context.argument(reward, "", span)
    for name, part in reward.sources.items():
        if name not in names:
            argument = context.argument(reward, name, span)
            context.report(outside.unknown_source(argument, name, names, used))
        its_rows = [source for source in sources if source.source == name]
        _check(context, part, its_rows, place, used)
    unknown = [name for name in reward.sources if name not in names]
    meant = {nearest(name, names) for name in unknown}
    missing = [name for name in names if name not in reward.sources and name not in meant]
    if missing:
        context.report(outside.source_without_reward(place, missing, used))
