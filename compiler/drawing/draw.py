"""Drawings of the stage graph: a tree for a terminal, Mermaid, DOT. SVG stands in `svg`.

All four show one `Picture`: a box for each model that a stage names itself, for each node, and for
each selection among the branches of a sweep.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tunelang.compiler.graph import StageGraph, StageNode
from tunelang.dsl.program import Program
from tunelang.dsl.reference.resolved_text import literal
from tunelang.dsl.references import references_in
from tunelang.dsl.rules.data_fields import source_rows
from tunelang.dsl.vocabulary import stages, utility_stages
from tunelang.dsl.vocabulary.base import Reference

_DEPTH = 12
"""Levels of the tree in a terminal; what is deeper stands below as a tree of its own."""
_ALIKE = 8
"""Branches without readers of their own that are listed one by one."""
_DATA_WIDTH = 24


@dataclass(frozen=True)
class Box:
    """One thing in the picture."""

    id: str
    name: str
    detail: str
    shape: Literal["model", "stage", "selection"]
    stage: str = ""
    """The stage that it is a branch or the selection of."""


@dataclass(frozen=True)
class Arrow:
    """From what is read to its reader."""

    tail: str
    head: str
    label: str = ""
    """The attributes, unless it is `from` alone."""


@dataclass(frozen=True)
class Picture:
    """Boxes by id in an order in which each follows what it reads, and arrows."""

    boxes: dict[str, Box]
    arrows: tuple[Arrow, ...]


def picture(graph: StageGraph) -> Picture:
    """A drawing before it has a form: boxes and arrows."""
    boxes: dict[str, Box] = {}
    arrows: list[Arrow] = []
    last = {nodes[-1]: stage for stage, nodes in graph.by_stage.items()}
    for node in graph.nodes.values():
        for name, attributes in _models(node).items():
            declared = graph.program.declarations[name]
            boxes.setdefault(
                f"model {name}", Box(f"model {name}", name, str(declared.kind), "model")
            )
            arrows.append(Arrow(f"model {name}", node.id, _label(attributes)))
        for read in node.inputs:
            tail = read.stage if read.selection is not None else read.nodes[0]
            arrows.append(Arrow(tail, node.id, _label(read.paths)))
        boxes[node.id] = Box(node.id, node.id, _detail(node, graph.program), "stage", node.stage)
        stage = last.get(node.id)
        if stage in graph.selections:
            nodes = graph.by_stage[stage]
            detail = f"{graph.selections[stage]} of {len(nodes)}"
            boxes[stage] = Box(stage, stage, detail, "selection", stage)
            arrows += [Arrow(candidate, stage) for candidate in nodes]
    return Picture(boxes, tuple(arrows))


def _models(node: StageNode) -> dict[str, tuple[str, ...]]:
    """Models that a stage names itself -> through which attributes."""
    found: dict[str, dict[str, None]] = {}
    for path, reference in references_in(node.value, ""):
        if isinstance(reference, Reference) and reference.noun == "model":
            found.setdefault(reference.name, {})[path.removeprefix(".").split(".")[0]] = None
    return {name: tuple(attributes) for name, attributes in found.items()}


def _label(attributes: tuple[str, ...]) -> str:
    return "" if attributes == ("from",) else ", ".join(attributes)


def _detail(node: StageNode, program: Program) -> str:
    """The kind and what matters most, in a few words: `sft, 2 epochs on math`."""
    match node.value:
        case stages.Training():
            data = literal(node.value.data)
            if len(data) > _DATA_WIDTH:
                sources = (found.source for found in source_rows(node.value.data, program, {}))
                data = " + ".join(dict.fromkeys(sources))
            return f"{node.kind}, {literal(node.value.length)} on {data}"
        case utility_stages.Export():
            return f"{node.kind} to {node.value.path}"
    return node.kind


# A tree for a terminal.


def tree(picture: Picture, width: int = 100) -> str:
    """The picture as a tree by what stages start from, in lines of at most `width` columns.

    What a stage reads beside that stands behind it. A chain of more than `_DEPTH` stages goes on
    below.
    """
    parents, beside = _parents(picture)
    children: dict[str | None, list[str]] = defaultdict(list)
    for box in picture.boxes:
        children[parents[box]].append(box)
    lines: list[tuple[str, str]] = []
    pending = list(children[None])
    for at, root in enumerate(pending):  # grows while it is gone through
        if at:
            lines.append(("", ""))
        lines += _subtree(root, picture, children, beside, pending)
    column = min(max((len(left) for left, _ in lines), default=0), width // 2)
    text = (f"{left:<{column}}  {detail}".rstrip() for left, detail in lines)
    return "".join(f"{line if len(line) <= width else line[: width - 1] + '…'}\n" for line in text)


def _subtree(
    root: str,
    picture: Picture,
    children: dict[str | None, list[str]],
    beside: dict[str, list[str]],
    pending: list[str],
) -> Iterator[tuple[str, str]]:
    """The lines of one tree: what stands left, and the detail. Deep ends go to `pending`."""
    stack: list[tuple[str, str, str, int]] = [(root, "", "", 0)]
    while stack:
        name, lead, below, depth = stack.pop()
        if name not in picture.boxes:
            yield lead + name, ""
            continue
        box = picture.boxes[name]
        reads = f", reads {', '.join(beside[name])}" if beside[name] else ""
        own = _folded(children[name], picture, children)
        if depth == _DEPTH and own:
            pending.append(name)
            yield f"{lead}{box.name} ↓", f"{box.detail}{reads}"
            continue
        yield lead + box.name, f"{box.detail}{reads}"
        for at, child in reversed(list(enumerate(own))):
            end = at == len(own) - 1
            inner = below + ("   " if end else "│  ")
            stack.append((child, below + ("└─ " if end else "├─ "), inner, depth + 1))


def _folded(names: list[str], picture: Picture, children: dict[str | None, list[str]]) -> list[str]:
    """Children with long rows of branches cut short; the rest is a line that counts them."""
    leaves: dict[str, list[str]] = defaultdict(list)
    for name in names:
        box = picture.boxes[name]
        if box.shape == "stage" and not children[name]:
            leaves[box.stage].append(name)
    out: list[str] = []
    for name in names:
        row = leaves[picture.boxes[name].stage]
        if name not in row or len(row) <= _ALIKE or name in row[: _ALIKE - 1]:
            out.append(name)
        elif name == row[-1]:
            out.append(f"… {len(row) - _ALIKE + 1} more branches of {picture.boxes[name].stage}")
    return out


def _parents(picture: Picture) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """The parent of each box in the tree, and what it reads beside, in words."""
    incoming: dict[str, list[Arrow]] = defaultdict(list)
    for arrow in picture.arrows:
        incoming[arrow.head].append(arrow)
    parents: dict[str, str | None] = {}
    beside: dict[str, list[str]] = defaultdict(list)
    for name, box in picture.boxes.items():
        arrows = incoming[name]
        if box.shape == "selection":
            parents[name] = _common([arrow.tail for arrow in arrows], parents)
            continue
        start = next((a for a in arrows if a.label.split(",")[0] in ("", "from")), None)
        main = start or (arrows[0] if arrows else None)
        parents[name] = main.tail if main else None
        for arrow in arrows:
            if arrow is not main:
                tail = picture.boxes[arrow.tail].name
                beside[name].append(f"{tail} ({arrow.label})")
    return parents, beside


def _common(names: list[str], parents: dict[str, str | None]) -> str | None:
    """The nearest box above all of these."""
    paths = [list(_above(name, parents)) for name in names]
    shared = set(paths[0]).intersection(*paths[1:])
    return next((name for name in paths[0] if name in shared), None)


def _above(name: str, parents: dict[str, str | None]) -> Iterator[str]:
    parent = parents[name]
    while parent is not None:
        yield parent
        parent = parents[parent]


# Mermaid and DOT.

_MERMAID_SHAPES = {"model": ("[(", ")]"), "stage": ("[", "]"), "selection": ("{{", "}}")}
_DOT_SHAPES = {"model": "cylinder", "stage": "box", "selection": "hexagon"}


def mermaid(picture: Picture) -> str:
    """The picture as a Mermaid flow chart."""
    names = {box: f"n{at}" for at, box in enumerate(picture.boxes)}
    lines = ["flowchart TD"]
    for box in picture.boxes.values():
        opening, closing = _MERMAID_SHAPES[box.shape]
        text = f"{_entities(box.name)}<br/>{_entities(box.detail)}"
        lines.append(f'  {names[box.id]}{opening}"{text}"{closing}')
    for arrow in picture.arrows:
        label = f'|"{_entities(arrow.label)}"|' if arrow.label else ""
        lines.append(f"  {names[arrow.tail]} -->{label} {names[arrow.head]}")
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Text in which nothing has a meaning to Mermaid, which reads `#60;` as `<`."""
    return re.sub(r"[^\w .,=()/:+*%…-]", lambda match: f"#{ord(match.group())};", text)


def dot(picture: Picture) -> str:
    """The picture in the language of Graphviz."""
    names = {box: f"n{at}" for at, box in enumerate(picture.boxes)}
    lines = ["digraph stages {", '  node [fontname="Helvetica", style=rounded];']
    for box in picture.boxes.values():
        label = f"{_quoted(box.name)}\\n{_quoted(box.detail)}"
        lines.append(f'  {names[box.id]} [shape={_DOT_SHAPES[box.shape]}, label="{label}"];')
    for arrow in picture.arrows:
        label = f' [label="{_quoted(arrow.label)}"]' if arrow.label else ""
        lines.append(f"  {names[arrow.tail]} -> {names[arrow.head]}{label};")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace('"', '\\"').split())
