"""Compare the plan's memory with what XLA's compilers report, for hardware that is not here.

`python benchmarks/plan_accuracy.py --out points.jsonl` draws stages and layouts by a fixed rule,
compiles the training program of each (half a minute a point on two cores) and appends what the
compiler says. `python benchmarks/plan_accuracy.py --report points.jsonl` compares it with the plan,
`--fit points.jsonl` fits the plan to it; both read the table of `RESULTS.md` as well.
`python benchmarks/plan_accuracy.py --published` compares the plan's time with runs of others,
`--cases 20` the chosen layouts of small stages with all that the compiler accepts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tunelang.compiler.costs.factors import FACTORS
from tunelang.compiler.costs.step_costs import estimate_step
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.kernels import attention_kernel
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery, NoLayoutError
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.models.presets import PRESETS
from tunelang.compiler.search.layout_search import (
    MARGIN,
    best_layout,
    rank_layouts,
)
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.supervised_stages import Sft
from tunelang.dsl.vocabulary.training import Lora

SLICES = {
    "v5e": ((4, 4), (8, 8)),
    "v6e": ((4, 4), (8, 8)),
    "v5p": ((2, 2, 2), (4, 4, 4)),
    "tpu7x": ((2, 2, 1), (2, 2, 4)),
    "h200": ((1,), (8,), (64,)),
}
MODELS = {
    "tiny-0.3b": Architecture(
        vocabulary=32_000, layers=16, width=1024, heads=16, kv_heads=16, head_dim=64, mlp=4096,
        context=8192,
    ),
    **PRESETS,
}  # fmt: skip
PUBLISHED = (
    # model, length, chip, shape or (devices, nodes), sequences of a device, tokens/s of a chip
    ("llama-3.1-8b", 8192, "v6e", (2, 4), 3, 7_100, "MaxText, tpu-recipes"),
    ("llama-3.1-8b", 8192, "v6e", (16, 16), 3, 7_000, "MaxText, tpu-recipes"),
    ("llama-3.1-70b", 8192, "v6e", (4, 8), 2, 877, "MaxText, tpu-recipes"),
    ("llama-3.1-70b", 8192, "v6e", (16, 16), 2, 960, "MaxText, tpu-recipes"),
    ("llama-3.1-405b", 8192, "v6e", (16, 16), 1, 153, "MaxText, tpu-recipes"),
    ("llama-2-70b", 4096, "v5p", (8, 8, 8), 4, 680, "MaxText, documentation"),
    ("llama-3.1-405b", 8192, "v5p", (8, 8, 8), 1, 123, "MaxText, tpu-recipes"),
    ("llama-3.1-70b", 8192, "tpu7x", (4, 4, 4), 4, 2_520, "MaxText, tpu-recipes"),
    ("llama-3.1-405b", 8192, "tpu7x", (4, 8, 8), 1, 493, "MaxText, tpu-recipes"),
    ("llama-3.1-70b", 8192, "h200", (256, 32), 2, 1_056, "MaxText, gpu-recipes"),
    ("llama-3.1-70b", 8192, "h100", (128, 16), 1, 1_056, "MaxText, NGC"),
    ("llama-2-70b", 4096, "h100", (64, 8), 2, 1_052, "MaxText, NGC"),
    ("llama-2-7b", 4096, "h100", (8, 1), 2, 11_361, "MaxText, JAX-Toolbox"),
    ("llama-2-7b", 4096, "h100", (256, 32), 4, 11_703, "AXLearn, paper"),
    ("llama-2-70b", 4096, "h100", (512, 64), 2, 890, "AXLearn, paper"),
    ("llama-2-7b", 4096, "v5p", (4, 8, 8), 4, 6_554, "AXLearn, paper"),
    ("llama-2-70b", 4096, "v5p", (8, 8, 8), 2, 706, "AXLearn, paper"),
)
"""Published runs of others: in bfloat16, with Adam, on plain text."""
LARGER = {
    "llama-2-7b": Architecture(
        vocabulary=32_000, layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, mlp=11_008,
        context=4096, tied=False,
    ),
    "llama-2-70b": Architecture(
        vocabulary=32_000, layers=80, width=8192, heads=64, kv_heads=8, head_dim=128, mlp=28_672,
        context=4096, tied=False,
    ),
    "llama-3.1-405b": Architecture(
        vocabulary=128_256, layers=126, width=16_384, heads=128, kv_heads=8, head_dim=128,
        mlp=53_248, context=8192, tied=False,
    ),
    **PRESETS,
}  # fmt: skip
FITTED = (*range(132), *range(330, 810))
"""Of the points that are drawn those that the plan's factors may be fitted to. What lies between
was looked at when the estimate was made, and compiled with programs of before."""
HELD_OUT = range(810, 894)
"""Those that nothing is fitted to, but for what the rule has drawn before, which is left out."""
BY_HAND = 1000
"""The number of the first point that was chosen by hand, which are fitted to as well: of what the
rule draws too little of."""
FORMS = ("full", "full", "lora", "qlora")


@dataclass(frozen=True)
class Point:
    """A stage in a layout."""

    model: str
    form: str
    chip: str
    shape: tuple[int, ...]
    mesh: dict[str, int]
    rows: int
    length: int
    micro_batches: int
    remat: str


def _point(model: str, form: str, chip: str, shape: tuple[int, ...], sizes: str, rows: int,
             length: int, parts: int, remat: str) -> Point:  # fmt: skip
    data, fsdp, tensor = map(int, sizes.split())
    mesh = {"data": data, "fsdp": fsdp, "expert": 1, "context": 1, "tensor": tensor}
    return Point(model, form, chip, shape, mesh, rows * data * fsdp, length, parts, remat)


CHOSEN = tuple(
    _point(*each)
    for each in (
        # data, fsdp and tensor; sequences of a device, their length, parts
        ("llama-3.2-1b", "lora", "v5e", (8, 8), "1 64 1", 4, 8192, 1, "full"),
        ("gemma-2b", "lora", "v6e", (4, 4), "1 16 1", 4, 8192, 1, "full"),
        ("tiny-0.3b", "lora", "v5e", (4, 4), "2 8 1", 8, 4096, 1, "full"),
        ("gemma-3-1b", "lora", "v6e", (4, 4), "2 8 1", 2, 8192, 1, "full"),
        ("llama-3.1-8b", "lora", "v5p", (2, 2, 2), "1 8 1", 4, 4096, 2, "full"),
        ("llama-3.2-1b", "full", "v6e", (4, 4), "1 8 2", 2, 8192, 1, "dots"),
        ("llama-3.1-8b", "full", "v5p", (2, 2, 2), "1 4 2", 2, 4096, 1, "dots"),
        ("qwen3-0.6b", "lora", "v5e", (4, 4), "2 8 1", 4, 4096, 1, "dots"),
        ("llama-3.2-1b", "qlora", "v5e", (4, 4), "2 8 1", 4, 4096, 1, "dots"),
        ("llama-3.1-8b", "lora", "v5e", (4, 4), "1 16 1", 1, 4096, 1, "dots"),
        ("llama-3.1-8b", "qlora", "v6e", (4, 4), "1 16 1", 4, 4096, 1, "full"),
        ("gemma-3-1b", "full", "v5p", (2, 2, 2), "2 4 1", 2, 4096, 2, "full"),
        ("llama-3.2-1b", "full", "v6e", (4, 4), "2 8 1", 2, 4096, 1, "dots"),
        ("llama-3.1-8b", "lora", "h200", (8,), "1 8 1", 2, 2048, 1, "full"),
        ("llama-3.2-1b", "lora", "h200", (8,), "1 8 1", 4, 4096, 1, "full"),
        ("gemma-2b", "lora", "h200", (8,), "1 8 1", 2, 8192, 1, "full"),
        ("qwen3-0.6b", "lora", "h200", (8,), "2 4 1", 4, 4096, 1, "full"),
        ("llama-3.1-8b", "lora", "h200", (8,), "1 8 1", 1, 4096, 1, "none"),
        ("llama-3.1-8b", "lora", "h200", (8,), "2 4 1", 4, 4096, 2, "full"),
        ("llama-3.1-70b", "lora", "h200", (64,), "1 64 1", 1, 4096, 1, "full"),
        ("llama-3.1-8b", "qlora", "h200", (8,), "1 8 1", 2, 4096, 1, "full"),
        ("gemma-3-1b", "lora", "h200", (8,), "1 8 1", 2, 4096, 1, "full"),
        ("llama-3.2-1b", "qlora", "v5e", (4, 4), "2 8 1", 2, 4096, 1, "full"),
        ("gemma-2b", "qlora", "v6e", (4, 4), "1 16 1", 2, 4096, 1, "full"),
        ("llama-3.1-8b", "qlora", "v5p", (2, 2, 2), "1 8 1", 2, 8192, 1, "full"),
        ("qwen3-0.6b", "qlora", "v6e", (4, 4), "2 8 1", 4, 8192, 1, "full"),
        ("gemma-3-1b", "qlora", "v5p", (2, 2, 2), "1 8 1", 4, 4096, 1, "full"),
        ("llama-3.1-8b", "qlora", "v5e", (4, 4), "1 8 2", 2, 4096, 1, "dots"),
        ("gemma-2b", "qlora", "tpu7x", (2, 2, 1), "1 4 2", 2, 8192, 1, "full"),
        ("llama-3.1-8b", "lora", "tpu7x", (2, 2, 1), "1 8 1", 1, 4096, 1, "full"),
        ("llama-3.1-8b", "lora", "tpu7x", (2, 2, 1), "2 2 2", 2, 2048, 1, "full"),
        ("llama-3.1-8b", "qlora", "h200", (8,), "1 2 4", 4, 2048, 1, "full"),
        ("llama-3.2-1b", "qlora", "h200", (8,), "1 8 1", 4, 4096, 1, "full"),
        ("qwen3-0.6b", "qlora", "h200", (8,), "1 4 2", 4, 4096, 1, "dots"),
        ("llama-3.1-70b", "qlora", "h200", (64,), "1 64 1", 2, 2048, 1, "full"),
        ("llama-3.1-8b", "full", "h200", (8,), "1 4 2", 1, 131_072, 1, "full"),
        ("llama-3.2-1b", "full", "h200", (8,), "1 8 1", 1, 65_536, 1, "full"),
        ("llama-3.1-8b", "lora", "h200", (8,), "1 8 1", 1, 65_536, 1, "full"),
        ("llama-3.1-8b", "qlora", "h200", (8,), "1 8 1", 1, 65_536, 1, "dots"),
        ("llama-3.2-1b", "full", "h200", (1,), "1 1 1", 1, 32_768, 1, "dots"),
        ("llama-3.1-8b", "full", "v5p", (2, 2, 2), "1 8 1", 1, 65_536, 1, "full"),
        ("llama-3.1-70b", "lora", "tpu7x", (2, 2, 1), "1 8 1", 1, 2048, 1, "full"),
        ("llama-3.1-8b", "lora", "tpu7x", (2, 2, 1), "1 8 1", 1, 2048, 1, "full"),
        ("qwen3-0.6b", "qlora", "h200", (1,), "1 1 1", 8, 2048, 1, "dots"),
        ("gemma-3-1b", "qlora", "h200", (1,), "1 1 1", 8, 2048, 1, "full"),
        ("llama-3.2-1b", "lora", "h200", (1,), "1 1 1", 8, 2048, 1, "dots"),
        ("llama-3.1-8b", "qlora", "h200", (8,), "1 8 1", 8, 2048, 1, "full"),
        ("llama-3.1-8b", "qlora", "tpu7x", (2, 2, 1), "1 8 1", 1, 2048, 1, "full"),
        ("gemma-3-1b", "qlora", "v5e", (4, 4), "1 16 1", 8, 2048, 1, "dots"),
        ("llama-3.1-8b", "qlora", "h200", (8,), "1 2 4", 8, 8192, 1, "full"),
        ("gemma-2b", "qlora", "h200", (8,), "1 2 4", 4, 8192, 1, "full"),
        ("gemma-2b", "lora", "v5e", (4, 4), "2 8 1", 8, 4096, 1, "full"),
        ("gemma-3-1b", "lora", "v5e", (8, 8), "4 16 1", 4, 4096, 1, "full"),
        ("llama-3.1-70b", "lora", "v5p", (4, 4, 4), "1 64 1", 1, 4096, 1, "full"),
        ("gemma-2b", "qlora", "tpu7x", (2, 2, 1), "2 4 1", 8, 8192, 1, "full"),
        ("tiny-0.3b", "qlora", "v5e", (4, 4), "4 2 2", 1, 2048, 1, "full"),
        ("tiny-0.3b", "lora", "v5e", (4, 4), "2 8 1", 1, 2048, 1, "dots"),
        ("qwen3-0.6b", "qlora", "v5e", (4, 4), "2 8 1", 1, 2048, 1, "full"),
        ("llama-3.2-1b", "qlora", "v5e", (4, 4), "1 8 2", 1, 2048, 1, "full"),
        ("gemma-3-1b", "lora", "v5e", (4, 4), "1 16 1", 1, 2048, 1, "full"),
        ("tiny-0.3b", "full", "v6e", (4, 4), "1 16 1", 1, 2048, 1, "full"),
        ("qwen3-0.6b", "lora", "v6e", (4, 4), "2 4 2", 1, 2048, 1, "full"),
        ("llama-3.2-1b", "qlora", "v6e", (4, 4), "1 16 1", 1, 2048, 1, "dots"),
        ("tiny-0.3b", "qlora", "v5p", (2, 2, 2), "2 4 1", 1, 2048, 1, "full"),
        ("qwen3-0.6b", "qlora", "v5p", (2, 2, 2), "1 4 2", 1, 2048, 1, "full"),
        ("tiny-0.3b", "qlora", "tpu7x", (2, 2, 1), "1 4 2", 1, 2048, 1, "full"),
        ("qwen3-0.6b", "lora", "tpu7x", (2, 2, 1), "1 8 1", 1, 2048, 1, "full"),
        ("tiny-0.3b", "qlora", "v6e", (4, 4), "4 2 2", 2, 2048, 1, "none"),
        ("tiny-0.3b", "full", "v5e", (4, 4), "2 4 2", 1, 2048, 1, "full"),
    )
)


def numbered() -> dict[int, Point]:
    """Return all points by their numbers."""
    drawn = list(points(HELD_OUT.stop))
    fitted = {number: drawn[number] for number in FITTED}
    chosen = {BY_HAND + number: point for number, point in enumerate(CHOSEN)}
    known = [*drawn[: HELD_OUT.start], *CHOSEN]
    held_out = {number: drawn[number] for number in HELD_OUT if drawn[number] not in known}
    return {**fitted, **held_out, **chosen}


def architecture(point: Point) -> Architecture:
    """Return the model with its adapter."""
    a = replace(MODELS[point.model], context=point.length)
    if point.form == "full":
        return a
    return adapted(a, (Lora.unvalidated(),), "nf4" if point.form == "qlora" else "bf16")


def devices(point: Point) -> Devices:
    """Return the hardware of a point."""
    chip = CHIPS[point.chip]
    if chip.platform == "gpu":
        count = point.shape[0]
        return Devices(chip, count, False, (), max(1, count // 8))
    return Devices(chip, math.prod(point.shape) * chip.per_chip, False, point.shape)


def planned(point: Point) -> tuple[Sft, StageLayout]:
    """Return the stage, and its layout with the plan's memory and time."""
    a, hardware = architecture(point), devices(point)
    stage = Sft.unvalidated(
        batch=Measure.unvalidated(value=point.rows, unit="sequences"),
        optimizer=AdamW.unvalidated(lr=1e-4),
    )
    layout = StageLayout(
        mesh=point.mesh, rows=point.rows, length=point.length, remat=point.remat, slots=None,
        micro_batches=point.micro_batches,
        kernel=attention_kernel("auto", a, point.length, 2, hardware.chip.platform),
    )  # fmt: skip
    return stage, estimate_step(layout, query_of(stage, a, hardware))


def query_of(stage: Sft, a: Architecture, hardware: Devices) -> LayoutQuery:
    """Return the question to the layout search for a stage in bfloat16."""
    return LayoutQuery(stage=stage, architecture=a, dtype_bytes=2, devices=hardware)


def points(count: int) -> Iterator[Point]:
    """Draw points that take a good part of the memory."""
    draw = random.Random(20_261_121)
    chips = ("v5e", "h200", "v6e", "h200", "v5p", "h200", "tpu7x", "h200")
    accepted = 0
    while accepted < count:
        chip = chips[accepted % len(chips)]
        shape = draw.choice(SLICES[chip])
        used = math.prod(shape) * CHIPS[chip].per_chip
        tensor = draw.choice([n for n in (1, 1, 2, 4) if used % n == 0])
        shards = used // tensor
        data = draw.choice([n for n in (1, 1, 2, 4) if shards % n == 0])
        mesh = {
            "data": data,
            "fsdp": shards // data,
            "expert": 1,
            "context": 1,
            "tensor": tensor,
        }
        length = draw.choice((2048, 4096, 8192))
        local = draw.choice((1, 2, 4, 8))
        point = Point(
            draw.choice(list(MODELS)), draw.choice(FORMS), chip, shape, mesh, shards * local,
            length,
            draw.choice([n for n in (1, 1, 2, 4) if local % n == 0]),
            draw.choice(("none", "dots", "full", "full")),
        )  # fmt: skip
        a = architecture(point)
        if any(size % tensor for size in (a.heads, a.mlp)):
            continue
        # Roughly: what is far too large, or small, says nothing.
        activations = {"none": 16, "dots": 8, "full": 1}[point.remat] * a.layers * a.width * 2
        size = 16 * parameter_count(a) / (mesh["fsdp"] * tensor)
        size += activations * local * length / point.micro_batches / tensor
        if 0.1 < size / CHIPS[chip].memory < 0.8:
            accepted += 1
            yield point


def compiled(point: Point) -> dict[str, Any]:
    """Return the compiler's memory figures for a point's training program."""
    # Compilers are needed here only: a report reads what is known.
    from tunelang.compiler.search.plan_layouts import Shapes
    from tunelang.runtime.rehearsal.rehearse import measure
    from tunelang.runtime.rehearsal.topologies import compilable
    from tunelang.runtime.sharding import make_layout
    from tunelang.runtime.stages.stage_kinds import kind_of

    stage, layout = planned(point)
    mesh = make_layout(**point.mesh, devices=compilable(devices(point)))
    program = next(
        iter(
            kind_of(stage).abstract_programs(
                stage, Shapes(architecture(point), "bf16"), layout, mesh
            )
        )
    )
    begun = time.monotonic()
    measured = measure(program, program.lower())
    return {
        "peak": measured.peak, "refused": measured.refused, "seconds": time.monotonic() - begun,
        "exchanged": measured.exchanged, "findings": measured.findings,
    }  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A point, and what the compiler said."""

    at: int
    point: Point
    peak: int
    refused: bool

    @property
    def held_out(self) -> bool:
        """Whether nothing was fitted to it."""
        return self.at in HELD_OUT

    @property
    def ratio(self) -> float:
        """The plan's peak over the compiler's; NaN where that said none."""
        return planned(self.point)[1].total / self.peak if self.peak else math.nan


def cells(point: Point) -> str:
    """Return a point as the first cells of its row in a table."""
    mesh = " ".join(f"{axis} {size}" for axis, size in point.mesh.items() if size > 1)
    shape = "x".join(map(str, point.shape))
    return (
        f"| {point.model} | {point.form} | {point.chip} {shape} | {mesh or 'one'} |"
        f" {point.rows} × {point.length} | {point.micro_batches} | {point.remat} |"
    )


def read(path: Path) -> list[Compiled]:
    """Return the points of a file, or of the table in `RESULTS.md`."""
    entries = []
    if path.suffix == ".md":
        lines = path.read_text().splitlines()
        for number, point in numbered().items():
            line = next((line for line in lines if line.startswith(cells(point))), None)
            if line is not None:
                lines.remove(line)  # the rule may draw a point twice
                gib, *refused = line.removeprefix(cells(point)).split("|")[1].split()
                entries.append(Compiled(number, point, int(float(gib) * 2**30), bool(refused)))
        return entries
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        number, said = fields.pop("at"), fields.pop("said")
        mesh = {"context": 1, **fields["mesh"]}
        point = Point(**{**fields, "shape": tuple(fields["shape"]), "mesh": mesh})
        refused = bool(said["refused"])
        peak = said["peak"]
        entries.append(Compiled(number, point, peak, refused or peak > CHIPS[point.chip].memory))
    return entries


def fit(paths: list[Path]) -> None:
    """Print the memory model's constants that fit the points best; held-out points are left out."""
    from scipy.optimize import least_squares

    every = [entry for path in paths for entry in read(path) if entry.peak and not entry.held_out]
    for platform in ("gpu", "tpu"):
        chosen = [entry for entry in every if CHIPS[entry.point.chip].platform == platform]
        names = list(FACTORS[platform])
        start = [math.log(factor) for factor in FACTORS[platform].values()]

        def errors(
            logs: Any, chosen: list[Compiled] = chosen, names: list[str] = names,
            platform: str = platform,
        ) -> list[float]:  # fmt: skip
            FACTORS[platform] = dict(zip(names, map(math.exp, logs), strict=True))
            # A little towards where it began, where the points say nothing.
            near = [0.05 * (now - before) for now, before in zip(logs, start, strict=True)]  # noqa: B023
            return [math.log(entry.ratio) for entry in chosen] + near

        result = least_squares(errors, start, diff_step=1e-3)
        errors(result.x)
        factors = {name: round(factor, 2) for name, factor in FACTORS[platform].items()}
        print(f"{platform}: {len(chosen)} points\n{factors}\n")
    report(paths)


def report(paths: list[Path]) -> None:
    """Print each point, and the errors of the fitted and of the held-out points."""
    print(
        "| model | form | chip | mesh | rows × length | micro-batches | remat"
        " | plan GiB | XLA GiB | error | |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    every = [entry for path in paths for entry in read(path)]
    for entry in every:
        layout = planned(entry.point)[1]
        gib = f"{entry.peak / 2**30:.3f}" + (" refused" if entry.refused else "")
        print(
            f"{cells(entry.point)} {layout.total / 2**30:.2f} | {gib} | {entry.ratio - 1:+.1%} |"
            f" {'held out' if entry.held_out else 'fitted'} |"
        )
    for platform in ("gpu", "tpu"):
        for half in (False, True):
            errors = [
                abs(entry.ratio - 1) for entry in every
                if entry.peak and entry.held_out is half
                and CHIPS[entry.point.chip].platform == platform
            ]  # fmt: skip
            if errors:
                print(
                    f"\n{platform}, {'held out' if half else 'fitted'}: {len(errors)} points,"
                    f" median {statistics.median(errors):.1%}, worst {max(errors):.1%}, within a"
                    f" tenth {sum(error <= 0.1 for error in errors)}"
                )
    wrong = sum(
        entry.refused and planned(entry.point)[1].total <= MARGIN * CHIPS[entry.point.chip].memory
        for entry in every
    )
    print(f"\naccepted by the plan and refused by the compiler: {wrong}")


def cases(count: int) -> None:
    """Print for small stages whether a layout faster than the chosen one fits after all.

    Layouts that the plan calls faster and rejects for their memory are compiled, fastest first.
    """
    draw = random.Random(20_261_122)
    chips = (("h200", (1,)), ("h200", (8,)), ("v5e", (2, 2)), ("v6e", (2, 4)))
    head = "| model | form | hardware | rows × length | chosen | seconds | XLA GiB | best |"
    print(f"{head} times the best |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst, compilations = 1.0, 0
    for _ in range(count):
        chip, shape = draw.choice(chips)
        length, rows = draw.choice((1024, 2048, 4096)), math.prod(shape) * draw.choice((8, 16, 32))
        names = ("tiny-0.3b", "qwen3-0.6b", "llama-3.2-1b", "gemma-2b")
        point = Point(
            draw.choice(names), draw.choice(FORMS), chip, shape, {}, rows, length, 1, "auto"
        )
        a, hardware = architecture(point), devices(point)
        stage = Sft.unvalidated(
            batch=Measure.unvalidated(value=rows, unit="sequences"),
            optimizer=AdamW.unvalidated(lr=1e-4),
        )
        chosen = best_layout(query_of(stage, a, hardware))
        faster = [
            layout for layout in everything(stage, a, hardware) if layout.seconds < chosen.seconds
        ]
        best = chosen
        for layout in sorted([*faster, chosen], key=lambda layout: layout.seconds):
            said = compiled(replace(
                point, mesh=layout.mesh, micro_batches=layout.micro_batches, remat=layout.remat
            ))  # fmt: skip
            compilations += 1
            if not said["refused"] and said["peak"] <= hardware.chip.memory:
                best = layout
                break
        worst = max(worst, chosen.seconds / best.seconds)
        print(
            f"| {point.model} | {point.form} | {hardware} | {rows} × {length} | {brief(chosen)} |"
            f" {chosen.seconds:.3f} | {said['peak'] / 2**30:.1f} | {brief(best)} |"
            f" {chosen.seconds / best.seconds:.3f} |",
            flush=True,
        )
    print(f"\n{count} cases, {compilations} compilations: at worst {worst:.3f} × the best")


def everything(stage: Sft, a: Architecture, hardware: Devices) -> Iterator[StageLayout]:
    """Yield the layouts of a stage, also those that do not fit."""
    large = replace(hardware, chip=replace(hardware.chip, memory=2**60))
    rows = int(stage.batch.value)
    for remat in ("none", "dots", "full"):
        for each in (n for n in range(1, rows + 1) if rows % n == 0):
            with suppress(NoLayoutError):
                pinned = stage.model_copy(update={"remat": remat, "micro_batch": each})
                yield from rank_layouts(query_of(pinned, a, large))


def brief(layout: StageLayout) -> str:
    """Return a layout in a few words."""
    mesh = " ".join(f"{axis} {size}" for axis, size in layout.mesh.items() if size > 1)
    plural = "" if layout.micro_batches == 1 else "es"
    return f"{mesh or 'one'}, remat {layout.remat}, {layout.micro_batches} micro-batch{plural}"


def published() -> None:
    """Compare the plan's time with published runs, in the layout that the plan would choose."""
    print("| model | length | hardware | published | plan | error | layout | bound by | source |")
    print("|---|---|---|---|---|---|---|---|---|")
    errors = []
    for name, length, kind, shape, local, rate, source in PUBLISHED:
        chip = CHIPS[kind]
        if chip.platform == "gpu":
            hardware = Devices(chip, shape[0], False, (), shape[1])
        else:
            hardware = Devices(chip, math.prod(shape) * chip.per_chip, False, shape)
        rows = local * hardware.count
        stage = Sft.unvalidated(
            batch=Measure.unvalidated(value=rows, unit="sequences"),
            optimizer=AdamW.unvalidated(lr=1e-4),
        )
        where = f"{hardware}"
        try:
            layout = best_layout(query_of(stage, replace(LARGER[name], context=length), hardware))
        except DoesNotFitError as error:
            needed, there_is = error.nearest.total / 2**30, chip.memory / 2**30
            why = (
                f"does not fit: {needed:.1f} GiB of {there_is:.1f}, of which {MARGIN:.0%} are used"
            )
            print(f"| {name} | {length} | {where} | {rate:,} | {why} |")
            continue
        ours = rows * length / layout.seconds / hardware.count * chip.per_chip
        errors.append(ours / rate - 1)
        print(
            f"| {name} | {length} | {where} | {rate:,} | {ours:,.0f} | {errors[-1]:+.0%} |"
            f" {brief(layout)} | {layout.bound} | {source} |"
        )
    print(f"\n{len(errors)} runs: median error {statistics.median(map(abs, errors)):.0%}")


def main() -> None:
    """Compile points, or report on those that are compiled."""
    parser = argparse.ArgumentParser(description="The plan against XLA's compilers.")
    parser.add_argument("--out", type=Path, help="compile points and append them to this file")
    parser.add_argument(
        "--chips", default=",".join(SLICES), help="compile points of these chips only"
    )
    parser.add_argument("--report", type=Path, nargs="+", help="compare points with the plan")
    parser.add_argument(
        "--fit", type=Path, nargs="+", help="fit the constants of the plan's memory model to points"
    )
    parser.add_argument(
        "--published", action="store_true", help="compare the plan's time with published runs"
    )
    parser.add_argument(
        "--cases",
        type=int,
        help="check for this many small stages whether the chosen layout is the best that fits",
    )
    args = parser.parse_args()
    if args.cases is not None:
        cases(args.cases)
    if args.out is not None:
        lines = args.out.read_text().splitlines() if args.out.exists() else []
        done = {json.loads(line)["at"] for line in lines}
        for number, point in numbered().items():
            if number in done or point.chip not in args.chips.split(","):
                continue
            said = compiled(point)
            with args.out.open("a") as file:
                file.write(json.dumps({"at": number, **asdict(point), "said": said}) + "\n")
            print(number, point, said, flush=True)
    if args.published:
        published()
    if args.fit is not None:
        fit(args.fit)
    if args.report is not None:
        report(args.report)


if __name__ == "__main__":
    main()
