"""Messages about attributes and arguments: unknown, missing, repeated, without a name or type."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit, Label
from tunelang.dsl.messages.wording import (
    SHORT_LIST,
    article,
    error,
    listed,
    nearest,
    quoted,
)
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import foreign, types
from tunelang.dsl.vocabulary.base import Attribute
from tunelang.dsl.vocabulary.tables import FUNCTIONS, KINDS


@dataclass(frozen=True)
class Owner:
    """The declaration or function that attributes or arguments belong to."""

    title: str
    """`an sft stage`, "`adamw`"."""
    noun: str
    """`stage`, `data`, ..., or `function`."""
    span: Span
    """Its place: what a missing attribute is reported at."""
    damaged: bool = False
    """Whether a syntax error removed attributes, so that none counts as missing."""
    word: str = ""
    """The kind of the declaration, if it has one."""


def unknown_attribute(
    span: Span,
    name: str,
    value: Span,
    owner: Owner,
    known: Mapping[str, Attribute],
    written: Collection[str],
) -> Diagnostic:
    """Say that a name is no attribute here: a word of another tool, misspelt, or of another
    kind.
    """
    what = "argument" if owner.noun == "function" else "attribute"
    title = f"{_short(owner)} has no {what} {quoted(name)}"
    label = f"not an {what} of {owner.title}"
    near = misspelt(name, owner, list(known))
    if near is not None:
        fix = (Edit(span, near),) if near not in written else ()
        return error(
            "unknown-attribute", title, span, label, help=f"did you mean `{near}`?", fix=fix
        )
    if owner.title == "`where`":
        condition = f"{name} == {value.text}"
        return error(
            "unknown-attribute",
            title,
            span,
            label,
            help=f"a condition compares: `{condition}`",
            fix=Edit(span.to(value), condition),
        )
    entry = _foreign(owner).get(name)
    if entry is not None:
        line = entry.line.format(
            value=value.text if len(value.text) < 60 else "...",
            batch=known["batch"].type.units[0] if "batch" in known else "sequences",  # type: ignore[attr-defined]
        )
        help = f"{entry.help}: `{line}`" if line else entry.help
        target = line.split(" =")[0]
        replaces = (
            entry.replaces_attribute
            and target in known
            and target not in written
            and _plain(value.text)
        )
        fixes = (Edit(span.to(value), line),) if replaces else ()
        return error("unknown-attribute", title, span, label, help=help, fix=fixes)
    elsewhere = _elsewhere(name, owner)
    if elsewhere is not None:
        return error("unknown-attribute", title, span, label, help=elsewhere)
    if len(known) <= SHORT_LIST:
        help = f"there is {listed(list(known))}" if known else f"{owner.title} takes none"
    else:
        help = f"`tune explain {owner.word or owner.title.strip('`')}` lists them"
    return error("unknown-attribute", title, span, label, help=help)


def misspelt(name: str, owner: Owner, known: list[str]) -> str | None:
    """Return the attribute that a name was meant for, unless it is a word of another tool."""
    near = nearest(name, known)
    same = near is not None and near.replace("_", "") == name.replace("_", "").lower()
    return near if same or name not in _foreign(owner) else None


def _foreign(owner: Owner) -> Mapping[str, foreign.Foreign]:
    if owner.noun == "function":
        return foreign.FUNCTION
    return foreign.BY_NOUN.get(owner.noun, {})


def _short(owner: Owner) -> str:
    return owner.title if owner.noun == "function" or not owner.word else f"`{owner.word}`"


def _plain(text: str) -> bool:
    """Return whether a value can be moved unchanged: a number, a name or text."""
    return "\n" not in text and "(" not in text and len(text) < 60


def _elsewhere(name: str, owner: Owner) -> str | None:
    """Say where an attribute with this name exists: in a call that this owner takes, or another
    kind.
    """
    if owner.noun == "function":
        return None
    kind_info = KINDS.get(owner.noun, {}).get(owner.word)
    for attribute in kind_info.attributes.values() if kind_info else ():
        if isinstance(attribute.type, types.Of):
            for word, function in FUNCTIONS.items():
                if function.family == attribute.type.family and name in function.model_fields:
                    call = f"{attribute.name} = {word}({name} = ...)"
                    return f"it is an argument of `{attribute.name}`: `{call}`"
    for noun in (owner.noun, *KINDS):
        for word, info in KINDS.get(noun, {}).items():
            if name in info.attributes:
                kind = (
                    f"`{word}` {noun}"
                    if noun in ("data", "hardware")
                    else f"{article(word)} {noun}"
                )
                return f"it is an attribute of {kind}"
    return None


def meant_by(unknown: Iterable[str], owner: Owner) -> set[str]:
    """Return the attributes that words of other tools stand for, which are not reported as
    missing.
    """
    table = _foreign(owner)
    meant = {table[name].line.split(" =")[0] for name in unknown if name in table}
    return meant | {"batch" for name in unknown if "batch" in name}


def missing_attribute(owner: Owner, missing: Sequence[Attribute]) -> Diagnostic:
    """Say that required attributes are missing."""
    names = listed([attribute.name for attribute in missing])
    what = "argument" if owner.noun == "function" else "attribute"
    many = "s" if len(missing) > 1 else ""
    notes = [f"`{attribute.name}`: {_sentence(attribute.doc)}" for attribute in missing]
    examples = [a.example for a in missing]
    help = (
        f"add {listed(examples)}"
        if owner.noun != "function"
        else f"for instance {listed(examples)}"
    )
    return error(
        "missing-attribute",
        f"{_short(owner)} needs the {what}{many} {names}",
        owner.span,
        "missing here",
        notes=notes,
        help=help,
    )


def _sentence(doc: str) -> str:
    first = doc.split(". ")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def repeated(span: Span, name: str, owner: str, first: Span | None = None) -> Diagnostic:
    """Say that an attribute is set twice."""
    seconds = [Label(first, "first set here")] if first else []
    return error(
        "repeated-attribute",
        f"{quoted(name)} is set twice",
        span,
        f"again in {owner}",
        seconds=seconds,
    )


def needs_name(span: Span, owner: str, free: Sequence[Attribute]) -> Diagnostic:
    """Say that a call has a positional argument too many."""
    required = [attribute.name for attribute in free if attribute.required]
    names = [attribute.name for attribute in free]
    if len(required) == 1:
        named = f"{required[0]} = {span.text}"
        return error(
            "needs-name",
            f"{owner} needs the name of this argument",
            span,
            "which one?",
            help=f"did you mean `{named}`?",
            fix=Edit(span, named),
        )
    if not names:
        return error("needs-name", f"{owner} takes no more arguments", span, "one too many")
    help = f"it takes {listed(names)}" if len(names) <= SHORT_LIST else None
    return error(
        "needs-name", f"{owner} needs the name of this argument", span, "which one?", help=help
    )


def needs_names(span: Span, function: str) -> Diagnostic:
    """Say that a function takes its arguments by name only."""
    example = {
        "settings": "settings(n_people = 2)",
        "split": "math.split(test = 5%)",
        "by_source": "by_source(math = correct, logic = verified())",
    }[function]
    return error(
        "needs-name", f"`{function}` takes named arguments", span, help=f"such as `{example}`"
    )


def param_without_type(item: nodes.Declaration) -> Diagnostic:
    """Say that a `param` has no type, as in `param lr = 1e-5`."""
    end = Span(item.name.span.source, item.name.span.end, item.name.span.end)
    return error(
        "missing-type",
        f"parameter {quoted(item.name.text)} states no type",
        item.name.span,
        help=f"write `param {item.name.text} : number = ...`",
        fix=Edit(end, " : number"),
    )


def unknown_type(span: Span, names: list[str]) -> Diagnostic:
    """Say that a type does not exist, as in `param lr : float`."""
    word = span.text
    meant = {"float": "number", "int": "integer", "bool": "flag", "str": "text", "string": "text",
             "boolean": "flag", "double": "number", "path": "text"}.get(word)  # fmt: skip
    near = meant or nearest(word, names)
    help = (
        f"did you mean `{near}`?" if near else f"the types are {listed([*names, 'choice(a, b)'])}"
    )
    return error(
        "unknown-type",
        f"{quoted(word)} is not a type",
        span,
        help=help,
        fix=Edit(span, near) if near else (),
    )
