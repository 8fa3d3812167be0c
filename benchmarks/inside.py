"""Show what the compiled training programs of `plan_accuracy.py` contain, without a device.

`python benchmarks/inside.py 108 1023` compiles these points and prints the cycles of a step that
XLA for TPUs estimates: the estimate written at each operation, times the trip count of its loops.
Exchanges between devices are not in it and are printed apart. `--options '{}'` compiles
without the runtime's compiler options, or with others instead. `--kept` prints the arrays, stacked
over layers, that the forward loop hands to the backward loop, weights and gradients among them: the
plan's activations are counted from them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter

from plan_accuracy import architecture, devices, numbered, planned

from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.runtime import sharding
from tunelang.runtime.rehearsal.collectives import count_collectives, operations
from tunelang.runtime.rehearsal.topologies import compilable
from tunelang.runtime.stages.stage_kinds import kind_of

_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,14})"')
_LOOP = re.compile(r"= \((.*)\) while\(")
_ARRAY = re.compile(r"(bf16|f32|u8|s8)\[([\d,]+)\]\{([\d,]+)(?::T\(([\d,]+)\))?")
_BYTES = {"bf16": 2, "f32": 4, "u8": 1, "s8": 1}


def kept(text: str, layers: int) -> Counter[str]:
    """Return the arrays by layers of the loop that has the most of them: bytes in a device with
    what they are padded to, by dtype, shape and how many there are.
    """
    loops = [Counter[str]()]
    for line, _, depth in operations(text):
        loop = _LOOP.search(line)
        if loop is None or depth > 2:
            continue
        shapes, times = Counter[str](), Counter[str]()
        for dtype, shape, order, tiles in _ARRAY.findall(loop[1]):
            sizes = [int(size) for size in shape.split(",")]
            if sizes[0] != layers:
                continue
            minor = [int(axis) for axis in order.split(",")]
            for axis, tile in zip(minor, reversed((tiles or "1").split(",")), strict=False):
                sizes[axis] = -(-sizes[axis] // int(tile)) * int(tile)
            name = f"{dtype}[{shape}]"
            shapes[name] += math.prod(sizes) * _BYTES[dtype]
            times[name] += 1
        loops.append(Counter({f"{times[name]} × {name}": shapes[name] for name in shapes}))
    return max(loops, key=Counter.total)


def main() -> None:
    """Compile the points and print the cycles, or the kept arrays, of each."""
    parser = argparse.ArgumentParser(description="What is inside compiled programs.")
    parser.add_argument(
        "points", type=int, nargs="+", help="numbers of points, as `plan_accuracy.py` counts them"
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        help="JSON object with options for the TPU compiler, in place of the runtime's",
    )
    parser.add_argument(
        "--kept",
        action="store_true",
        help="print the arrays that the layers keep for the backward pass",
    )
    args = parser.parse_args()
    if args.options is not None:
        sharding.OPTIONS = {"tpu": args.options}
    every = numbered()
    for number in args.points:
        point = every[number]
        stage, layout = planned(point)
        mesh = sharding.make_layout(**point.mesh, devices=compilable(devices(point)))
        shapes = Shapes(architecture(point), "bf16")
        program = next(iter(kind_of(stage).abstract_programs(stage, shapes, layout, mesh)))
        compiled = program.lower().compile()
        text = compiled.as_text() or ""
        cycles = sum(
            times * int(match[1])
            for line, times, _ in operations(text)
            if (match := _CYCLES.search(line)) is not None
        )
        gib = compiled.memory_analysis().peak_memory_in_bytes / 2**30
        moved = ", ".join(
            f"{count} {kind} {size / 2**30:.1f} GiB"
            for kind, (count, size) in count_collectives(text).items()
        )
        name = f"{point.model} {point.form} {point.chip} {point.remat}"
        print(f"{number} {name}: {cycles:.3g} cycles, {gib:.2f} GiB; {moved}", flush=True)
        if args.kept:
            for array, size in kept(text, shapes.architecture.layers).most_common(12):
                print(f"  {size / 2**30:7.3f} GiB  {array}")


if __name__ == "__main__":
    main()
