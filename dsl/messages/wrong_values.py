"""Messages about values: types, units, ranges, operators, templates, sweeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit, Label
from tunelang.dsl.messages.wording import KNOWN_AFTER, describe, error, listed, nearest, plural
from tunelang.dsl.syntax import nodes, units
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary import data, foreign, types
from tunelang.dsl.vocabulary.base import DataExpression, Reference


def wrong_type(
    span: Span,
    owner: str,
    value: object,
    want: types.Type,
    example: str,
    help: str | None,
    seconds: Sequence[Label],
) -> Diagnostic:
    """Say that a value has the wrong type."""
    got = describe(value)
    fix: tuple[Edit, ...] = ()
    if isinstance(value, str) and isinstance(want, types.Pattern):
        help, fix = (
            "a regular expression stands between slashes",
            (Edit(span, "/" + value.replace("/", "\\/") + "/"),),
        )
    elif isinstance(value, str) and _reads_as_number(value) and not isinstance(want, types.Flag):
        help, fix = "numbers stand without quotes", (Edit(span, value),)
    elif isinstance(value, tuple) and isinstance(want, types.Number | types.Amount | types.Choice):
        help = f"to try several in a sweep: `each({span.text.strip('[]')})`"
    elif isinstance(want, types.Amount) and isinstance(value, Quantity):
        help = f"{owner} counts {listed(want.units, 'or')}"
    elif example and help is None:
        help = f"such as `{example}`"
    notes = []
    if isinstance(value, Reference) and value.noun == "eval":
        notes.append(KNOWN_AFTER)
    text = want.describe()
    short = text.split(", such as")[0].split(": a name")[0]
    if len(short) <= 45:
        title, label = f"{owner} must be {short}", f"this is {got}"
    else:
        title, label = f"{owner} does not take {got}", ""
        notes.append(f"it takes {text}")
    return error("wrong-type", title, span, label, seconds=seconds, notes=notes, help=help, fix=fix)


def _reads_as_number(text: str) -> bool:
    try:
        units.parse(text.strip())
    except ValueError:
        return False
    return True


def missing_unit(
    span: Span, owner: str, value: Quantity, accepted: Sequence[str], share: bool
) -> Diagnostic:
    """Say that a number lacks the unit that decides its meaning."""
    number = value.written or units.show(value.value)
    is_whole = value.value == int(value.value)
    fitting = [
        u for u in accepted if (is_whole or u == "epochs") and (u != "epochs" or value.value < 1000)
    ]
    choices = [f"{number} {unit}" if unit != "s" else f"{number}s" for unit in fitting]
    if share and 0 < value.value < 1:
        choices = [units.show(float(value.value), "%")]
    elif share and value.value < 20:
        choices.append(f"{number}%")
    return error(
        "missing-unit",
        f"{owner} needs a unit",
        span,
        f"{number} of what?",
        help=f"write {listed(choices, 'or')}" if choices else None,
    )


def not_whole(span: Span, owner: str, value: Quantity) -> Diagnostic:
    """Say that a number must be whole, as in `layers = 2.5`."""
    return error("not-whole", f"{owner} is a whole number", span, f"{value} is not")


def out_of_range(span: Span, owner: str, value: Quantity, want: types.Number) -> Diagnostic:
    """Say that a number is out of its bounds."""
    return error(
        "out-of-range",
        f"{owner} is out of range",
        span,
        f"must be {want.describe()}",
        notes=[f"the value is {value}"] if str(value) != span.text else [],
    )


def share_out_of_range(span: Span, owner: str, value: Quantity) -> Diagnostic:
    """Say that a share is above 100% or lacks its `%`, as in `20` or `120%`."""
    if value.dimension is None and 1 < value.value <= 100:
        percent = f"{units.show(value.value)}%"
        return error(
            "out-of-range",
            f"{owner} is a percentage up to 100%",
            span,
            f"{value} is {units.show(float(value.value), '%')}",
            help=f"did you mean `{percent}`?",
            fix=Edit(span, percent),
        )
    return error(
        "out-of-range", f"{owner} is a percentage up to 100%", span, "must be from 0% to 100%"
    )


def empty_list(span: Span, owner: str, want: types.ListOf) -> Diagnostic:
    """Say that a list is empty, as in `path = []`."""
    return error(
        "out-of-range", f"{owner} needs at least {plural(want.low, 'item')}", span, "empty"
    )


def unknown_choice(
    span: Span, owner: str, word: str, words: Sequence[str], quoted: bool = False
) -> Diagnostic:
    """Say that a word is not one of the choices."""
    meant = foreign.NAMES.get(word)
    if meant not in words:
        meant = nearest(word, words)
    mark = '"' if quoted else ""
    help = (
        f"did you mean `{mark}{meant}{mark}`?" if meant else f"it is one of {listed(words, 'or')}"
    )
    fix = (Edit(span, f"{mark}{meant}{mark}"),) if meant else ()
    return error("unknown-choice", f"{owner} cannot be `{word}`", span, help=help, fix=fix)


def quoted_choice(span: Span, word: str) -> Diagnostic:
    """Say that a choice is in quotes, as in `decay = "cosine"`."""
    return error(
        "quoted-choice",
        f"the choice `{word}` is written without quotes",
        span,
        fix=Edit(span, word),
    )


# Operators.


def wrong_operand(span: Span, operator: str, values: Sequence[object]) -> Diagnostic:
    """Say that an operator does not take its values."""
    described = " and ".join(dict.fromkeys(describe(value) for value in values))
    help = None
    if any(isinstance(value, DataExpression) for value in values):
        help = "mix data with percentages: `80% * a + 20% * b`"
    return error("wrong-operand", f"`{operator}` does not take {described}", span, help=help)


def unit_mismatch(span: Span, operator: str, left: Quantity, right: Quantity) -> Diagnostic:
    """Say that units differ, as in `2 epochs + 3 steps`."""
    names = [units.DIMENSION_NAMES.get(v.dimension, "a number") for v in (left, right)]
    verb = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}.get(operator, "compare")
    return error("unit-mismatch", f"cannot {verb} {names[0]} and {names[1]}", span)


def division_by_zero(span: Span) -> Diagnostic:
    """Say that a number is divided by zero."""
    return error("out-of-range", "division by zero", span)


def weight_not_percent(span: Span, weight: Quantity) -> Diagnostic:
    """Say that the weight of data is no percentage, as in `0.8 * a`."""
    help = "mix data with percentages: `80% * a + 20% * b`"
    if weight.dimension is None and 0 < weight.value <= 1:
        help = f"write {units.show(float(weight.value), '%')}"
    return error(
        "bad-weights",
        "the share of data in a mixture must be a percentage",
        span,
        f"{weight} is not",
        help=help,
    )


def weights(span: Span, shares: Sequence[float]) -> Diagnostic:
    """Say that the shares of a mixture do not add up."""
    total = units.show(round(sum(shares), 12), "%")
    parts = " + ".join(units.show(share, "%") for share in shares)
    label = f"{parts} = {total}" if 1 < len(shares) <= 8 else f"{total} in all"
    apart = round(1 - sum(shares), 12)
    what = f"{units.show(abs(apart), '%')} {'missing' if apart > 0 else 'too much'}"
    return error(
        "bad-weights", "the shares of a mixture must add up to 100%", span, label, help=what
    )


def mixture_without_weights(span: Span, count: int, some: bool) -> Diagnostic:
    """Say that a mixture lacks its weights, as in `a + b`."""
    title = "each part of a mixture needs a share" if some else "a mixture needs shares"
    share = units.show(round(1 / count, 4), "%")
    example = " + ".join(f"{share} * {name}" for name in ("a", "b", "c", "d")[: min(count, 4)])
    return error(
        "bad-weights", title, span, help=f"write `{example}`" if count <= 4 else "such as `20% * a`"
    )


def split_needs_part(span: Span, split: data.Split) -> Diagnostic:
    """Say that a split is used without one of its parts, as in `math.split(test = 5%)`."""
    parts = [*split.parts, "train"]
    return error(
        "split-needs-part",
        "a split has several parts: name one",
        span,
        help=f"write {listed(['.' + part for part in parts], 'or')} after it",
    )


def split_too_large(span: Span, parts: Mapping[str, float]) -> Diagnostic:
    """Say that the parts of a split leave no rows, or that one is called `train`."""
    if "train" in parts:
        return error(
            "out-of-range",
            "`train` is the remainder of the other parts",
            span,
            help="name only the other parts",
        )
    total = units.show(round(sum(parts.values()), 12), "%")
    return error(
        "out-of-range", "a split must leave something to train on", span, f"{total} in all"
    )


# Text, templates, patterns.


def lone_brace(span: Span, brace: str) -> Diagnostic:
    """Say that a `{` has no `}`."""
    return error(
        "bad-template",
        f"`{brace}` is not closed in this template",
        span,
        help=f"a field is `{{name}}`; a literal brace is `{brace * 2}`",
    )


def bad_field_name(span: Span, name: str) -> Diagnostic:
    """Say that a template names no field, as in `{}`, `{a b}` or `{a[0].b}`."""
    field = f"{{{name}}}"
    offset = span.text.find(field)
    place = (
        Span(span.source, span.start + offset, span.start + offset + len(field))
        if offset >= 0
        else span
    )
    shown = f"`{field}`" if len(name) < 40 else "this"
    dotted = re.sub(r"\[[\"']?(\w+)[\"']?\]", r".\1", name)
    if dotted != name:
        help = f"parts of a field are written with dots: `{{{dotted}}}`"
    else:
        help = "a field is a name: `{question}`; a literal brace is `{{`"
    return error("bad-template", f"{shown} does not name a field", place, help=help)


def bad_regex(span: Span, at: int | None, what: str) -> Diagnostic:
    """Say that a regular expression does not compile, at the place inside the literal."""
    place = span
    if at is not None:
        raw = span.text
        offset, seen = 1, 0
        while seen < at and offset < len(raw) - 1:
            offset += 2 if raw.startswith("\\/", offset) else 1
            seen += 1
        offset = min(offset, len(raw) - 1)
        place = Span(span.source, span.start + offset, span.start + offset + 1)
    return error("bad-regex", "this regular expression does not compile", place, what)


def empty_path(span: Span, owner: str) -> Diagnostic:
    """Say that a path is empty."""
    return error("out-of-range", f"{owner} is empty", span)


def bad_python_reference(span: Span, text: str) -> Diagnostic:
    """Say that a reference names no function, as in `python("mine.py")`."""
    help = "write `file.py:function`"
    if "." in text and ":" not in text and not text.endswith(".py"):
        module, _, function = text.rpartition(".")
        help = f"write the file and the function: `{module.replace('.', '/')}.py:{function}`"
    return error("wrong-type", "this does not name a Python function", span, help=help)


def not_a_condition(span: Span) -> Diagnostic:
    """Say that an expression is no condition, as in `where(f(x))`."""
    return error(
        "wrong-type",
        "a condition compares fields of an example",
        span,
        help='such as `length < 512` or `difficulty == "hard"`',
    )


def not_a_metric(span: Span) -> Diagnostic:
    """Say that an expression is no metric, as in `best(1)`."""
    return error(
        "wrong-type",
        "a metric must be a name",
        span,
        help="such as `best(accuracy)` or `lowest(loss)`",
    )


# Sweeps.


def each_outside(span: Span) -> Diagnostic:
    """Say that `each` is outside a stage, in a `let` or in data."""
    return error(
        "each-outside-stage",
        "only a stage fans out",
        span,
        "`each` outside of a stage",
        help="move it into an attribute of a stage",
    )


def each_name(span: Span) -> Diagnostic:
    """Say that a value of `each` has a name, as in `each(lr = 1)`."""
    return error("unknown-attribute", "`each` takes values, without names", span)


def each_too_few(span: Span, count: int, listed: nodes.ListOf | None) -> Diagnostic:
    """Say that `each` has fewer than two values, as in `each(1)`."""
    if listed is not None:
        plain = f"each({listed.span.text[1:-1].strip()})"
        return error("out-of-range", "`each` takes values, not a list", span, fix=Edit(span, plain))
    label = "no value" if count == 0 else "only one value"
    return error("out-of-range", "`each` takes two values or more", span, label)


def too_many_branches(span: Span, sizes: Sequence[int], limit: int) -> Diagnostic:
    """Say that `each` calls multiply to too many branches."""
    total = 1
    for size in sizes:
        total *= size
    product = " × ".join(str(size) for size in sizes)
    return error(
        "too-many-branches",
        f"this stage fans out into {total:,} branches",
        span,
        f"{product}; the limit is {limit}",
    )
