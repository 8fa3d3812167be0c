"""Write the generated pages of this folder: the reference, the diagnostics and the commands.

Run `python docs/generate.py` after a change of the vocabulary, of a diagnostic code or of the
command line. `tests/test_docs.py` fails while a page differs from what this script would write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from tunelang.dsl.diagnostics.codes import codes
from tunelang.dsl.reference import explain
from tunelang.dsl.reference.resolved_text import literal
from tunelang.dsl.syntax import units
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import Attribute, Function, Kind, KindInfo, attributes, doc_of
from tunelang.dsl.vocabulary.tables import FORMS, FUNCTIONS, KINDS, NOUNS, RUN
from tunelang.runtime.cli import app

FOLDER = Path(__file__).parent
EFFECTS = {"result": "result", "placement": "placement", "observe": "log"}
"""Effect of a change -> its word in the tables; `docs/language.md` explains the three."""

SHARED = "Attributes of several kinds"

FAMILIES = {
    "text": "Text",
    "reward": "Rewards",
    "criterion": "Criteria of a rubric",
    "judge": "Judges",
    "optimizer": "Optimizers",
    "adapter": "Adapters",
    "sampling": "Sampling",
    "clip": "Clipping of a policy",
    "kl": "KL terms of a policy",
    "correction": "Corrections for the sampler's probabilities",
    "critic": "Critics",
    "merging": "Merge methods",
    "divergence": "Divergences of distillation",
    "attention": "Attention maps of distillation",
    "features": "Hidden states of distillation",
    "mesh": "Meshes",
    "winner": "Winners of a sweep",
    "tracker": "Trackers",
    "experts": "Experts",
    "settings": "Settings of a task",
}
"""Family of functions -> its heading, in the order of the page."""


def main() -> None:
    """Write every generated page and remove generated pages that no longer exist."""
    wanted = pages()
    for path in (FOLDER / "reference").glob("*.md"):
        if f"reference/{path.name}" not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")


def pages() -> dict[str, str]:
    """Every generated page by its path below `docs/`."""
    found = {f"reference/{noun}.md": _noun_page(noun) for noun in KINDS}
    found["reference/run.md"] = _run_page()
    found["reference/functions.md"] = _functions_page()
    found["reference/data_methods.md"] = _methods_page()
    found["reference/units.md"] = _units_page()
    found["reference/topics.md"] = _topics_page()
    found["reference/README.md"] = _index_page()
    found["diagnostics.md"] = _diagnostics_page()
    found["commands.md"] = _commands_page()
    return {name: text.rstrip() + "\n" for name, text in found.items()}


def _page(title: str, source: str, *parts: str) -> str:
    """Assemble a page: its title, the line that says what made it, its parts."""
    made = f"*Generated from {source} by `python docs/generate.py`; do not edit.*"
    return "\n\n".join([f"# {title}", made, *(part.strip("\n") for part in parts if part)])


# The reference


def _index_page() -> str:
    rows = [
        f"| [`{noun}`]({noun}.md) | {doc} | {_words(KINDS[noun])} |"
        for noun, doc in NOUNS.items()
        if noun in KINDS
    ]
    rows.append(f"| [`run`](run.md) | {doc_of(RUN.model)} | |")
    return _page(
        "Reference of the `.tune` language",
        "the vocabulary (`dsl/vocabulary/`)",
        "[The language](../language.md) says how a spec reads; these pages say every word that it"
        " may contain. `tune explain NAME` prints the same for one word.",
        "| noun | a value of it is | kinds |\n|---|---|---|\n" + "\n".join(rows),
        "`param` and `let` name values of any type: see [types](topics.md#type).",
        "- [Functions](functions.md): " + _words(FUNCTIONS) + "\n"
        "- [Methods of data](data_methods.md): " + _words(data.METHODS) + "\n"
        "- [Units and scales](units.md)\n"
        "- [Topics](topics.md): " + _words(explain.TOPICS) + "\n"
        "- [Diagnostics](../diagnostics.md): every code, with a wrong and a right example",
        "In the tables, *a change affects* says what follows when an attribute changes: `result`:"
        " the stage runs again; `placement`: it runs elsewhere or otherwise, with the same result,"
        " and a finished stage stays valid; `log`: only what is shown or recorded.",
    )


def _noun_page(noun: str) -> str:
    table = KINDS[noun]
    groups: dict[type[Kind], list[KindInfo]] = {}
    for info in table.values():
        groups.setdefault(info.model, []).append(info)
    shared = _shared([group[0] for group in groups.values()])
    parts = [NOUNS[noun], "Kinds: " + ", ".join(f"[`{w}`](#{w})" for w in table) + "."]
    if noun in ("data", "reward"):
        parts.append(f"Also an expression: `{noun} NAME = ...`.")
    if shared:
        parts += [f"## {SHARED}", "Each kind lists below which of these it has.", _table(shared)]
    for group in groups.values():
        parts += _family(group, shared) if len(group) > 1 else _kind(group[0], shared)
    return _page(f"`{noun}`", "the vocabulary (`dsl/vocabulary/`)", *parts)


def _shared(kinds: list[KindInfo]) -> list[Attribute]:
    """The attributes that at least half of several kinds have, equal in everything."""
    if len(kinds) < 3:
        return []
    rows = Counter(_row(a) for info in kinds for a in info.attributes.values())
    known = {_row(a): a for info in kinds for a in info.attributes.values()}
    return [attribute for row, attribute in known.items() if 2 * rows[row] >= len(kinds)]


def _kind(info: KindInfo, shared: list[Attribute]) -> Iterator[str]:
    yield f"## {info.word}"
    yield f"`{info.noun} NAME : {info.word} {{ ... }}`"
    yield info.doc
    yield from _own_attributes(info.attributes.values(), shared)
    yield _metrics(info)


def _family(group: list[KindInfo], shared: list[Attribute]) -> Iterator[str]:
    """Describe kinds that are rows of one table of presets over the same attributes."""
    for info in group:
        yield f"## {info.word}"
        yield f"`{info.noun} NAME : {info.word} {{ ... }}`"
        yield info.doc
        presets = (info.attributes[name] for name, _ in info.presets)
        values = ", ".join(f"`{a.name} = {literal(a.default, a.type)}`" for a in presets)
        yield f"Its defaults: {values}." if values else ""
    words = ", ".join(f"`{info.word}`" for info in group)
    yield f"## Attributes of {words}"
    yield "Where a kind has a default of its own, it is listed with the kind above."
    yield from _own_attributes(attributes(group[0].model).values(), shared)
    yield _metrics(group[0])


def _own_attributes(known: Iterable[Attribute], shared: list[Attribute]) -> Iterator[str]:
    """Name the attributes that stand in the table of shared ones, and tabulate the others."""
    rows = {_row(attribute) for attribute in shared}
    known = list(known)
    common = [attribute.name for attribute in known if _row(attribute) in rows]
    anchor = SHARED.lower().replace(" ", "-")
    yield f"[{SHARED}](#{anchor}): {_words(common)}." if common else ""
    yield _table(attribute for attribute in known if _row(attribute) not in rows)


def _metrics(info: KindInfo) -> str:
    metrics: dict[str, str] = getattr(info.model, "metrics", {})
    if not metrics:
        return ""
    return "Metrics:\n\n" + "\n".join(f"- `{name}`: {doc}" for name, doc in metrics.items())


def _run_page() -> str:
    parts = ["`run { ... }`", RUN.doc, _table(RUN.attributes.values())]
    return _page("`run`", "the vocabulary (`dsl/vocabulary/`)", *parts)


def _functions_page() -> str:
    parts: list[str] = []
    families = {function.family for function in FUNCTIONS.values()}
    for family in [*FAMILIES, *sorted(families - FAMILIES.keys())]:
        members = [f for f in FUNCTIONS.values() if f.family == family]
        if members:
            parts.append(f"## {FAMILIES.get(family, family)}")
            parts += [_function(member) for member in members]
    parts.append("## Forms")
    parts += [f"### each\n\n{explain.TOPICS[word]}" for word in FORMS]
    return _page("Functions", "the vocabulary (`dsl/vocabulary/`)", *parts)


def _methods_page() -> str:
    parts = ["Methods of a data expression, such as `math.take(1000)`."]
    parts += [_function(method) for method in data.METHODS.values()]
    return _page("Methods of data", "the vocabulary (`dsl/vocabulary/`)", *parts)


def _function(model: type[Function]) -> str:
    """Describe a function under a heading of its own: its call, what it does, its arguments."""
    title, _, text = explain.function(model).partition("\n")
    text = text.split("\n- `")[0].replace(f"\nIt yields {model.family}.\n", "").strip()
    table = _table(attributes(model).values(), "argument")
    return f"### {model.word}\n\n{title.removeprefix('# ')}\n\n{text}\n\n{table}"


def _table(known: Iterable[Attribute], name: str = "attribute") -> str:
    rows = [_row(attribute) for attribute in known]
    if not rows:
        return ""
    head = f"| {name} | type | default | a change affects | meaning | example |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _row(a: Attribute) -> str:
    default = "*required*" if a.required else f"`{literal(a.default, a.type)}`"
    none = " (or `none`)" if a.optional else ""
    cells = (f"`{a.name}`", a.type.describe() + none, default, EFFECTS[a.effect], a.doc)
    cells += (f"`{a.example}`",)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _units_page() -> str:
    names = [*units.SCALES, *units.UNITS]
    lines = [part for name in names for part in explain.unit(name)]
    rows = [line.split("\n\n") for line in lines]
    table = [f"| {head.removeprefix('# ')} | {text.strip()} |" for head, text in rows]
    return _page(
        "Units and scales",
        "`dsl/syntax/units.py`",
        "A scale stands right behind its number (`4Ki`), a unit may stand apart (`16 GiB`).",
        "| word | meaning |\n|---|---|\n" + "\n".join(table),
    )


def _topics_page() -> str:
    parts = [f"## {name}\n\n{text}" for name, text in explain.TOPICS.items()]
    return _page("Topics", "`dsl/reference/explain.py`", *parts)


def _words(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# Diagnostics and commands


def _diagnostics_page() -> str:
    listed = "\n".join(f"- [`{name}`](#{name})" for name in codes())
    parts = [
        explain.code(entry).replace(f"# `{name}`", f"## {name}", 1)
        for name, entry in codes().items()
    ]
    return _page(
        "Diagnostics",
        "`dsl/diagnostics/codes.md`",
        "Every error and warning has a code. `tune explain CODE` prints its section of this page."
        " The examples take for granted a few declarations (a model `gemma`, data `math`, ...),"
        " which stand in `dsl/diagnostics/codes.py`.",
        listed,
        *parts,
    )


def _commands_page() -> str:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    rows = [f"| [`tune {name}`](#tune-{name}) | {_help(c)} |" for name, c in commands.items()]
    parts = [_command(name, command) for name, command in commands.items()]
    return _page(
        "Commands",
        "the command line (`runtime/cli.py`)",
        "| command | does |\n|---|---|\n" + "\n".join(rows),
        "Exit codes: 0 done, 1 the spec is wrong, 2 the command line is wrong, 3 a stage failed,"
        " 4 it does not fit the hardware, 130 interrupted (everything is saved).",
        *parts,
    )


def _command(name: str, command: Any) -> str:
    """Describe a command: its usage, what it does, its arguments and options."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = [f"tune {name}", *(_argument(p) for p in arguments)]
    usage += ["[OPTIONS]"] if options else []
    rows = [f"| `{_argument(p)}` | {_note(p)} | |" for p in arguments]
    for option in options:
        shown = ", ".join(option.opts)
        shown += "" if option.is_flag else f" {option.metavar or option.name.upper()}"
        default = option.default
        stated = "" if default in (None, False, [], ()) or callable(default) else f"`{default}`"
        rows.append(f"| `{shown}` | {_note(option)} | {stated} |")
    head = ["| argument or option | meaning | default |", "|---|---|---|"]
    parts = [f"## tune {name}", "    " + " ".join(usage), _help(command)]
    return "\n\n".join([*parts, "\n".join([*head, *rows])] if rows else parts)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or f"[{parameter.name.upper()}]")


def _note(parameter: Any) -> str:
    return str(parameter.help or "").replace("|", "\\|")


def _help(command: Any) -> str:
    return " ".join((command.help or "").split())


if __name__ == "__main__":
    main()
