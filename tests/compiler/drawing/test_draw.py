"""Drawings: snapshots in `drawings/`, and what the layout promises."""

from __future__ import annotations

import itertools
import re
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.compiler.workspace import PIPELINE, program
from tunelang.compiler.drawing.draw import Arrow, Box, Picture, dot, mermaid, picture, tree
from tunelang.compiler.drawing.svg import svg
from tunelang.compiler.graph import build

DRAWINGS = Path(__file__).parent / "drawings"
HEAD = """\
model g : pretrained { path = "models/tiny" }
data d : jsonl { path = "data/sums.jsonl", prompt = "{question}", response = "{answer}" }
"""
REST = "data = d, length = 1 epoch, batch = 4 sequences"
NESTED = f"""{HEAD}
stage a : sft {{ from = g, {REST}, seed = each(1, 2), keep = all }}
stage b : sft {{ from = a, {REST}, packing = each(true, false), keep = all }}
stage c : grpo {{
  from = b, data = d, length = 1 epoch, batch = 4 prompts, keep = best(reward)
  reward = exact("{{completion}}", "{{response}}"), kl = k3(0.1), reference = a
}}
stage e : sft {{ from = c, {REST}, seed = each({", ".join(map(str, range(12)))}), keep = all }}
"""
CHAIN = HEAD + "".join(
    f"stage s{n} : sft {{ from = {f's{n - 1}' if n else 'g'}, {REST} }}\n" for n in range(20)
)
SPECS = {"pipeline": PIPELINE, "nested": NESTED, "chain": CHAIN}
FORMS = {"txt": tree, "mmd": mermaid, "dot": dot, "svg": svg}


def drawn(text: str, folder: Path) -> Picture:
    return picture(build(program(text, folder)))


@pytest.mark.parametrize(("name", "form"), list(itertools.product(SPECS, FORMS)))
def test_drawings_equal_their_snapshots(name: str, form: str, folder: Path, bless: bool) -> None:
    actual = FORMS[form](drawn(SPECS[name], folder))
    path = DRAWINGS / f"{name}.{form}"
    if bless:
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual, "utf-8")
    assert actual == path.read_text("utf-8"), "run with --bless and read the difference"


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("width", [100, 50])
def test_tree_fits_its_width_and_has_every_box(name: str, width: int, folder: Path) -> None:
    found = drawn(SPECS[name], folder)
    text = tree(found, width)
    assert max(map(len, text.splitlines())) <= width
    listed = sum(int(n) for n in re.findall(r"… (\d+) more branches", text))
    again = text.count(" ↓")
    assert len([line for line in text.splitlines() if line]) == len(
        found.boxes
    ) + again - listed + (text.count("more branches"))


BOXES = re.compile(r'<rect class="[\w ]+" x="(.+?)" y="(.+?)" width="(.+?)" height="(.+?)"')


@pytest.mark.parametrize("name", list(SPECS))
def test_svg_boxes_are_disjoint_and_inside_the_drawing(name: str, folder: Path) -> None:
    found = drawn(SPECS[name], folder)
    text = svg(found)
    root = ET.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    boxes = [tuple(map(float, match)) for match in BOXES.findall(text)]
    assert len(boxes) == len(found.boxes)
    for x, y, w, h in boxes:
        assert x >= 0
        assert y >= 0
        assert x + w <= width + 1
        assert y + h <= height + 1
    for (x, y, w, _), (x2, y2, w2, _) in itertools.combinations(boxes, 2):
        assert y != y2 or x + w < x2 or x2 + w2 < x


def test_svg_arrows_lead_down(folder: Path) -> None:
    found = re.findall(r'class="arrow".*? d="M\S+ (\S+?)C.*?V(\S+?)"', svg(drawn(NESTED, folder)))
    assert found
    for begin, end in found:
        assert float(begin) < float(end)


def test_text_of_a_spec_is_never_markup() -> None:
    name = 'a<b>&"c"[#|]\\'
    boxes = {"x": Box("x", name, "d", "stage", "x"), "y": Box("y", "y", name, "stage", "y")}
    found = Picture(boxes, (Arrow("x", "y", name),))
    assert name in "".join(ET.fromstring(svg(found)).itertext())
    assert "<b>" not in mermaid(found)
    assert '\\"c\\"' in dot(found)
    assert tree(found)


def test_empty_spec_is_drawn(folder: Path) -> None:
    found = drawn("", folder)
    assert tree(found) == ""
    assert ET.fromstring(svg(found)).attrib["width"]


def test_a_thousand_stages_are_drawn_quickly(folder: Path) -> None:
    """Each reads the one before, and all read the first: long arrows must not cost their length."""
    lines = [HEAD]
    for n in range(1000):
        start, more = ("g", "") if n == 0 else (f"s{n - 1}", "")
        if n > 1:
            more = ", kl = k3(0.1), reference = s0"
        lines.append(
            f"stage s{n} : grpo {{ from = {start}, data = d, length = 1 epoch, batch = 4 prompts,"
            f' reward = exact("{{completion}}", "{{response}}"){more} }}\n'
        )
    found = drawn("".join(lines), folder)
    start = time.process_time()
    assert max(map(len, tree(found).splitlines())) <= 100
    assert svg(found)
    assert time.process_time() - start < 2
