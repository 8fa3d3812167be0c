"""What XLA for TPUs takes a step to cost, without a TPU: the cycles by its own estimate.

`python benchmarks/cycles.py 108 1023` compiles the training programs of points of
`plan_accuracy.py`, and adds up the estimates that XLA writes at each operation, as often as its
loops turn. They leave out what devices exchange, which stands beside them. `--options '{}'`
compiles without the runtime's options, or with others in their place.
"""

from __future__ import annotations

import argparse
import json
import re

from plan_accuracy import architecture, devices, numbered, planned

from tunelang.runtime import sharding
from tunelang.runtime.collectives import exchanged, operations
from tunelang.runtime.prepare import Shapes
from tunelang.runtime.stage_programs import programs
from tunelang.runtime.topologies import compilable

_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,14})"')


def main() -> None:
    """Compile points and print a line for each."""
    parser = argparse.ArgumentParser(description="XLA's estimate of a step on TPUs.")
    parser.add_argument("points", type=int, nargs="+", help="numbers of points")
    parser.add_argument("--options", type=json.loads, help="of the compiler, as JSON")
    given = parser.parse_args()
    if given.options is not None:
        sharding.OPTIONS = {"tpu": given.options}
    every = numbered()
    for at in given.points:
        point = every[at]
        stage, layout = planned(point)
        mesh = sharding.make_layout(**point.mesh, devices=compilable(devices(point)))
        shapes = Shapes(architecture(point), "bf16")
        program = next(iter(programs(stage, shapes, layout, mesh)))
        compiled = program.lower().compile()
        text = compiled.as_text() or ""
        cycles = sum(
            times * int(found[1])
            for line, times, _ in operations(text)
            if (found := _CYCLES.search(line)) is not None
        )
        gib = compiled.memory_analysis().peak_memory_in_bytes / 2**30
        moved = ", ".join(
            f"{count} {kind} {size / 2**30:.1f} GiB"
            for kind, (count, size) in exchanged(text).items()
        )
        name = f"{point.model} {point.form} {point.chip} {point.remat}"
        print(f"{at} {name}: {cycles:.3g} cycles, {gib:.2f} GiB; {moved}", flush=True)


if __name__ == "__main__":
    main()
