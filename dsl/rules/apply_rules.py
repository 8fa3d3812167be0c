"""Apply every rule to a Program."""

from __future__ import annotations

from tunelang.dsl.diagnostics.diagnostic import Diagnostics
from tunelang.dsl.messages import naming
from tunelang.dsl.program import Declared, Program
from tunelang.dsl.resolve.binding import Place
from tunelang.dsl.resolve.scope import Module
from tunelang.dsl.rules.contradictions import check_contradictions
from tunelang.dsl.rules.data_rules import check_expression, check_source
from tunelang.dsl.rules.file_rules import check_files
from tunelang.dsl.rules.function_rules import check_custom_functions, check_reward_functions
from tunelang.dsl.rules.model_rules import check_topology, check_transformer
from tunelang.dsl.rules.reward_inputs import check_reward_inputs
from tunelang.dsl.rules.reward_rules import check_generate, check_policy
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.rules.stage_rules import (
    check_measurable,
    check_outputs,
    check_training,
    check_yields,
)
from tunelang.dsl.rules.sweep_rules import check_sweep, check_winners
from tunelang.dsl.vocabulary import data, models, policy_stages, rewards, stages, utility_stages
from tunelang.dsl.vocabulary.base import DataExpression, Kind


def apply_rules(
    program: Program, places: dict[int, Place], diagnostics: Diagnostics, elsewhere: bool
) -> None:
    """Check a Program, which may lack declarations whose errors were reported already.

    With `elsewhere` it is checked for other hardware than its own.
    """
    context = RuleContext(program, places, diagnostics, elsewhere)
    declarations = program.declarations.values()
    for declared in declarations:  # first: later rules need the fields of the data
        if isinstance(declared.value, data.DataKind):
            check_source(context, declared, declared.value)
    for declared in declarations:
        _check_outside(context, declared)
    for declared in program.of("reward"):
        check_reward_functions(context, declared)
    for declared in declarations:
        _check_values(context, declared)
    check_outputs(context)
    check_winners(context)


def _check_outside(context: RuleContext, declared: Declared) -> None:
    """Check what a declaration reads outside the spec: files, fields of data, functions."""
    check_files(context, declared)
    if isinstance(declared.value, DataExpression):
        check_expression(context, declared, declared.value)
    for value in declared.values:
        if isinstance(value, Kind):
            check_custom_functions(context, declared, value)
        if isinstance(value, rewards.EvalKind | stages.Training | utility_stages.Sample):
            check_expression(context, declared, value.data)
        match value:
            case rewards.Generate():
                check_reward_inputs(context, declared, "score", value.score, value.data)
            case policy_stages.Policy():
                check_reward_inputs(context, declared, "reward", value.reward, value.data)
            case utility_stages.Sample():
                for attribute in ("score", "keep"):
                    reward = getattr(value, attribute)
                    if reward is not None:
                        check_reward_inputs(context, declared, attribute, reward, value.data)


def _check_values(context: RuleContext, declared: Declared) -> None:
    """Check the values of a declaration against each other."""
    for value in declared.values:
        match value:
            case models.Transformer():
                check_transformer(context, declared, value)
            case models.Tpu():
                check_topology(context, declared, value)
            case rewards.Generate():
                check_generate(context, declared, value)
            case stages.Training():
                check_training(context, declared, value)
                if isinstance(value, policy_stages.Policy):
                    check_policy(context, declared, value)
            case utility_stages.Evaluate():
                for reference in value.models:
                    check_measurable(context, declared, reference, value.evals)
        check_contradictions(context, declared, value)
    check_yields(context, declared)
    if declared.noun == "stage":
        check_sweep(context, declared)


def warn_of_unused(root: Module, diagnostics: Diagnostics) -> None:
    """Warn of declarations of the spec itself that nothing uses."""
    for symbol in root.names.values():
        if symbol.module is root and not symbol.used and symbol.noun != "stage":
            if symbol.value is not None:
                diagnostics.add(naming.unused(symbol))
