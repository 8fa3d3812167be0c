"""`tune explain`: the documentation of any noun, kind, attribute, function, unit or code, as
Markdown.

The same text, for everything there is, is the reference.
"""

from __future__ import annotations

import re

from tunelang.dsl.diagnostics.codes import Code, codes
from tunelang.dsl.reference.resolved_text import literal
from tunelang.dsl.syntax import units
from tunelang.dsl.vocabulary import data, foreign, types
from tunelang.dsl.vocabulary.base import EFFECTS, Attribute, Function, KindInfo, attributes, doc_of
from tunelang.dsl.vocabulary.tables import FORMS, FUNCTIONS, KINDS, NOUNS, RUN

TOPICS: dict[str, str] = {
    "template": (
        "Text with `{field}` in it, filled in for each example. Dots lead into objects and lists:"
        " `{meta.level}`, `{turns.0.text}`. A brace itself is written twice: `{{`. Rewards also"
        " have `{completion}` and the roles `{prompt}`, `{response}`, `{target}`."
    ),
    "import": (
        '`import "other.tune"` brings in the names of another file, `import "other.tune" as base`'
        ' puts them behind `base.`, and `import "other.tune" as base with (lr = 1e-6)` sets its'
        " parameters. Paths are relative to the importing file; `--set base.lr=1e-6` works too."
    ),
    "if": "`a if condition else b` chooses before the run: `2 epochs if quick else 10 epochs`.",
    "each": FORMS["each"]
    + " `optimizer = adamw(lr = each(1e-6, 3e-6))`, then `keep = best(accuracy)`.",
    "step": "`baseline.step(500)` is the model that a stage had after that many steps.",
    "none": "Switches an attribute off that can do without: `clip_norm = none`.",
    "metric": (
        "What `keep` compares: the name of an eval of the stage, `eval.metric`, a metric of the"
        " stage itself (`loss`, `reward`, `kl`, ...), or `data.reward` for one source."
    ),
    "role": "What a field means to a stage: " + ", ".join(f"`{role}`" for role in data.ROLES) + ".",
    "override": (
        "`--set scale=2` sets a parameter, `--set stage.baseline.optimizer.lr=1e-5` an attribute by"
        " noun and name. The right side is an expression of the language, so text needs its own"
        " quotes: `--set 'model.gemma.path=\"google/gemma-2b\"'`."
    ),
    "type": "A parameter states its type: "
    + ", ".join(f"`{name}`" for name in types.PARAMETERS)
    + ", or `choice(a, b)`. `param lr : number = 1e-5`.",
}
"""Matches the characters that are in no word of a table."""


def topics() -> list[str]:
    """Return every name that can be explained."""
    names = [*NOUNS, "run", *TOPICS, *FUNCTIONS, *data.METHODS, *FORMS, *codes()]
    for table in KINDS.values():
        for word, info in table.items():
            names += [word, *(f"{word}.{attribute}" for attribute in info.attributes)]
    names += [f"run.{name}" for name in RUN.attributes]
    for word, function in {**FUNCTIONS, **data.METHODS}.items():
        names += [f"{word}.{name}" for name in attributes(function)]
    names += [name.partition(".")[2] for name in names if "." in name]
    return list(dict.fromkeys([*names, *units.SCALES, *units.UNITS]))


def explain(name: str) -> str | None:
    """Return the documentation of a name as Markdown; None if there is no such name.

    A name that means several things, such as `text`, is explained in each sense.
    """
    pasted = re.fullmatch(r"(?:error|warning)\[([a-z-]+)\].*", name)
    name = pasted.group(1) if pasted else name
    if name in codes():
        return code(codes()[name])
    head, _, tail = name.partition(".")
    parts: list[str] = []
    if not tail:
        if head in NOUNS:
            parts.append(noun(head))
        if head == "run":
            parts.append(kind(RUN))
        parts += [kind(table[head]) for table in KINDS.values() if head in table]
        callables = {**FUNCTIONS, **data.METHODS}
        if head in callables:
            parts.append(function(callables[head]))
        if head in TOPICS:
            parts.append(f"# `{head}`\n\n{TOPICS[head]}\n")
        parts += unit(head)
        if not parts:
            parts += _everywhere(head) + _choice(head) + _foreign(head)
    else:
        for owner, known in _owners(head):
            if tail in known:
                parts.append(f"# `{owner}.{tail}`\n\n" + attribute(known[tail], full=True))
        if head in NOUNS and tail in KINDS.get(head, {}):
            parts.append(kind(KINDS[head][tail]))
    return "\n".join(parts) if parts else None


def overview() -> str:
    """List everything that can be explained, by category."""
    out = ["# The `.tune` language", ""]
    for name, doc in NOUNS.items():
        kinds = ", ".join(f"`{word}`" for word in KINDS.get(name, {}))
        out.append(f"- `{name}`: {doc}{f' Kinds: {kinds}.' if kinds else ''}")
    out += [
        "- `run`: " + RUN.doc,
        "",
        "Functions: " + ", ".join(f"`{word}`" for word in [*FUNCTIONS, *FORMS]) + ".",
        "",
        "Methods of data: " + ", ".join(f"`{word}`" for word in data.METHODS) + ".",
        "",
        "Diagnostics: " + ", ".join(f"`{word}`" for word in codes()) + ".",
        "",
        "`tune explain grpo.clip` explains an attribute, `tune explain"
        " --all` prints the reference.",
    ]
    return "\n".join(out) + "\n"


def reference() -> str:
    """Return the documentation of everything as one Markdown document."""
    parts = ["# Reference of the `.tune` language\n"]
    for name in NOUNS:
        parts.append(f"## `{name}`\n\n{NOUNS[name]}\n")
        parts += [_deeper(kind(info)) for info in KINDS.get(name, {}).values()]
    parts.append("## `run`\n")
    parts.append(_deeper(kind(RUN)))
    parts.append("## Functions\n")
    parts += [_deeper(function(f)) for f in FUNCTIONS.values()]
    parts.append("## Methods of data\n")
    parts += [_deeper(function(f)) for f in data.METHODS.values()]
    parts.append("## Diagnostics\n")
    parts += [_deeper(code(c)) for c in codes().values()]
    return "\n".join(parts)


def _deeper(text: str) -> str:
    return "\n".join(f"##{line}" if line.startswith("# ") else line for line in text.split("\n"))


def noun(name: str) -> str:
    """Describe a noun with its kinds."""
    out = [f"# `{name}`", "", NOUNS[name], ""]
    for word, info in KINDS.get(name, {}).items():
        out.append(f"- `{word}`: {info.doc.splitlines()[0]}")
    if name in ("data", "reward"):
        out += ["", f"Also an expression: `{name} NAME = ...`."]
    if name in ("let", "param"):
        form = "`param NAME : TYPE = value`" if name == "param" else "`let NAME = expression`"
        out.append(f"Written {form}.")
    if name == "param":
        out += ["", TOPICS["type"]]
    return "\n".join(out) + "\n"


def kind(info: KindInfo) -> str:
    """Describe a kind with its attributes."""
    title = f"`{info.noun} NAME : {info.word} {{ ... }}`" if info.noun != "run" else "`run { ... }`"
    out = [f"# {title}", "", info.doc, ""]
    if info.presets:
        row = ", ".join(f"`{name} = {literal(value)}`" for name, value in info.presets)
        out += [f"Its row of the table of policy optimisation: {row}.", ""]
    required = [a for a in info.attributes.values() if a.required]
    optional = [a for a in info.attributes.values() if not a.required]
    if required:
        out += ["Required:", "", *(attribute(a) for a in required), ""]
    if optional:
        out += ["With a default:", "", *(attribute(a) for a in optional), ""]
    metrics = getattr(info.model, "metrics", {})
    if metrics:
        out += ["Metrics:", "", *(f"- `{name}`: {doc}." for name, doc in metrics.items()), ""]
    return "\n".join(out)


def function(model: type[Function]) -> str:
    """Describe a function or method with its arguments."""
    known = attributes(model)
    names = [a.name if a.positional else f"{a.name} = ..." for a in known.values()]
    variadic = getattr(model, "variadic", None)
    if variadic is not None:
        names.append("NAME = ..., ...")
    dot = "data." if issubclass(model, data.DataMethod) else ""
    call = f"{dot}{model.word}({', '.join(names)})" if not hasattr(model, "bare") else model.word
    out = [
        f"# `{call}`",
        "",
        doc_of(model),
        "",
        f"It yields {model.family}." if dot == "" else "",
        "",
    ]
    out += [attribute(a) for a in known.values()]
    return "\n".join(out).replace("\n\n\n", "\n\n").rstrip() + "\n"


def attribute(a: Attribute, full: bool = False) -> str:
    """Describe an attribute as an item of a list, or in full."""
    default = "" if a.required else f"; default `{literal(a.default, a.type)}`"
    if not full:
        return f"- `{a.name}`: {a.type.describe()}{default}. {a.doc}"
    none = " (or `none`)" if a.optional else ""
    item = a.type.item if isinstance(a.type, types.ListOf) else a.type
    own_lines = [f"- a function is {item.signature()}"] if isinstance(item, types.Code) else []
    lines = [
        a.doc, "", f"- type: {a.type.describe()}{none}",
        f"- default: `{literal(a.default, a.type)}`" if not a.required else "- required",
        f"- a change of it {EFFECTS[a.effect]}", *own_lines,
        f"- example: `{a.example}`",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def code(entry: Code) -> str:
    """Describe a kind of diagnostic with a wrong and a right example."""
    flag = "" if not entry.arguments else "".join(f" --set {a!r}" for a in entry.arguments)
    out = [f"# `{entry.name}`", "", entry.text, ""]
    if entry.wrong:
        out += [f"Wrong{', with' + flag if flag else ''}:", "", *_indented(entry.wrong), ""]
    if entry.right:
        out += ["Right:", "", *_indented(entry.right), ""]
    return "\n".join(out)


def _indented(text: str) -> list[str]:
    return [f"    {line}".rstrip() for line in text.strip("\n").split("\n")]


def unit(name: str) -> list[str]:
    """Describe a scale or unit."""
    if name in units.SCALES:
        return [f"# `{name}`\n\nA scale: `3{name}` is {3 * units.SCALES[name]:,}.\n"]
    if name in units.UNITS:
        dimension, factor = units.UNITS[name]
        base = {"bytes": "bytes", "s": "seconds", "%": "of one"}.get(dimension, dimension)
        what = units.DIMENSION_NAMES[dimension]
        return [
            f"# `{name}`\n\nA unit: `3{'' if name == '%' else ' '}{name}` is"
            f" {what}, {3 * factor:,} {base}.\n"
        ]
    return []


def _owners(word: str) -> list[tuple[str, dict[str, Attribute]]]:
    """Return the kinds, functions and methods with this name and their attributes."""
    owners: list[tuple[str, dict[str, Attribute]]] = [
        (word, table[word].attributes) for table in KINDS.values() if word in table
    ]
    owners += [(word, attributes(t[word])) for t in (FUNCTIONS, data.METHODS) if word in t]
    if word == "run":
        owners.append(("run", RUN.attributes))
    return owners


def _choice(word: str) -> list[str]:
    """Describe the attributes that a bare word may be the value of."""
    places: list[str] = []
    for owner in dict.fromkeys([*(w for t in KINDS.values() for w in t), *FUNCTIONS]):
        for _, known in _owners(owner):
            places += [f"`{owner}.{a.name}`" for a in known.values() if word in _words(a.type)]
    if not places:
        return []
    return [f"# `{word}`\n\nA choice of {', '.join(dict.fromkeys(places))}.\n"]


def _words(want: types.Type) -> tuple[str, ...]:
    match want:
        case types.Choice():
            return want.words
        case types.Text():
            return want.among
        case types.ListOf():
            return _words(want.item)
        case types.Either():
            return tuple(word for option in want.options for word in _words(option))
    return ()


def _foreign(word: str) -> list[str]:
    """Describe a word of another tool by its equivalent here."""
    texts: list[str] = []
    for table in (*foreign.BY_NOUN.values(), foreign.FUNCTION):
        entry = table.get(word)
        if entry is not None:
            line = entry.line.format(value="...", batch="sequences")
            texts.append(entry.help + (f": `{line}`" if line else ""))
    if word in foreign.ADVICE:
        texts.append(foreign.ADVICE[word])
    if not texts:
        return []
    lines = "".join(f"- {text}\n" for text in dict.fromkeys(texts))
    return [f"# `{word}`\n\nA word of other tools. Here:\n\n{lines}"]


def _everywhere(name: str) -> list[str]:
    """Describe an attribute by its bare name in each place that has it; equal descriptions once."""
    seen: dict[str, list[str]] = {}
    owners = [
        *(word for table in KINDS.values() for word in table),
        *FUNCTIONS,
        *data.METHODS,
        "run",
    ]
    for word in dict.fromkeys(owners):
        for owner, known in _owners(word):
            if name in known:
                seen.setdefault(attribute(known[name], full=True), []).append(f"`{owner}.{name}`")
    return [f"# {', '.join(places)}\n\n{text}" for text, places in seen.items()]
