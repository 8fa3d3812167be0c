"""Drawings of the stage graph: a tree for a terminal, Mermaid, DOT. SVG is in `svg`.

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
"""Levels of the tree in a terminal; deeper ones follow below as further trees."""
_ALIKE = 8
"""Branches without readers that are listed one by one."""
_DATA_WIDTH = 24


@dataclass(frozen=True)
class Box:
    """A model, a node or a selection in the picture."""

    id: str
    name: str
    detail: str
    shape: Literal["model", "stage", "selection"]
    stage: str = ""
    """The stage that it is a branch or the selection of."""


@dataclass(frozen=True)
class Arrow:
    """An arrow from an input to its reader."""

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
    """Return the boxes and arrows of a graph, which every form of drawing shows."""
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
    """Return the models that a stage names itself, with the attributes that name them."""
    models: dict[str, dict[str, None]] = {}
    for path, reference in references_in(node.value, ""):
        if isinstance(reference, Reference) and reference.noun == "model":
            models.setdefault(reference.name, {})[path.removeprefix(".").split(".")[0]] = None
    return {name: tuple(attributes) for name, attributes in models.items()}


def _label(attributes: tuple[str, ...]) -> str:
    return "" if attributes == ("from",) else ", ".join(attributes)


def _detail(node: StageNode, program: Program) -> str:
    """Return the kind of a stage and its most important values in a few words: `sft, 2 epochs on
    math`.
    """
    match node.value:
        case stages.Training():
            data = literal(node.value.data)
            if len(data) > _DATA_WIDTH:
                sources = (rows.source for rows in source_rows(node.value.data, program, {}))
                data = " + ".join(dict.fromkeys(sources))
            return f"{node.kind}, {literal(node.value.length)} on {data}"
        case utility_stages.Export():
            return f"{node.kind} to {node.value.path}"
    return node.kind


# A tree for a terminal.


def tree(picture: Picture, width: int = 100) -> str:
    """Draw a picture as a tree by the starts of stages, in lines of at most `width` columns.

    Its further inputs follow in words. A chain of more than `_DEPTH` stages continues below.
    """
    parents, extra_inputs = _parents(picture)
    children: dict[str | None, list[str]] = defaultdict(list)
    for box in picture.boxes:
        children[parents[box]].append(box)
    lines: list[tuple[str, str]] = []
    pending = list(children[None])
    for index, root in enumerate(pending):  # grows during the loop
        if index:
            lines.append(("", ""))
        lines += _subtree(root, picture, children, extra_inputs, pending)
    column = min(max((len(left) for left, _ in lines), default=0), width // 2)
    text = (f"{left:<{column}}  {detail}".rstrip() for left, detail in lines)
    return "".join(f"{line if len(line) <= width else line[: width - 1] + '…'}\n" for line in text)


def _subtree(
    root: str,
    picture: Picture,
    children: dict[str | None, list[str]],
    extra_inputs: dict[str, list[str]],
    pending: list[str],
) -> Iterator[tuple[str, str]]:
    """Yield the lines of one tree: its left side, and the detail. Deep ends go to `pending`."""
    stack: list[tuple[str, str, str, int]] = [(root, "", "", 0)]
    while stack:
        name, lead, below, depth = stack.pop()
        if name not in picture.boxes:
            yield lead + name, ""
            continue
        box = picture.boxes[name]
        reads = f", reads {', '.join(extra_inputs[name])}" if extra_inputs[name] else ""
        shown = _folded(children[name], picture, children)
        if depth == _DEPTH and shown:
            pending.append(name)
            yield f"{lead}{box.name} ↓", f"{box.detail}{reads}"
            continue
        yield lead + box.name, f"{box.detail}{reads}"
        for index, child in reversed(list(enumerate(shown))):
            end = index == len(shown) - 1
            inner = below + ("   " if end else "│  ")
            stack.append((child, below + ("└─ " if end else "├─ "), inner, depth + 1))


def _folded(names: list[str], picture: Picture, children: dict[str | None, list[str]]) -> list[str]:
    """Return children with long rows of branches cut short by a line that counts the others."""
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
    """Return the parent of each box in the tree, and its further inputs in words."""
    incoming: dict[str, list[Arrow]] = defaultdict(list)
    for arrow in picture.arrows:
        incoming[arrow.head].append(arrow)
    parents: dict[str, str | None] = {}
    extra_inputs: dict[str, list[str]] = defaultdict(list)
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
                extra_inputs[name].append(f"{tail} ({arrow.label})")
    return parents, extra_inputs


def _common(names: list[str], parents: dict[str, str | None]) -> str | None:
    """Return the nearest box above all of these."""
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
    """Draw a picture as a Mermaid flow chart."""
    names = {box: f"n{index}" for index, box in enumerate(picture.boxes)}
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
    """Replace characters that have a meaning to Mermaid by entities; it reads `#60;` as `<`."""
    return re.sub(r"[^\w .,=()/:+*%…-]", lambda match: f"#{ord(match.group())};", text)


def dot(picture: Picture) -> str:
    """Draw a picture in the language of Graphviz."""
    names = {box: f"n{index}" for index, box in enumerate(picture.boxes)}
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
