"""What devices exchange in a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.compiler.models.architecture import Architecture

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"(pred|s8|u8|f8\w*|bf16|f16|s32|u32|f32|s64|u64|f64)\[([\d,]*)\]")
_BLOCK = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}$", re.S | re.M)
_OPERATION = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<kind>" + "|".join(_KINDS) + r")(?P<start>-start)?\("
)
_COMMENT = re.compile(r"/\*.*?\*/")
_LOOP = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:["\\]*(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BELOW = re.compile(r"ROOT [^\n]* compare\([^\n]*?%?([\w.\-]+)\), direction=LT")
_CALL = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    """An exchange in the text of a program."""

    kind: str
    shape: tuple[int, ...]
    """Of its largest array."""
    size: int
    """Bytes of its results in each device."""
    times: int
    """How often it is made, as far as it is known how often loops turn."""
    loops: int
    """How many loops it is in."""


def exchanged(text: str) -> dict[str, tuple[int, int]]:
    """Count the collectives that a call of a program makes, and the bytes of their results in each
    device, by kind.

    Those in a loop count as often as it is known to turn.
    """
    found: dict[str, tuple[int, int]] = {}
    for each in collectives(text):
        count, total = found.get(each.kind, (0, 0))
        found[each.kind] = count + each.times, total + each.times * each.size
    return found


def collectives(text: str) -> Iterator[Collective]:
    """Give the collectives of a compiled program, from its text."""
    for line, times, loops in operations(text):
        operation = _OPERATION.search(line)
        if operation is not None:
            # What starts an exchange, but for a sum, has operands and results for its type.
            paired = operation["start"] is not None and operation["kind"] != "all-reduce"
            size = _bytes(operation["type"], paired)
            yield Collective(operation["kind"], _largest(operation["type"]), size, times, loops)


def operations(text: str) -> Iterator[tuple[str, int, int]]:
    """Give the operations of a compiled program: as they are written, how often each is made as far
    as it is known how often loops turn, and how many loops it is in.
    """
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    if entry is not None:
        yield from _walk(dict(_BLOCK.findall(text)), entry[1], 1, 0, 0)


def wasteful(text: str, architecture: Architecture, micro_batches: int) -> Iterator[str]:
    """Say what a program gathers that it should not: the weights of all layers at once, logits, or
    the head in each turn of the loop over chunks.
    """
    a = architecture
    found: dict[str, None] = {}
    for each in collectives(text):
        numbers = math.prod(each.shape)
        if each.kind != "all-gather":
            continue
        if a.vocabulary in each.shape:
            table = numbers == a.vocabulary * a.width
            if table and each.loops > (micro_batches > 1):
                found["the head is gathered in each turn of a loop"] = None
            elif a.width not in each.shape and numbers > CHUNK * a.vocabulary:
                found[f"logits are gathered whole: {list(each.shape)}"] = None
        elif a.layers > 1 and each.shape[:1] == (a.layers,) and len(each.shape) > 2:
            if numbers >= a.layers * a.width**2 // 8:
                said = f"the weights of all layers are gathered at once: {list(each.shape)}"
                found[said] = None
    yield from found


def _walk(
    blocks: dict[str, str], name: str, times: int, loops: int, depth: int
) -> Iterator[tuple[str, int, int]]:
    """Give the operations of a computation, which is called `times` in so many loops."""
    if depth > 20:
        return
    for written in blocks.get(name, "").splitlines():
        line = _COMMENT.sub("", written)
        yield line, times, loops
        loop = _LOOP.search(line)
        if loop is not None:
            turns = times * _turns(line, blocks)
            yield from _walk(blocks, loop[1], turns, loops + 1, depth + 1)
            continue
        for called in _CALL.findall(line):
            yield from _walk(blocks, called, times, loops, depth + 1)


def _turns(loop: str, blocks: dict[str, str]) -> int:
    """Return how often a loop turns, 1 where that is not known. XLA says so for CPUs and GPUs; for
    TPUs it is what the loop's condition compares with.
    """
    said = _TRIPS.search(loop)
    if said is not None:
        return int(said[1])
    condition = _CONDITION.search(loop)
    compared = "" if condition is None else blocks.get(condition[1], "")
    below = _BELOW.search(compared)
    if below is None:
        return 1
    name = re.escape(below[1])
    constant = re.search(rf"%?{name} = [su]32\[\]\S* constant\((\d+)\)", compared)
    return 1 if constant is None else int(constant[1])


def _largest(text: str) -> tuple[int, ...]:
    """Return the shape of the largest array of a type."""
    shapes = (
        tuple(int(size) for size in shape.split(",") if size) for _, shape in _ARRAY.findall(text)
    )
    return max(shapes, key=math.prod, default=())


def _bytes(text: str, paired: bool) -> int:
    """Count the bytes of the arrays of a type: all of them, or where operands stand in front of
    them, the results.
    """
    if paired and text.startswith("(("):
        text = text[text.index(")") :]
    sizes = [
        math.prod(int(size) for size in shape.split(",") if size)
        * _SIZES.get("f8" if dtype.startswith("f8") else dtype, 8)
        for dtype, shape in _ARRAY.findall(text)
    ]
    if paired and not text.startswith(")"):
        return max(sizes, default=0)
    return sum(sizes)
