"""Reads the collectives of a compiled program from its text."""

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
    """A collective operation in the text of a program."""

    kind: str
    shape: tuple[int, ...]
    """Shape of its largest array."""
    size: int
    """Bytes of its results in each device."""
    times: int
    """Executions per call of the program; loops of unknown trip count count once."""
    loops: int
    """Loops that it is nested in."""


def count_collectives(text: str) -> dict[str, tuple[int, int]]:
    """Count the collectives of a call of a program by kind: executions, and bytes of their results
    in each device.
    """
    totals: dict[str, tuple[int, int]] = {}
    for collective in collectives(text):
        count, size = totals.get(collective.kind, (0, 0))
        count += collective.times
        totals[collective.kind] = count, size + collective.times * collective.size
    return totals


def collectives(text: str) -> Iterator[Collective]:
    """Yield the collectives in the text of a compiled program."""
    for line, times, loops in operations(text):
        operation = _OPERATION.search(line)
        if operation is not None:
            # What starts an exchange, but for a sum, has operands and results for its type.
            paired = operation["start"] is not None and operation["kind"] != "all-reduce"
            size = _bytes(operation["type"], paired)
            yield Collective(operation["kind"], _largest(operation["type"]), size, times, loops)


def operations(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the operations of a compiled program: line, executions per call, nesting loops.

    Loops of unknown trip count count once.
    """
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    if entry is not None:
        yield from _walk(dict(_BLOCK.findall(text)), entry[1], 1, 0, 0)


def needless_gathers(text: str, architecture: Architecture, micro_batches: int) -> Iterator[str]:
    """Describe needless all-gathers of a program: the weights of all layers at once, logits, or
    the head in every iteration of the loop over chunks.
    """
    a = architecture
    findings: dict[str, None] = {}
    for gather in collectives(text):
        if gather.kind != "all-gather":
            continue
        shape, numbers = gather.shape, math.prod(gather.shape)
        if a.vocabulary in shape:
            is_table = numbers == a.vocabulary * a.width
            if is_table and gather.loops > (micro_batches > 1):
                findings["the head is gathered in each turn of a loop"] = None
            elif a.width not in shape and numbers > CHUNK * a.vocabulary:
                findings[f"logits are gathered whole: {list(shape)}"] = None
        elif a.layers > 1 and shape[:1] == (a.layers,) and len(shape) > 2:
            if numbers >= a.layers * a.width**2 // 8:
                findings[f"the weights of all layers are gathered at once: {list(shape)}"] = None
    yield from findings


def _walk(
    blocks: dict[str, str], name: str, times: int, loops: int, depth: int
) -> Iterator[tuple[str, int, int]]:
    """Yield the operations of a computation that is called `times` within `loops` loops."""
    if depth > 20:
        return
    for written in blocks.get(name, "").splitlines():
        line = _COMMENT.sub("", written)
        yield line, times, loops
        loop = _LOOP.search(line)
        if loop is not None:
            times_in_loop = times * _trip_count(line, blocks)
            yield from _walk(blocks, loop[1], times_in_loop, loops + 1, depth + 1)
            continue
        for called in _CALL.findall(line):
            yield from _walk(blocks, called, times, loops, depth + 1)


def _trip_count(loop: str, blocks: dict[str, str]) -> int:
    """Return the trip count of a loop, 1 if it is unknown.

    XLA states it for CPUs and GPUs; for TPUs it is the constant in the loop's condition.
    """
    stated = _TRIPS.search(loop)
    if stated is not None:
        return int(stated[1])
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
    """Count the bytes of the arrays of a type; if it is `paired`, operands are not counted."""
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
