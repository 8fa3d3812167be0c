"""Rules for a user's Python functions: that they exist, and that their parameters are filled.

Functions are read, never imported.
"""

from __future__ import annotations

from collections.abc import Collection

from tunelang.dsl.messages import outside
from tunelang.dsl.messages.outside import Use
from tunelang.dsl.program import Declared
from tunelang.dsl.rules import named_files
from tunelang.dsl.rules.book import Book
from tunelang.dsl.rules.data_fields import SourceRows
from tunelang.dsl.rules.file_rules import find_file
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import custom, data, rewards, types
from tunelang.dsl.vocabulary.base import Function, Node, attributes

RUBRIC_FIELDS = ("criteria", *rewards.COMPLETION_FIELDS)


def _find_function(book: Book, span: Span, reference: str) -> named_files.PythonFunction | None:
    """Return the function that `file.py:function` refers to; None after a report."""
    file, _, function = reference.rpartition(":")
    path = find_file(book, span, file)
    if path is None:
        return None
    try:
        functions = named_files.python_functions(path)
    except named_files.BadFile as error:
        book.report(outside.bad_file(span, file, error.problem, error.line))
        return None
    if function not in functions:
        book.report(outside.unknown_python_function(span, function, file, list(functions)))
        return None
    return functions[function]


def _find_plain_function(
    book: Book, span: Span, reference: str
) -> named_files.PythonFunction | None:
    """Return a function that is neither `async` nor a generator; None after a report."""
    function = _find_function(book, span, reference)
    if function is not None and function.awaited:
        book.report(outside.awaited_function(span, reference))
        return None
    return function


def check_rows_function(book: Book, declared: Declared, source: data.PythonData) -> None:
    """Check that a function that yields rows exists, and that the settings are its parameters."""
    span = book.span(declared, "function")
    function = _find_function(book, span, source.function)
    if function is None:
        return
    settings = source.settings.values if source.settings is not None else {}
    names = [parameter.name for parameter in function.parameters]
    for name in settings:
        if name not in names and not function.takes_any:
            place = book.argument(source.settings, name, book.span(declared, "settings"))
            book.report(outside.unknown_argument_of(place, name, source.function, names))
    missing = [p.name for p in function.parameters if p.required and p.name not in settings]
    if missing:
        book.report(outside.unfilled_parameter(span, source.function, missing[0], list(settings)))


def check_reward_function(
    book: Book, reward: custom.Python, span: Span
) -> named_files.PythonFunction | None:
    """Return a reward's function, which takes the completion; None after a report."""
    function = _find_plain_function(book, span, reward.reference)
    if function is None:
        return None
    names = [parameter.name for parameter in function.parameters]
    if not function.takes_any and not {"completion", custom.PIECES}.intersection(names):
        book.report(outside.no_completion_parameter(span, reward.reference, names))
        return None
    return function


def check_parameters(
    book: Book,
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
                book.report(outside.unknown_parameter_field(span, reference, name, known, used))
                break


def check_custom_functions(book: Book, declared: Declared, node: Node) -> None:
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
                _check_custom_function(book, declared, item, want)
            elif isinstance(item, Function):
                check_custom_functions(book, declared, item)


def _check_custom_function(
    book: Book, declared: Declared, value: custom.Python, want: types.Code
) -> None:
    span = book.argument(value, "reference", book.span(declared))
    function = _find_plain_function(book, span, value.reference)
    if function is None:
        return
    if want.fields:
        sources = book.source_rows(declared.value.data)
        used = (book.span(declared, "data"), "the fields of this data are passed too")
        check_parameters(book, function, value.reference, span, want.takes, sources, used)
        return
    for name in ("timeout", "on_error"):
        if getattr(value, name) != attributes(custom.Python)[name].default:
            place = book.argument(value, name, book.span(declared))
            book.report(outside.only_of_rewards(place, name))
    for parameter in function.parameters:
        if parameter.required and parameter.name not in want.takes:
            supplied = list(want.takes)
            book.report(outside.unfilled_parameter(span, value.reference, parameter.name, supplied))


def check_reward_functions(book: Book, declared: Declared) -> None:
    """Check the functions and rubrics of a declared reward, whether a stage uses it or not."""
    pending: list[object] = [declared.value]
    while pending:
        node = pending.pop()
        match node:
            case custom.Python():
                span = book.argument(node, "reference", book.span(declared))
                check_reward_function(book, node, span)
            case rewards.RewardOperator():
                pending += node.operands
            case rewards.BySource():
                pending += node.sources.values()
            case rewards.Rubric():
                _check_instructions(book, declared, node)


def _check_instructions(book: Book, declared: Declared, rubric: rewards.Rubric) -> None:
    """Check that a rubric's own instructions show the judge the criteria and the completion."""
    if rubric.instructions is None:
        return
    span = book.span(declared, "instructions")
    places = dict(book.template_places(rubric.instructions, span))
    for name, place in places.items():
        if name not in RUBRIC_FIELDS:
            book.report(outside.unknown_field(place, name, list(RUBRIC_FIELDS), "rubric", None))
    for name in ("criteria", "completion"):
        if name not in places:
            book.report(outside.instructions_lack(span, name))
