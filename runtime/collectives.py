"""What devices exchange in a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"(pred|s8|u8|f8\w*|bf16|f16|s32|u32|f32|s64|u64|f64)\[([\d,]*)\]")
_BLOCK = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.S | re.M)
_OPERATION = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<kind>" + "|".join(_KINDS) + r")(?P<start>-start)?\("
)
_COMMENT = re.compile(r"/\*.*?\*/")
_LOOP = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:["\\]*(\d+)')
_CALL = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


def exchanged(text: str) -> dict[str, tuple[int, int]]:
    """Count the collectives that a call of a program makes, and the bytes of their results in each
    device, by kind.

    Those in a loop count as often as it is known to turn: XLA says so for CPUs and GPUs; where it
    does not, as on TPUs, once.
    """
    blocks = dict(_BLOCK.findall(text))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)
    found: dict[str, tuple[int, int]] = {}
    if entry is None:
        return found
    for kind, size, times in _walk(blocks, entry[1], 1, 0):
        count, total = found.get(kind, (0, 0))
        found[kind] = count + times, total + times * size
    return found


def _walk(
    blocks: dict[str, str], name: str, times: int, depth: int
) -> Iterator[tuple[str, int, int]]:
    """Give kind, bytes and repetitions of each collective of a computation."""
    if depth > 20:
        return
    for written in blocks.get(name, "").splitlines():
        line = _COMMENT.sub("", written)
        operation = _OPERATION.search(line)
        if operation is not None:
            # What starts an exchange, but for a sum, has operands and results for its type.
            paired = operation["start"] is not None and operation["kind"] != "all-reduce"
            yield operation["kind"], _bytes(operation["type"], paired), times
            continue
        loop = _LOOP.search(line)
        if loop is not None:
            trips = _TRIPS.search(line)
            yield from _walk(blocks, loop[1], times * (int(trips[1]) if trips else 1), depth + 1)
            continue
        for called in _CALL.findall(line):
            yield from _walk(blocks, called, times, depth + 1)


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
