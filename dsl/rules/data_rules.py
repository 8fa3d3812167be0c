"""Rules for data: files that can be read, and fields that every reader finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tunelang.dsl.messages import outside
from tunelang.dsl.messages.outside import Use
from tunelang.dsl.program import Declared
from tunelang.dsl.rules import named_files
from tunelang.dsl.rules.data_fields import SourceRows
from tunelang.dsl.rules.file_rules import find_file
from tunelang.dsl.rules.function_rules import check_rows_function
from tunelang.dsl.rules.rule_context import RuleContext, place_in
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.vocabulary import data, utility_stages
from tunelang.dsl.vocabulary.base import DataExpression, Node

_NOWHERE = Span(Source("", ""), 0, 0)


def check_source(context: RuleContext, declared: Declared, source: data.DataKind) -> None:
    """Check that the files of a source can be read, and have the fields of its templates.

    Stores the fields in the context.
    """
    context.fields[declared.name] = None
    fields = _fields_of(context, declared, source)
    if fields is None:
        return
    context.fields[declared.name] = frozenset(fields)
    written = f"data.{declared.name}.on_long_row" in context.program.origins
    if written and source.on_long_row == "divide" and (source.prompt or source.messages):
        context.report(outside.divided_turns(context.span(declared, "on_long_row")))
    for role in data.ROLES:
        template = getattr(source, role)
        if template is not None:
            span = context.span(declared, role)
            if role not in ("system", "label", "margin"):
                if not any(True for _ in context.template_places(template, _NOWHERE)):
                    context.report(outside.constant_template(span, role))
            for name, place in context.template_places(template, span):
                _check_field(context, name, place, fields, declared)


def _fields_of(
    context: RuleContext, declared: Declared, source: data.DataKind
) -> Mapping[str, object] | None:
    """Return the fields of a source, each with an example value; None if they are unknown."""
    match source:
        case data.Procedural():
            _check_procedural(context, declared, source)
            return {"question": "", "answer": "", "metadata": {}}
        case data.PythonData():
            check_rows_function(context, declared, source)
            return dict.fromkeys(source.fields) if source.fields is not None else None
        case data.Sampled():
            sampled = _sampled_fields(context, source)
            return dict.fromkeys(sampled) if sampled is not None else None
        case data.Jsonl() | data.Parquet() | data.Csv() | data.TextFiles():
            return _fields_of_files(context, declared, source)
    raise AssertionError(source)


def _sampled_fields(context: RuleContext, source: data.Sampled) -> set[str] | None:
    """Return the fields of the rows that a stage samples; None if they are unknown."""
    stage = context.declared(source.from_.name)
    sample = stage.values[0] if stage is not None else None
    if not isinstance(sample, utility_stages.Sample):  # reported by the rules for stages
        return None
    fields = {"prompt", "target", "reward"}
    if source.rows == "pairs":
        fields |= {"chosen", "rejected", "chosen_reward", "rejected_reward"}
    else:
        fields |= {"completion", "tokens"}
    for rows in context.source_rows(sample.data):
        if rows.fields is None:
            return None
        fields |= rows.fields
    return fields


def _fields_of_files(
    context: RuleContext, declared: Declared, source: data.FileData
) -> dict[str, object] | None:
    fields: dict[str, object] = {}
    span = context.span(declared, "path")
    separator = source.separator if isinstance(source, data.Csv) else ","
    for name in source.path:
        path = find_file(context, span, name)
        if path is None:
            return None
        try:
            sample = named_files.sample(path, declared.kind or "", separator)
        except named_files.BadFile as error:
            context.report(outside.bad_file(span, name, error.problem, error.line))
            return None
        except OSError as error:
            problem = (error.strerror or "it cannot be read").lower()
            context.report(outside.bad_file(span, name, problem, None))
            return None
        fields.update({key: sample.example.get(key) for key in sample.fields})
    return fields


def _check_field(
    context: RuleContext, name: str, span: Span, fields: Mapping[str, object], declared: Declared
) -> None:
    """Check that `{a}`, `{a.b}` or `{a.0.b}` exists, as far as the first row shows."""
    if name in fields:
        return
    head, *inner_parts = name.split(".")
    if head not in fields:
        context.report(outside.unknown_field(span, name, list(fields), declared.title, None))
        return
    value, path = fields[head], head
    for part in inner_parts:
        if value is None or value in ({}, ""):  # its parts are unknown
            return
        if isinstance(value, list):
            known = [str(number) for number in range(len(value))]
            inner = value[int(part)] if part in known else None
        else:
            known = list(value) if isinstance(value, dict) else []
            inner = value.get(part) if isinstance(value, dict) else None
        if part not in known:
            paths = [f"{path}.{key}" for key in known[:20]] or [path]
            context.report(outside.unknown_field(span, name, paths, declared.title, None))
            return
        value, path = inner, f"{path}.{part}"


def _check_procedural(context: RuleContext, declared: Declared, source: data.Procedural) -> None:
    """Check that the generator exists and has these settings."""
    span = context.span(declared, "task")
    if named_files.procedural_file(source.task) is None:
        tasks = named_files.procedural_tasks()
        if tasks is None:
            context.report(outside.no_generators(span))
        else:
            context.report(outside.unknown_task(span, source.task, list(tasks)))
        return
    known = named_files.procedural_settings(source.task)
    if source.settings is None or known is None:
        return
    free = [name for name in known if name not in ("size", "seed")]
    for name in source.settings.values:
        if name not in free:
            place = context.argument(source.settings, name, context.span(declared, "settings"))
            context.report(outside.unknown_setting(place, name, source.task, free))


def check_expression(context: RuleContext, declared: Declared, expression: DataExpression) -> None:
    """Check that every source has the fields that `where` and `map` read."""
    match expression:
        case data.Mixture():
            for part in expression.parts:
                check_expression(context, declared, part)
        case data.Weighted():
            check_expression(context, declared, expression.of)
        case data.DataMethod():
            check_expression(context, declared, expression.of)
            sources = context.source_rows(expression.of)
            if isinstance(expression, data.Where):
                span = context.argument(expression, "condition", context.span(declared))
                for name in _condition_fields(expression.condition):
                    check_field_of_sources(
                        context, name, place_in(span, name), sources, ("length",), None
                    )
            if isinstance(expression, data.Map):
                for role in data.ROLES:
                    template = getattr(expression, role)
                    if template is not None:
                        span = context.argument(expression, role, context.span(declared))
                        for name, place in context.template_places(template, span):
                            check_field_of_sources(context, name, place, sources, (), None)


def _condition_fields(condition: Node) -> Iterator[str]:
    if isinstance(condition, data.FieldValue):
        yield condition.name
    elif isinstance(condition, data.Operator):
        for operand in condition.operands:
            yield from _condition_fields(operand)


def check_field_of_sources(
    context: RuleContext,
    name: str,
    span: Span,
    sources: Iterable[SourceRows],
    extra: tuple[str, ...],
    used: Use,
) -> None:
    """Check that every source has a field. `extra` fields exist for every row."""
    head = name.partition(".")[0]
    for source in sources:
        if source.fields is None or head in extra or head in source.fields or name in source.fields:
            continue
        declared = context.declared(source.source)
        title = declared.title if declared else source.source
        context.report(outside.unknown_field(span, name, [*source.fields, *extra], title, used))
        return
