"""The stage graph as SVG: a small layered layout (Sugiyama et al. 1981), and its drawing.

Boxes are in layers by the longest path from a start, so that every arrow leads down. Arrows over
several layers pass through invisible points in between. Within a layer the order follows the mean
place of neighbours (Eades and Wormald's barycentre), swept down and up a few times; then boxes move
towards their neighbours as far as the order allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from xml.sax.saxutils import escape

from tunelang.compiler.drawing.draw import Box, Picture

_CHARACTER = 7.3
"""Width of a character in pixels, monospaced at 12 px."""
_HEIGHT, _ROW, _GAP, _MARGIN, _PADDING = 46.0, 96.0, 28.0, 16.0, 14.0
_HEAD = 12.0
"""Pixels of an arrow's head."""
_SWEEPS = 4
_LONGEST = 24
"""An arrow over more layers is drawn straight, without points in between: they would cost
time and room in proportion to its length.
"""

_STYLE = """
text{font-size:12px;font-family:ui-monospace,Menlo,Consolas,monospace;fill:#1f2328}
text{text-anchor:middle}
.name{font-weight:600}.detail,.label{fill:#59636e;font-size:11px}
.box{fill:#fff;stroke:#8c959f}.model{fill:#ddf4ff;stroke:#54aeff}
.selection{fill:#fff8c5;stroke:#d4a72c}
.arrow{fill:none;stroke:#8c959f;stroke-width:1.4}.head{fill:#8c959f}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.detail,.label{fill:#9198a1}
.box{fill:#151b23;stroke:#656c76}.model{fill:#0c2d4f;stroke:#388bfd}
.selection{fill:#3b2e00;stroke:#bb8009}.arrow{stroke:#656c76}.head{fill:#656c76}}
""".strip()


@dataclass
class _Point:
    """A box, or a point that an arrow passes."""

    layer: int
    width: float
    box: Box | None = None
    x: float = 0.0
    """The middle, in pixels."""
    above: list[_Point] = field(default_factory=list)
    below: list[_Point] = field(default_factory=list)


def svg(picture: Picture) -> str:
    """Draw a picture as an SVG document that follows the reader's light or dark theme."""
    points, routes = _points(picture)
    layers: list[list[_Point]] = [[] for _ in range(1 + max((p.layer for p in points), default=-1))]
    for point in points:
        layers[point.layer].append(point)
    _order(layers)
    _place(layers)
    left = min((p.x - p.width / 2 for p in points), default=0.0) - _MARGIN
    for point in points:
        point.x -= left
    width = max((p.x + p.width / 2 for p in points), default=0.0) + _MARGIN
    height = max(len(layers) - 1, 0) * _ROW + _HEIGHT + 2 * _MARGIN
    body = [_arrow(route, label) for route, label in routes]
    body += [_box(point, point.box) for point in points if point.box is not None]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' width="{width:.0f}" height="{height:.0f}" role="img" aria-label="stage graph">\n'
        f"<style>{_STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8"'
        ' markerHeight="8" orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>\n'
        + "".join(f"{line}\n" for line in body)
        + "</svg>\n"
    )


def _points(picture: Picture) -> tuple[list[_Point], list[tuple[list[_Point], str]]]:
    """Return all points, and for each arrow the points that it passes with its label."""
    incoming: dict[str, list[str]] = defaultdict(list)
    outgoing: dict[str, list[str]] = defaultdict(list)
    for arrow in picture.arrows:
        incoming[arrow.head].append(arrow.tail)
        outgoing[arrow.tail].append(arrow.head)
    layer: dict[str, int] = {}
    for name in picture.boxes:
        layer[name] = 1 + max((layer[tail] for tail in incoming[name]), default=-1)
    for name in reversed(picture.boxes):
        if not incoming[name] and outgoing[name]:  # right above its first reader
            layer[name] = min(layer[head] for head in outgoing[name]) - 1
    boxes = {name: _Point(layer[name], _width(box), box) for name, box in picture.boxes.items()}
    points = list(boxes.values())
    routes: list[tuple[list[_Point], str]] = []
    for arrow in picture.arrows:
        route = [boxes[arrow.tail]]
        if layer[arrow.head] - layer[arrow.tail] <= _LONGEST:
            route += [
                _Point(middle, 8.0) for middle in range(layer[arrow.tail] + 1, layer[arrow.head])
            ]
        points += route[1:]
        route.append(boxes[arrow.head])
        for upper, lower in pairwise(route):
            upper.below.append(lower)
            lower.above.append(upper)
        routes.append((route, arrow.label))
    return points, routes


def _width(box: Box) -> float:
    return max(len(box.name), len(box.detail)) * _CHARACTER + 2 * _PADDING


def _order(layers: list[list[_Point]]) -> None:
    for layer in layers:
        for index, point in enumerate(layer):
            point.x = index
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            layer.sort(key=lambda p: _mean(p.above if down else p.below, p.x))
            for index, point in enumerate(layer):
                point.x = index


def _mean(points: Iterable[_Point], otherwise: float) -> float:
    places = [point.x for point in points]
    return sum(places) / len(places) if places else otherwise


def _place(layers: list[list[_Point]]) -> None:
    for layer in layers:
        _spread(layer, [0.0] * len(layer))
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            _spread(layer, [_mean(p.above if down else p.below, p.x) for p in layer])


def _spread(layer: list[_Point], wanted: list[float]) -> None:
    """Place a layer near the wanted places, in its order and without overlap. The result is the
    mean of pushing everything right as far as necessary and of pushing left: each keeps the
    distances, and so does the mean.
    """
    right, left = list(wanted), list(wanted)
    for index in range(1, len(layer)):
        right[index] = max(
            right[index], right[index - 1] + _distance(layer[index - 1], layer[index])
        )
    for index in range(len(layer) - 2, -1, -1):
        left[index] = min(left[index], left[index + 1] - _distance(layer[index], layer[index + 1]))
    for point, a, b in zip(layer, right, left, strict=True):
        point.x = (a + b) / 2


def _distance(one: _Point, other: _Point) -> float:
    return (one.width + other.width) / 2 + _GAP


def _top(point: _Point) -> float:
    return _MARGIN + point.layer * _ROW


def _box(point: _Point, box: Box) -> str:
    left, top = point.x - point.width / 2, _top(point)
    kind = "box" if box.shape == "stage" else f"box {box.shape}"
    radius = 22 if box.shape == "selection" else 6
    return (
        f'<g><rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{point.width:.1f}"'
        f' height="{_HEIGHT:.0f}" rx="{radius}"/>'
        f'<text class="name" x="{point.x:.1f}" y="{top + 19:.1f}">{escape(box.name)}</text>'
        f'<text class="detail" x="{point.x:.1f}" y="{top + 35:.1f}">{escape(box.detail)}</text></g>'
    )


def _arrow(route: list[_Point], label: str) -> str:
    start = route[0]
    x, y = start.x, _top(start) + _HEIGHT
    path = f"M{x:.1f} {y:.1f}"
    for point in route[1:]:
        # The head is on a straight line: on the curve it would lean.
        end = _top(point) + (-_HEAD if point.box is not None else _HEIGHT / 2)
        bend = (end - y) / 2
        path += f"C{x:.1f} {y + bend:.1f} {point.x:.1f} {end - bend:.1f} {point.x:.1f} {end:.1f}"
        x, y = point.x, end
    path += f"V{y + _HEAD:.1f}"
    drawn = f'<path class="arrow" marker-end="url(#head)" d="{path}"/>'
    if label:
        label_x = (start.x + route[1].x) / 2
        middle = _top(start) + _HEIGHT + (_ROW - _HEIGHT) / 2
        drawn += f'<text class="label" x="{label_x:.1f}" y="{middle:.1f}">{escape(label)}</text>'
    return drawn
