"""Rules for a user's Python functions: that they exist, and that their parameters are filled.

Functions are read, never imported.
"""

from __future__ import annotations

from collections.abc import Collection

from tunelang.dsl.messages import outside
from tunelang.dsl.messages.outside import Use
from tunelang.dsl.program import Declared
from tunelang.dsl.rules import named_files
from tunelang.dsl.rules.data_fields import SourceRows
from tunelang.dsl.rules.file_rules import find_file
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import custom, data, rewards, types
from tunelang.dsl.vocabulary.base import Function, Node, attributes

RUBRIC_FIELDS = ("criteria", *rewards.COMPLETION_FIELDS)


def _find_function(
    context: RuleContext, span: Span, reference: str
) -> named_files.PythonFunction | None:
    """Return the function that `file.py:function` refers to; None after a report."""
    file, _, function = reference.rpartition(":")
    path = find_file(context, span, file)
    if path is None:
        return None
    try:
        functions = named_files.python_functions(path)
    except named_files.BadFile as error:
        context.report(outside.bad_file(span, file, error.problem, error.line))
        return None
    if function not in functions:
        context.report(outside.unknown_python_function(span, function, file, list(functions)))
        return None
    return functions[function]


def _find_plain_function(
    context: RuleContext, span: Span, reference: str
) -> named_files.PythonFunction | None:
    """Return a function that is neither `async` nor a generator; None after a report."""
    function = _find_function(context, span, reference)
    if function is not None and function.awaited:
        context.report(outside.awaited_function(span, reference))
        return None
    return function


def check_rows_function(context: RuleContext, declared: Declared, source: data.PythonData) -> None:
    """Check that a function that yields rows exists, and that the settings are its parameters."""
    span = context.span(declared, "function")
    function = _find_function(context, span, source.function)
    if function is None:
        return
    settings = source.settings.values if source.settings is not None else {}
    names = [parameter.name for parameter in function.parameters]
    for name in settings:
        if name not in names and not function.takes_any:
            place = context.argument(source.settings, name, context.span(declared, "settings"))
            context.report(outside.unknown_argument_of(place, name, source.function, names))
    missing = [p.name for p in function.parameters if p.required and p.name not in settings]
    if missing:
        context.report(
            outside.unfilled_parameter(span, source.function, missing[0], list(settings))
        )


def check_reward_function(
    context: RuleContext, reward: custom.Python, span: Span
) -> named_files.PythonFunction | None:
    """Return a reward's function, which takes the completion; None after a report."""
    function = _find_plain_function(context, span, reward.reference)
    if function is None:
        return None
    names = [parameter.name for parameter in function.parameters]
    if not function.takes_any and not {"completion", custom.COMPLETION_TOKENS}.intersection(names):
        context.report(outside.no_completion_parameter(span, reward.reference, names))
        return None
    return function


def check_parameters(
    context: RuleContext,
    function: named_files.PythonFunction,
    reference: str,
    span: Span,
    supplied: Collection[str],
    sources: list[SourceRows],
    used: Use,
) -> None:
    """Check that each parameter without a default is supplied, or is a field of all sources."""
    for parameter in function.parameters:
        name = parameter.name
        if not parameter.required or name in supplied:
            continue
        for source in sources:
            fields = set(source.fields or ()) | source.roles
            if source.fields is not None and name not in fields:
                known = list(dict.fromkeys([*supplied, *sorted(fields)]))
                context.report(outside.unknown_parameter_field(span, reference, name, known, used))
                break


def check_custom_functions(context: RuleContext, declared: Declared, node: Node) -> None:
    """Check the functions that stand for a loss, an advantage, a schedule or a metric."""
    known = attributes(type(node))
    for name, info in type(node).model_fields.items():
        attribute = known.get(info.alias or name)
        if attribute is None:
            continue
        value, want = getattr(node, name), attribute.type
        want = want.item if isinstance(want, types.ListOf) else want
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(want, types.Code) and isinstance(item, custom.Python):
                _check_custom_function(context, declared, item, want)
            elif isinstance(item, Function):
                check_custom_functions(context, declared, item)


def _check_custom_function(
    context: RuleContext, declared: Declared, value: custom.Python, want: types.Code
) -> None:
    span = context.argument(value, "reference", context.span(declared))
    function = _find_plain_function(context, span, value.reference)
    if function is None:
        return
    if want.fields:
        sources = context.source_rows(declared.value.data)
        used = (context.span(declared, "data"), "the fields of this data are passed too")
        check_parameters(context, function, value.reference, span, want.takes, sources, used)
        return
    for name in ("timeout", "on_error"):
        if getattr(value, name) != attributes(custom.Python)[name].default:
            place = context.argument(value, name, context.span(declared))
            context.report(outside.only_of_rewards(place, name))
    for parameter in function.parameters:
        if parameter.required and parameter.name not in want.takes:
            supplied = list(want.takes)
            context.report(
                outside.unfilled_parameter(span, value.reference, parameter.name, supplied)
            )


def check_reward_functions(context: RuleContext, declared: Declared) -> None:
    """Check the functions and rubrics of a declared reward, whether a stage uses it or not."""
    pending: list[object] = [declared.value]
    while pending:
        node = pending.pop()
        match node:
            case custom.Python():
                span = context.argument(node, "reference", context.span(declared))
                check_reward_function(context, node, span)
            case rewards.RewardOperator():
                pending += node.operands
            case rewards.BySource():
                pending += node.sources.values()
            case rewards.Rubric():
                _check_instructions(context, declared, node)


def _check_instructions(context: RuleContext, declared: Declared, rubric: rewards.Rubric) -> None:
    """Check that a rubric's own instructions show the judge the criteria and the completion."""
    if rubric.instructions is None:
        return
    span = context.span(declared, "instructions")
    places = dict(context.template_places(rubric.instructions, span))
    for name, place in places.items():
        if name not in RUBRIC_FIELDS:
            context.report(outside.unknown_field(place, name, list(RUBRIC_FIELDS), "rubric", None))
    for name in ("criteria", "completion"):
        if name not in places:
            context.report(outside.instructions_lack(span, name))
