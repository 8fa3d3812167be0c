"""Fingerprints of stages: digests of everything that decides a result, by named components.

A fingerprint is the digest of the components of a stage: its attributes whose effect is `result`,
each as text of the language; the implementation of its kind with the version of its meaning; and
the run's seed if it has none. A name enters as a digest of its target, so that names do not matter:
a declaration by its components, a file by its content, an expression by its parts, a stage by its
fingerprint, a selection by the fingerprints of all its branches and the rule.

`keep` does not enter the stage that has it (it changes no branch) but every reader of the stage.

Components are one flat dict. Keys without a space belong to the stage: `optimizer.lr`, `data`,
`evals[0]`. The others explain the digests among them: `data math` is the digest of a declaration,
`data math: prompt` one of its components, `file data/math.jsonl` the digest of a file's content,
`stage baseline` the fingerprint of a stage that is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunelang.compiler.file_digests import Contents, digest
from tunelang.compiler.graph import Selection, StageGraph, StageNode
from tunelang.dsl.program import Declared
from tunelang.dsl.reference.resolved_text import literal
from tunelang.dsl.vocabulary import data, models, rewards, types
from tunelang.dsl.vocabulary.base import (
    Attribute,
    Condition,
    DataExpression,
    Function,
    Kind,
    Measure,
    Node,
    Reference,
    RewardExpression,
    TextExpression,
    attributes,
)
from tunelang.dsl.vocabulary.stages import Stage
from tunelang.dsl.vocabulary.tables import KINDS

_Expression = TextExpression | Condition | DataExpression | RewardExpression
_MARK = "#"
"""Precedes a digest among the components."""


@dataclass(frozen=True)
class Fingerprint:
    """The digest of a node with its components."""

    digest: str
    components: dict[str, str]
    """Path -> literal, or `#` and a digest."""
    words: dict[str, str]
    """Path of a component that is a digest -> how the spec writes it. Not part of the digest."""


def fingerprints(graph: StageGraph, contents: Contents) -> dict[str, Fingerprint]:
    """Return the fingerprint of every node. Raises `ContentError` for a file that cannot be
    read.
    """
    shared = _Fingerprints(graph, contents)
    declarations = graph.program.declarations
    position = {name: index for index, name in enumerate(declarations)}
    for node in graph.nodes.values():
        shared.readings[node.id] = {
            read.stage: shared.reading(read.nodes, read.selection) for read in node.inputs
        }
        for name in sorted((name for _, name in node.uses), key=position.__getitem__):
            shared.declared(declarations[name], node.id)  # in order: the recursion stays shallow
        writer = _Writer(shared, node.id)
        writer.stage(node)
        part = writer.part()
        shared.digests[node.id] = part.digest
        shared.fingerprints[node.id] = Fingerprint(part.digest, *_merged(part))
    return shared.fingerprints


@dataclass(frozen=True)
class _Part:
    """A declaration, file or stage that was read, as part of fingerprints."""

    digest: str
    components: dict[str, str]
    words: dict[str, str]
    parts: dict[str, _Part]
    """Title -> a part that this one refers to."""
    text: str | None = None
    """For a declaration that is an expression, how the spec writes it."""


def _merged(root: _Part) -> tuple[dict[str, str], dict[str, str]]:
    """Return all components and words of a node; those of a part once."""
    components, words = dict(root.components), dict(root.words)
    pending = list(reversed(root.parts.items()))
    while pending:
        title, part = pending.pop()
        if title in components:
            continue
        components[title] = _MARK + part.digest
        if part.text is not None:
            words[title] = part.text
        components.update({f"{title}: {path}": text for path, text in part.components.items()})
        words.update({f"{title}: {path}": text for path, text in part.words.items()})
        pending += reversed(part.parts.items())
    return components, words


@dataclass
class _Fingerprints:
    """Fingerprints computed so far."""

    graph: StageGraph
    contents: Contents
    digests: dict[str, str] = field(default_factory=dict)
    """Node -> the digest of its fingerprint."""
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    readings: dict[str, dict[str, _Part]] = field(default_factory=dict)
    """Node -> stage that it reads -> the part that is read."""
    stages_behind: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Declaration -> the stages that it leads to."""
    parts: dict[tuple[str, tuple[str, ...]], _Part] = field(default_factory=dict)
    """Declaration, and the digests read from the stages behind it -> its part."""

    def reading(self, nodes: tuple[str, ...], selection: Selection | None) -> _Part:
        """Return the part that a reader of a stage gets: one node, or the winner of a selection."""
        if selection is None:
            return _Part(self.digests[nodes[0]], {}, {}, {})
        digests = sorted(self.digests[node] for node in nodes)
        first = min(nodes, key=self.digests.__getitem__)
        rule = f"{selection.direction}({self.metric(selection.metric, first)})"
        branches = _MARK + digest(*(text.encode() for text in digests))
        components = {"branches": branches, "keep": rule}
        return _Part(_digest(components), components, {"keep": str(selection)}, {})

    def metric(self, name: str, node: str) -> str:
        """Return a metric of a node without the names of declarations: `accuracy` is the first
        metric of the eval with this digest.
        """
        declared = self.graph.program.declarations.get(name)
        if declared is not None and declared.noun == "eval":
            first = next(iter(declared.value.metrics))
            return f"{_MARK}{self.declared(declared, node).digest}.{first}"
        head, _, metric = name.rpartition(".")
        declared = self.graph.program.declarations.get(head)
        if declared is not None and declared.noun in ("eval", "data"):
            return f"{_MARK}{self.declared(declared, node).digest}.{metric}"
        return name

    def declared(self, declared: Declared, node: str) -> _Part:
        """Return the part of a declaration for a node, with the stages behind it in that node's
        branch.
        """
        readings = self.readings[node]
        behind = self.stages_behind.get(declared.name)
        if behind is not None:
            known_part = self.parts.get((declared.name, tuple(readings[s].digest for s in behind)))
            if known_part is not None:
                return known_part
        writer = _Writer(self, node)
        if isinstance(declared.value, Kind):
            writer.declared(declared)
            part = writer.part()
        else:
            expression = writer.expression(declared.value)
            part = _Part(expression, {}, {}, writer.parts, literal(declared.value))
        behind = tuple(writer.stages)
        self.stages_behind[declared.name] = behind
        self.parts[declared.name, tuple(readings[s].digest for s in behind)] = part
        return part


@dataclass
class _Writer:
    """Collects the components of one stage or declaration."""

    shared: _Fingerprints
    node: str
    components: dict[str, str] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    parts: dict[str, _Part] = field(default_factory=dict)
    stages: dict[str, None] = field(default_factory=dict)
    """The stages that were read, directly or by a part."""

    def part(self) -> _Part:
        """Return the collected components."""
        return _Part(_digest(self.components), self.components, self.words, self.parts)

    def stage(self, node: StageNode) -> None:
        """Add the components of a stage."""
        assert isinstance(node.value, Stage)
        implementation, version = node.value.semantics
        self.components |= {"kind": implementation, "semantics": str(version)}
        self.words["kind"] = node.kind
        self.fields("", node.value, KINDS["stage"][node.kind].attributes)
        if getattr(node.value, "seed", 0) is None:
            self.components["run.seed"] = str(self.shared.graph.program.run.seed)

    def declared(self, declared: Declared) -> None:
        """Add the components of `noun name : kind { ... }`."""
        kind = declared.kind or ""
        self.components["kind"] = f"{declared.noun} {kind}"
        self.words["kind"] = kind
        if isinstance(declared.value, data.Procedural):
            self.components["generator"] = _generator_version()
        self.fields("", declared.value, KINDS[declared.noun][kind].attributes)

    def fields(self, prefix: str, node: Node, known: dict[str, Attribute]) -> None:
        """Add every field that changes the result."""
        for name, info in type(node).model_fields.items():
            word = info.alias or name
            attribute = known.get(word)
            if attribute is None:
                self.put(prefix + word, getattr(node, name), None, node)
            elif attribute.effect == "result" and not _chooses_winner(attribute):
                self.put(prefix + word, getattr(node, name), attribute.type, node)

    def put(self, path: str, value: object, want: types.Type | None, owner: Node) -> None:
        """Add a value by its path."""
        match value:
            case TextExpression() | Condition() | DataExpression() | RewardExpression():
                self.components[path] = _MARK + self.expression(value)
                self.words[path] = literal(value)
            case Reference():
                self.components[path] = _MARK + self.reference(value)
                self.words[path] = literal(value)
            case Function():
                self.components[path] = value.word
                self.fields(f"{path}.", value, attributes(type(value)))
            case tuple() if value:
                item = want.item if isinstance(want, types.ListOf) else want
                for index, part in enumerate(value):
                    self.put(f"{path}[{index}]", part, item, owner)
            case dict():
                for key in sorted(value):
                    self.put(f"{path}.{key}", value[key], None, owner)
            case str() if isinstance(want, types.Path):
                self.components[path] = self.path(value, want, owner)
                if self.components[path].startswith(_MARK):
                    self.words[path] = literal(value)
            case _:
                self.components[path] = literal(value, want)

    # Digests in place of names.

    def reference(self, reference: Reference | data.DataRef | rewards.RewardRef) -> str:
        """Return the digest of the declaration or stage that a reference names."""
        declared = self.shared.graph.program.declarations[reference.name]
        step = getattr(reference, "step", None)
        if declared.noun == "stage":
            part = self.shared.readings[self.node][declared.name]
            self.stages[declared.name] = None
        else:
            part = self.shared.declared(declared, self.node)
            self.stages.update(dict.fromkeys(self.shared.stages_behind[declared.name]))
        self.parts[declared.title] = part
        return part.digest if step is None else digest(part.digest.encode(), str(step).encode())

    def path(self, text: str, want: types.Path, owner: Node) -> str:
        """Return the digest of the file or folder at a path; a hub id, or the path of an output, as
        it is.
        """
        file, _, function = text.rpartition(":") if want.what == "python" else (text, "", "")
        path = self.shared.graph.program.folder / Path(file).expanduser()
        if want.what == "output" or (want.what == "model" and not path.is_dir()):
            return literal(text, want)
        contents, file = self.shared.contents, file.removeprefix("./")
        if want.what != "model":
            title, content = f"file {file}", contents.file(path)
        elif isinstance(owner, models.TokenizerKind):
            title, content = f"tokenizer files {file}", contents.tokenizer(path)
        else:
            title, content = f"folder {file}", contents.model(path)
        self.parts[title] = _Part(content, {}, {}, {})
        return f"{_MARK}{content}" + (f":{function}" if function else "")

    def expression(self, value: Node) -> str:
        """Return the digest of an expression; that of the declaration, if it is only a name."""
        match value:
            case data.DataRef() | rewards.RewardRef() | Reference():
                return self.reference(value)
            case rewards.BySource():
                pairs = sorted(
                    (self.reference(data.DataRef.unvalidated(name=name)), self.expression(part))
                    for name, part in value.sources.items()
                )
                return _digest({"is": value.word, "sources": pairs})
            case data.Split():
                shares = [[name, repr(float(share))] for name, share in value.parts.items()]
                inner = self.expression(value.of)
                return _digest({"is": "split", "of": inner, "parts": shares, "part": value.part})
        return _digest(self.canonical(value, None, value))

    def canonical(self, value: object, want: types.Type | None, owner: Node) -> Any:
        """Return a value inside an expression as JSON, with expressions and names as digests."""
        match value:
            case Measure():
                return [self.canonical(value.value, None, owner), value.unit]
            case Node():
                known = attributes(type(value))
                out: dict[str, object] = {"is": _tag(value)}
                for name, info in type(value).model_fields.items():
                    attribute = known.get(info.alias or name)
                    if attribute is None or attribute.effect == "result":
                        inner = getattr(value, name)
                        kind = attribute.type if attribute else None
                        out[name] = (
                            _MARK + self.expression(inner)
                            if isinstance(inner, _Expression | Reference)
                            else self.canonical(inner, kind, value)
                        )
                return out
            case tuple():
                return [
                    _MARK + self.expression(item)
                    if isinstance(item, _Expression | Reference)
                    else self.canonical(item, None, owner)
                    for item in value
                ]
            case dict():
                return {key: self.canonical(value[key], None, owner) for key in sorted(value)}
            case str() if isinstance(want, types.Path):
                return self.path(value, want, owner)
            case float() if value.is_integer():
                return int(value)
        return value


def _chooses_winner(attribute: Attribute) -> bool:
    return isinstance(attribute.type, types.Of) and attribute.type.family == "winner"


def _tag(node: Node) -> str:
    return getattr(node, "word", "") or type(node).__name__


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return digest(text.encode("utf-8", "surrogatepass"))


def _generator_version() -> str:
    """Return the version of the package whose generators make procedural data."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    try:
        return f"reasoning-gym {version('reasoning-gym')}"
    except PackageNotFoundError:
        return "reasoning-gym"
