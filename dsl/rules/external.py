"""What the spec names outside itself: files and their fields, model folders, functions,
generators.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelang.dsl import messages
from tunelang.dsl.messages.wording import nearest
from tunelang.dsl.program import Declared
from tunelang.dsl.resolve.values import template_fields
from tunelang.dsl.rules import named_files
from tunelang.dsl.rules.data_fields import Examples, examples
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.vocabulary import custom, data, models, rewards, stages, types
from tunelang.dsl.vocabulary.base import (
    DataExpression,
    Function,
    Kind,
    Node,
    RewardExpression,
    attributes,
)

if TYPE_CHECKING:
    from tunelang.dsl.rules.stage_rules import Book

_NOWHERE = Span(Source("", ""), 0, 0)
RUBRIC_FIELDS = ("criteria", *rewards.COMPLETION_FIELDS)


def check(book: Book) -> None:
    """Check everything outside the spec, data first: later checks need its fields."""
    for declared in book.program.declarations.values():
        if isinstance(declared.value, data.DataKind):
            _data(book, declared, declared.value)
    for declared in book.program.declarations.values():
        match declared.value:
            case models.SentencePiece():
                _file(book, book.span(declared, "path"), declared.value.path)
            case models.Pretrained():
                _model(book, declared, declared.value)
            case models.HuggingFace():
                _folder(book, book.span(declared, "path"), declared.value.path)
            case models.TokenizerKind(chat=str(chat)) if "{" not in chat:
                _chat(book, declared, chat)
            case DataExpression():
                _expression(book, declared, declared.value)
        if isinstance(declared.value, rewards.EvalKind):
            _expression(book, declared, declared.value.data)
        values: list[Any] = [branch.value for branch in declared.branches] or [declared.value]
        for value in values:
            if isinstance(value, Kind):
                _custom(book, declared, value)
        if isinstance(declared.value, rewards.Generate):
            score, found = declared.value.score, declared.value.data
            _reward(
                book, declared, score, list(examples(found, book.program, book.fields)), "score"
            )
        for branch in declared.branches:
            if isinstance(branch.value, stages.Training):
                _expression(book, declared, branch.value.data)
            if isinstance(branch.value, stages.Policy):
                found = branch.value.data
                sources = list(examples(found, book.program, book.fields))
                _reward(book, declared, branch.value.reward, sources, "reward")
            if isinstance(branch.value, stages.Sample):
                _expression(book, declared, branch.value.data)
                found = branch.value.data
                sources = list(examples(found, book.program, book.fields))
                for name in ("score", "keep"):
                    reward = getattr(branch.value, name)
                    if reward is not None:
                        _reward(book, declared, reward, sources, name)
    for declared in book.program.of("reward"):
        _functions(book, declared)


# Files.


def _file(book: Book, span: Span, name: str) -> Path | None:
    """The path of a file that exists; None after a report."""
    path = book.program.folder / Path(name).expanduser()
    if path.is_file():
        return path
    if path.exists():
        book.add(messages.not_a_file(span, name, path))
    else:
        book.add(messages.missing_file(span, name, path, named_files.nearest(path)))
    return None


def _folder(book: Book, span: Span, name: str) -> Path | None:
    """The path of a folder that exists; None for an id on the hub, or after a report."""
    path = book.program.folder / Path(name).expanduser()
    if path.is_dir():
        return path
    if named_files.is_hub_id(name) and not path.exists():
        return None
    book.add(messages.missing_folder(span, name, path, named_files.nearest(path)))
    return None


def _model(book: Book, declared: Declared, model: models.Pretrained) -> None:
    span = book.span(declared, "path")
    path = _folder(book, span, model.path)
    if path is None:
        return
    try:
        config = named_files.model_config(path)
    except named_files.BadFile as error:
        book.add(messages.bad_file(span, model.path, str(error.args[0]), None))
        return
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int):
        book.contexts[declared.name] = longest
        if model.context is not None and model.context > longest:
            book.add(messages.context_too_long(book.span(declared, "context"), longest))


def _chat(book: Book, declared: Declared, chat: str) -> None:
    """Text without a brace is no Jinja template: a named one was meant."""
    span = book.span(declared, "chat")
    if chat in models.NAMED_CHAT_TEMPLATES:
        if span.text.startswith('"'):
            book.add(messages.quoted_choice(span, chat))
    else:
        known = models.NAMED_CHAT_TEMPLATES
        book.add(messages.unknown_choice(span, "`chat`", chat, known))


# Data.


def _data(book: Book, declared: Declared, source: data.DataKind) -> None:
    """The files of a source exist, are what they should be, and have the fields of its
    templates.
    """
    book.fields[declared.name] = None
    if isinstance(source, data.Procedural):
        _procedural(book, declared, source)
        fields: dict[str, Any] = {"question": "", "answer": "", "metadata": {}}
    elif isinstance(source, data.PythonData):
        _rows_function(book, declared, source)
        if source.fields is None:
            return
        fields = dict.fromkeys(source.fields)
    elif isinstance(source, data.Sampled):
        known = _sampled_fields(book, source)
        if known is None:
            return
        fields = dict.fromkeys(known)
    else:
        found = _samples(book, declared, source)
        if found is None:
            return
        fields = found
    book.fields[declared.name] = frozenset(fields)
    written = f"data.{declared.name}.on_long_row" in book.program.origins
    if written and source.on_long_row == "divide" and (source.prompt or source.messages):
        book.add(messages.divided_turns(book.span(declared, "on_long_row")))
    for role in data.ROLES:
        template = getattr(source, role)
        if template is not None:
            if role not in ("system", "label", "margin") and not any(
                True for _ in _template_places(book, template, _NOWHERE)
            ):
                book.add(messages.constant_template(book.span(declared, role), role))
            for name, span in _template_places(book, template, book.span(declared, role)):
                _known_field(book, name, span, fields, declared)


def _sampled_fields(book: Book, source: data.Sampled) -> set[str] | None:
    """The fields of what a stage samples; None where they are not known."""
    stage = book.declared(source.from_.name)
    values = [branch.value for branch in stage.branches] if stage is not None else []
    if not values or not isinstance(values[0], stages.Sample):  # reported where stages are read
        return None
    found = {"prompt", "target", "reward"}
    found |= (
        {"chosen", "rejected", "chosen_reward", "rejected_reward"}
        if (source.rows == "pairs")
        else {"completion", "tokens"}
    )
    for each in examples(values[0].data, book.program, book.fields):
        if each.fields is None:
            return None
        found |= each.fields
    return found


def _samples(book: Book, declared: Declared, source: data.DataKind) -> dict[str, Any] | None:
    """The fields of all files of a source with an example value each; None after a report."""
    fields: dict[str, Any] = {}
    span = book.span(declared, "path")
    for name in source.path:  # type: ignore[attr-defined]
        path = _file(book, span, name)
        if path is None:
            return None
        separator = getattr(source, "separator", ",")
        try:
            found = named_files.sample(path, declared.kind or "", separator)
        except named_files.BadFile as error:
            book.add(messages.bad_file(span, name, *error.args))
            return None
        except OSError as error:
            book.add(
                messages.bad_file(span, name, (error.strerror or "it cannot be read").lower(), None)
            )
            return None
        fields.update({key: found.example.get(key) for key in found.fields})
    return fields


def _known_field(
    book: Book, name: str, span: Span, fields: dict[str, Any], declared: Declared
) -> None:
    """`{a}`, `{a.b}` or `{a.0.b}` must be there, as far as the first row shows."""
    if name in fields:
        return
    head, *rest = name.split(".")
    if head not in fields:
        book.add(messages.unknown_field(span, name, list(fields), declared.title, None))
        return
    value, path = fields[head], head
    for part in rest:
        if value in (None, {}, ""):  # nothing is known of what is inside
            return
        if isinstance(value, list):
            known = [str(number) for number in range(len(value))]
            inner = value[int(part)] if part in known else None
        else:
            known = list(value) if isinstance(value, dict) else []
            inner = value.get(part) if isinstance(value, dict) else None
        if part not in known:
            inside = [f"{path}.{key}" for key in known[:20]]
            book.add(messages.unknown_field(span, name, inside or [path], declared.title, None))
            return
        value, path = inner, f"{path}.{part}"


def _procedural(book: Book, declared: Declared, source: data.Procedural) -> None:
    span = book.span(declared, "task")
    if named_files.procedural_file(source.task) is None:
        tasks = named_files.procedural_tasks()
        if tasks is None:
            book.add(messages.no_generators(span))
        else:
            book.add(messages.unknown_task(span, source.task, list(tasks)))
    elif source.settings is not None:
        known = named_files.procedural_settings(source.task)
        for name in source.settings.values if known is not None else ():
            if name not in known or name in ("size", "seed"):  # type: ignore[operator]
                at = book.argument(source.settings, name, book.span(declared, "settings"))
                free = [k for k in known or () if k not in ("size", "seed")]
                book.add(messages.unknown_setting(at, name, source.task, free))


def _expression(book: Book, declared: Declared, expression: DataExpression) -> None:
    """`where` and `map` name fields that every source has."""
    match expression:
        case data.Mixture():
            for part in expression.parts:
                _expression(book, declared, part)
        case data.Weighted():
            _expression(book, declared, expression.of)
        case data.DataMethod():
            _expression(book, declared, expression.of)
            sources = list(examples(expression.of, book.program, book.fields))
            if isinstance(expression, data.Where):
                span = book.argument(expression, "condition", book.span(declared))
                for name in _condition_fields(expression.condition):
                    _fields_of_sources(book, name, _word(span, name), sources, ("length",), None)
            if isinstance(expression, data.Map):
                for role in data.ROLES:
                    template = getattr(expression, role)
                    if template is not None:
                        span = book.argument(expression, role, book.span(declared))
                        for name, at in _template_places(book, template, span):
                            _fields_of_sources(book, name, at, sources, (), None)


def _condition_fields(condition: Node) -> Iterator[str]:
    if isinstance(condition, data.FieldValue):
        yield condition.name
    elif isinstance(condition, data.Operator):
        for operand in condition.operands:
            yield from _condition_fields(operand)


def _fields_of_sources(
    book: Book,
    name: str,
    span: Span,
    sources: list[Examples],
    extra: tuple[str, ...],
    used: tuple[Span, str] | None,
) -> None:
    """A field must be in every source that it is read from."""
    head = name.partition(".")[0]
    for source in sources:
        if source.fields is None or head in extra or head in source.fields or name in source.fields:
            continue
        declared = book.declared(source.source)
        title = declared.title if declared else source.source
        book.add(messages.unknown_field(span, name, [*source.fields, *extra], title, used))
        return


# Templates.


def _template_places(book: Book, template: Node, span: Span) -> Iterator[tuple[str, Span]]:
    """The fields of a text expression with their places in the spec."""
    if isinstance(template, data.TemplateText):
        for name, _ in template_fields(template.text)[0]:
            yield name, _word(span, f"{{{name}}}")
    else:
        for name in type(template).model_fields:
            inner = getattr(template, name)
            if isinstance(inner, Node):
                yield from _template_places(book, inner, book.argument(template, name, span))


def _word(span: Span, text: str) -> Span:
    """Where a text stands inside a span; the whole span where it was written otherwise."""
    match = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", span.text)
    if match is None:
        return span
    return Span(span.source, span.start + match.start(), span.start + match.end())


# Rewards.


def _reward(
    book: Book, user: Declared, reward: Node, sources: list[Examples], attribute: str
) -> None:
    """A reward must find the fields that it reads in the data that its user trains or measures
    on.
    """
    used = (book.span(user, attribute), f"used by `{user.name}` here")
    span = used[0]
    match reward:
        case rewards.RewardRef():
            declared = book.declared(reward.name)
            if declared is not None:
                _parts(book, declared.value, sources, book.span(declared), used)
        case _:
            _parts(book, reward, sources, span, used)


def _parts(
    book: Book, reward: Node, sources: list[Examples], span: Span, used: tuple[Span, str]
) -> None:
    match reward:
        case rewards.RewardRef():
            declared = book.declared(reward.name)
            if declared is not None:
                _parts(book, declared.value, sources, book.span(declared), used)
        case rewards.RewardOperator():
            for operand in reward.operands:
                _parts(book, operand, sources, span, used)
        case rewards.BySource():
            _by_source(book, reward, sources, span, used)
        case rewards.Verified():
            for source in sources:
                if source.kind != "procedural":
                    at = book.argument(reward, "", span)
                    book.add(messages.needs_procedural(at, source.source, used))
                    break
            _templates(book, reward, sources, span, used)
        case custom.Python():
            _python(book, reward, sources, span, used)
        case rewards.Rubric():
            pass
        case RewardExpression():
            _templates(book, reward, sources, span, used)


def _templates(
    book: Book, reward: Node, sources: list[Examples], span: Span, used: tuple[Span, str]
) -> None:
    for name in type(reward).model_fields:
        template = getattr(reward, name)
        if not isinstance(template, Node):
            continue
        at = book.argument(reward, name, span)
        for field, place in _template_places(book, template, at):
            for source in sources:
                if field in data.ROLES and field not in source.roles:
                    if source.fields is not None and field not in source.fields:
                        book.add(
                            messages.role_not_there(place, field, source.source, source.roles, used)
                        )
                        break
            else:
                if field not in data.ROLES:
                    _fields_of_sources(book, field, place, sources, ("completion",), used)


def _by_source(
    book: Book,
    reward: rewards.BySource,
    sources: list[Examples],
    span: Span,
    used: tuple[Span, str],
) -> None:
    names = [source.source for source in sources]
    place = book.argument(reward, "", span)
    for name, part in reward.sources.items():
        if name not in names:
            at = book.argument(reward, name, span)
            book.add(messages.unknown_source(at, name, names, used))
        own = [source for source in sources if source.source == name]
        _parts(book, part, own, place, used)
    unknown = [name for name in reward.sources if name not in names]
    meant = {nearest(name, names) for name in unknown}
    missing = [name for name in names if name not in reward.sources and name not in meant]
    if missing:
        book.add(messages.source_without_reward(place, missing, used))


def _python(
    book: Book,
    reward: custom.Python,
    sources: list[Examples],
    span: Span,
    used: tuple[Span, str],
) -> None:
    """The function exists, and each parameter without a default is a field that will be passed."""
    at = book.argument(reward, "reference", span)
    found = _reward_function(book, reward, at)
    if found is not None:
        _filled(book, found, reward.reference, at, ("completion", custom.PIECES), sources, used)


def _filled(
    book: Book,
    found: named_files.PythonFunction,
    reference: str,
    at: Span,
    given: Collection[str],
    sources: list[Examples],
    used: tuple[Span, str],
) -> None:
    """Each parameter without a default is given, or a field of all sources."""
    for parameter in found.parameters:
        name = parameter.name
        if not parameter.required or name in given:
            continue
        for source in sources:
            known = set(source.fields or ()) | source.roles
            if source.fields is not None and name not in known:
                known_names = list(dict.fromkeys([*given, *sorted(known)]))
                book.add(messages.unknown_parameter_field(at, reference, name, known_names, used))
                break


def _function(book: Book, span: Span, reference: str) -> named_files.PythonFunction | None:
    """The function of a file; None after a report."""
    file, _, function = reference.rpartition(":")
    path = _file(book, span, file)
    if path is None:
        return None
    try:
        functions = named_files.python_functions(path)
    except named_files.BadFile as error:
        book.add(messages.bad_file(span, file, *error.args))
        return None
    if function not in functions:
        book.add(messages.unknown_python_function(span, function, file, list(functions)))
        return None
    return functions[function]


def _called_function(book: Book, span: Span, reference: str) -> named_files.PythonFunction | None:
    """A function that returns what it makes; None after a report."""
    found = _function(book, span, reference)
    if found is not None and found.awaited:
        book.add(messages.awaited_function(span, reference))
        return None
    return found


def _reward_function(
    book: Book, reward: custom.Python, span: Span
) -> named_files.PythonFunction | None:
    found = _called_function(book, span, reward.reference)
    if found is None:
        return None
    given = {"completion", custom.PIECES}
    if not found.takes_any and not any(p.name in given for p in found.parameters):
        book.add(
            messages.no_completion_parameter(
                span, reward.reference, [p.name for p in found.parameters]
            )
        )
        return None
    return found


def _rows_function(book: Book, declared: Declared, source: data.PythonData) -> None:
    """The function exists, and the settings are its parameters."""
    span = book.span(declared, "function")
    found = _function(book, span, source.function)
    if found is None:
        return
    settings = source.settings.values if source.settings is not None else {}
    names = [parameter.name for parameter in found.parameters]
    for name in settings:
        if name not in names and not found.takes_any:
            at = book.argument(source.settings, name, book.span(declared, "settings"))
            book.add(messages.unknown_argument_of(at, name, source.function, names))
    missing = [p.name for p in found.parameters if p.required and p.name not in settings]
    if missing:
        book.add(messages.unfilled_parameter(span, source.function, missing[0], list(settings)))


def _custom(book: Book, declared: Declared, node: Node) -> None:
    """Functions that stand for a loss, an advantage, a schedule or a metric."""
    known = attributes(type(node))
    for name, info in type(node).model_fields.items():
        attribute = known.get(info.alias or name)
        if attribute is None:
            continue
        value, want = getattr(node, name), attribute.type
        want = want.item if isinstance(want, types.ListOf) else want
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(want, types.Code) and isinstance(each, custom.Python):
                _code(book, declared, each, want)
            elif isinstance(each, Function):
                _custom(book, declared, each)


def _code(book: Book, declared: Declared, value: custom.Python, want: types.Code) -> None:
    span = book.span(declared)
    at = book.argument(value, "reference", span)
    found = _called_function(book, at, value.reference)
    if found is None:
        return
    if want.fields:
        sources = list(examples(declared.value.data, book.program, book.fields))
        used = (book.span(declared, "data"), "the fields of this data are given too")
        _filled(book, found, value.reference, at, want.takes, sources, used)
        return
    for name in ("timeout", "on_error"):
        if getattr(value, name) != attributes(custom.Python)[name].default:
            book.add(messages.only_of_rewards(book.argument(value, name, span), name))
    for parameter in found.parameters:
        if parameter.required and parameter.name not in want.takes:
            given = list(want.takes)
            book.add(messages.unfilled_parameter(at, value.reference, parameter.name, given))


def _functions(book: Book, declared: Declared) -> None:
    """Python functions and rubrics of declared rewards, whether a stage uses them or not."""
    pending = [declared.value]
    while pending:
        node = pending.pop()
        if isinstance(node, custom.Python):
            _reward_function(book, node, book.argument(node, "reference", book.span(declared)))
        elif isinstance(node, rewards.RewardOperator):
            pending += node.operands
        elif isinstance(node, rewards.BySource):
            pending += node.sources.values()
        elif isinstance(node, rewards.Rubric) and node.instructions is not None:
            span = book.span(declared, "instructions")
            places = dict(_template_places(book, node.instructions, span))
            for name, at in places.items():
                if name not in RUBRIC_FIELDS:
                    book.add(messages.unknown_field(at, name, list(RUBRIC_FIELDS), "rubric", None))
            for name in ("criteria", "completion"):
                if name not in places:
                    book.add(messages.instructions_lack(span, name))
