"""Fit a value to the type of an attribute, or report why it does not fit."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Label
from tunelang.dsl.messages import naming, wrong_values
from tunelang.dsl.resolve.scope import Symbol
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary import data, types
from tunelang.dsl.vocabulary.base import (
    DataExpression,
    Function,
    Measure,
    Reference,
)
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.raw_values import INVALID, RegexValue, Word, template_fields


@dataclass(frozen=True)
class Site:
    """The place of a value that is fitted to a type, and its purpose."""

    span: Span
    owner: str
    """`batch`, or `the argument `lr` of `adamw``."""
    example: str
    complain: Callable[[Diagnostic], None]
    declared: Callable[[str], Symbol | None]
    """The symbol of a qualified name, for second places."""
    folder: Path
    """The folder of the spec: what paths in the Program are relative to."""

    def wrong_type(self, value: object, want: types.Type, help: str | None = None) -> object:
        """Report that the value is of another type."""
        seconds: tuple[Label, ...] = ()
        symbol = self.symbol(value)
        if symbol is not None:
            seconds = (Label(symbol.span, f"`{symbol.name}` is declared as {symbol.noun} here"),)
        self.complain(
            wrong_values.wrong_type(self.span, self.owner, value, want, self.example, help, seconds)
        )
        return INVALID

    def symbol(self, value: object) -> Symbol | None:
        """Return the symbol that a value refers to; None for other values."""
        name = getattr(value, "name", None)
        if isinstance(value, Reference | data.DataRef) or type(value).__name__ == "RewardRef":
            return self.declared(str(name))
        return None


def fit(value: object, want: types.Type, site: Site) -> object:
    """Return the Python value of a field of type `want`; `INVALID` after a report."""
    if value is INVALID or isinstance(want, types.Anything):
        return value
    match want:
        case types.Share():
            return _share(value, want, site)
        case types.Number():
            return _number(value, want, site)
        case types.Amount():
            return _amount(value, want, site)
        case types.Memory():
            return _dimension(value, "bytes", want, site, "GiB")
        case types.Duration():
            return _dimension(value, "s", want, site, "s")
        case types.Price():
            return _dimension(value, "per device_hour", want, site, "per device_hour")
        case types.Flag():
            return value if isinstance(value, bool) else site.wrong_type(value, want)
        case types.Code():
            return _code(value, want, site)
        case types.Choice():
            return _choice(value, want, site)
        case types.Text():
            return _text(value, want, site)
        case types.Path():
            return _path(value, want, site)
        case types.Pattern():
            return _pattern(value, want, site)
        case types.Ref():
            return _reference(value, want, site)
        case types.Of():
            return _family(value, want, site)
        case types.ListOf():
            items = value if isinstance(value, tuple) else (value,)
            fitted = tuple(fit(item, want.item, site) for item in items)
            if INVALID in fitted:
                return INVALID
            if len(fitted) < want.low:
                site.complain(wrong_values.empty_list(site.span, site.owner, want))
                return INVALID
            return fitted
        case types.Either():
            return _either(value, want, site)
    return site.wrong_type(value, want)


def _number(value: object, want: types.Number, site: Site) -> object:
    if not isinstance(value, Quantity):
        return site.wrong_type(value, want)
    if value.dimension is not None:
        return site.wrong_type(value, want)
    number: int | float = value.value
    if isinstance(want, types.Whole):
        if number != int(number):
            site.complain(wrong_values.not_whole(site.span, site.owner, value))
            return INVALID
        number = int(number)
    else:
        number = float(number)
    if not want.admits(number):
        site.complain(wrong_values.out_of_range(site.span, site.owner, value, want))
        return INVALID
    return number


def _share(value: object, want: types.Share, site: Site) -> object:
    if not isinstance(value, Quantity) or value.dimension not in (None, "%"):
        return site.wrong_type(value, want)
    if not want.admits(value.value):
        site.complain(wrong_values.share_out_of_range(site.span, site.owner, value))
        return INVALID
    return float(value.value)


def _amount(value: object, want: types.Amount, site: Site) -> object:
    if not isinstance(value, Quantity):
        return site.wrong_type(value, want)
    if want.share and value.dimension == "%":
        share = _share(value, types.Share(), site)
        return share if share is INVALID else Measure.unvalidated(value=share, unit="%")
    if value.dimension is None:
        if want.measured and not (value.value == 0 and want.low == 0):
            site.complain(
                wrong_values.missing_unit(site.span, site.owner, value, want.units, want.share)
            )
            return INVALID
    elif value.dimension not in want.units:
        return site.wrong_type(value, want)
    unit = value.dimension or want.units[0]
    number = value.value
    if number != int(number) and unit != "epochs":
        site.complain(wrong_values.not_whole(site.span, site.owner, value))
        return INVALID
    if number < want.low and not (unit == "epochs" and number > 0):
        site.complain(
            wrong_values.out_of_range(site.span, site.owner, value, types.Whole(low=want.low))
        )
        return INVALID
    number = int(number) if number == int(number) else number
    return Measure.unvalidated(value=number, unit=unit) if want.measured else number


def _dimension(value: object, dimension: str, want: types.Type, site: Site, unit: str) -> object:
    if isinstance(value, Quantity) and value.dimension is None:
        site.complain(wrong_values.missing_unit(site.span, site.owner, value, (unit,), False))
        return INVALID
    if not isinstance(value, Quantity) or value.dimension != dimension:
        return site.wrong_type(value, want)
    if value.value <= 0 and not isinstance(want, types.Price):
        site.complain(
            wrong_values.out_of_range(site.span, site.owner, value, types.Number(above=0))
        )
        return INVALID
    return int(value.value) if dimension == "bytes" else float(value.value)


def _choice(value: object, want: types.Choice, site: Site) -> object:
    if value is None and "none" in want.words:  # elsewhere that the attribute is left out
        return "none"
    word = value.text if isinstance(value, Word) else value
    if isinstance(value, Word | str) and word in want.words:
        if isinstance(value, str):
            site.complain(wrong_values.quoted_choice(site.span, word))
            return INVALID
        return word
    if isinstance(value, Word | str):
        site.complain(wrong_values.unknown_choice(site.span, site.owner, str(word), want.words))
        return INVALID
    return site.wrong_type(value, want)


def _code(value: object, want: types.Code, site: Site) -> object:
    if isinstance(value, Python):
        return value
    if isinstance(value, Word | str) and want.words:
        return _choice(value, want, site)
    return site.wrong_type(value, want)


def _text(value: object, want: types.Text, site: Site) -> object:
    if not isinstance(value, str):
        return site.wrong_type(value, want)
    if want.among and value not in want.among:
        site.complain(
            wrong_values.unknown_choice(site.span, site.owner, value, want.among, quoted=True)
        )
        return INVALID
    return value


def _path(value: object, want: types.Path, site: Site) -> object:
    """Return the path relative to the spec's folder; ids on the hub are not changed."""
    if not isinstance(value, str):
        return site.wrong_type(value, want)
    if not value.strip() or "\0" in value:
        site.complain(wrong_values.empty_path(site.span, site.owner))
        return INVALID
    file, colon, function = value.rpartition(":") if want.what == "python" else (value, "", "")
    if want.what == "python" and not (file and function.isidentifier()):
        site.complain(wrong_values.bad_python_reference(site.span, value))
        return INVALID
    path = site.span.source.folder / Path(file).expanduser()
    if want.what == "model" and types.is_hub_id(file) and not path.exists():
        return value
    if site.span.source.folder != site.folder and not Path(file).is_absolute():
        file = os.path.relpath(path, site.folder)
    if want.what == "model" and types.is_hub_id(file):
        file = f"./{file}"
    return f"{file}{colon}{function}"


def _pattern(value: object, want: types.Pattern, site: Site) -> object:
    if not isinstance(value, RegexValue):
        return site.wrong_type(value, want)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what future versions of Python may read otherwise
            re.compile(value.pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        position = getattr(error, "pos", None)
        what = getattr(error, "msg", "it is too large")
        site.complain(wrong_values.bad_regex(value.node.span, position, what))
        return INVALID
    return value.pattern


def _reference(value: object, want: types.Ref, site: Site) -> object:
    if isinstance(value, Reference) and value.noun in want.nouns:
        return value
    symbol = site.symbol(value)
    if symbol is not None:
        site.complain(naming.wrong_noun(site.span, site.owner, symbol, want.nouns))
        return INVALID
    return site.wrong_type(value, want)


def _family(value: object, want: types.Of, site: Site) -> object:
    if isinstance(value, Function) and value.family == want.family:
        if isinstance(value, data.Split) and value.part is None:
            site.complain(wrong_values.split_needs_part(site.span, value))
            return INVALID
        if isinstance(value, data.Weighted):
            site.complain(wrong_values.weights(site.span, [value.weight]))
            return INVALID
        return value
    if want.family == "text":
        return _template(value, want, site)
    symbol = site.symbol(value)
    if symbol is not None and want.family in ("data", "reward"):
        site.complain(naming.wrong_noun(site.span, site.owner, symbol, (want.family,)))
        return INVALID
    if isinstance(value, DataExpression) and want.family == "reward":
        return site.wrong_type(value, want)
    return site.wrong_type(value, want)


def _template(value: object, want: types.Of, site: Site) -> object:
    if not isinstance(value, str):
        return site.wrong_type(value, want)
    fields, brace = template_fields(value)
    if brace is not None:
        site.complain(wrong_values.lone_brace(site.span, value[brace]))
        return INVALID
    for name, _ in fields:
        if not re.fullmatch(r"[^\W\d][\w-]*(?:\.[\w-]+)*", name):
            site.complain(wrong_values.bad_field_name(site.span, name))
            return INVALID
    return data.TemplateText.unvalidated(text=value)


def _either(value: object, want: types.Either, site: Site) -> object:
    for option in want.options:
        quiet: list[Diagnostic] = []
        scratch = replace(site, complain=quiet.append)
        fitted = fit(value, option, scratch)
        if fitted is not INVALID:
            return fitted
    if isinstance(value, Word):
        words = [w for o in want.options if isinstance(o, types.Choice) for w in o.words]
        site.complain(wrong_values.unknown_choice(site.span, site.owner, value.text, tuple(words)))
        return INVALID
    return site.wrong_type(value, want)
