"""Compare LoRA, DoRA and QLoRA with full tuning: time of a step, memory of its program.

`python benchmarks/adapters.py [--layers 8 --width 512 --batch 4 --length 512]`. Steps of all forms
alternate in one process; the time is the median. Memory is what the compiler says of one step:
arguments (weights, moments, batch) and temporaries (gradients, activations).
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import jax
import numpy as np

from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count, train_flops
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.training import Dora, Lora
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state
from tunelang.runtime.training.train_step import train_step

MIB = 2**20
SPEC = AdamW.unvalidated(lr=1e-4)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    for name, default in (
        ("layers", 8), ("width", 512), ("heads", 8), ("kv-heads", 4), ("mlp", 1536),
        ("vocabulary", 8192), ("batch", 4), ("length", 512), ("rank", 16), ("calls", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--remat", default="dots")
    args = parser.parse_args()
    base = Architecture(
        vocabulary=args.vocabulary, layers=args.layers, width=args.width, heads=args.heads,
        kv_heads=args.kv_heads, head_dim=args.width // args.heads, mlp=args.mlp,
        context=args.length,
    )  # fmt: skip
    every = Lora(rank=args.rank, targets=("all",))
    forms = {
        "full": base,
        "LoRA": adapted(base, (every,), args.dtype),
        "DoRA": adapted(base, (Dora(rank=args.rank, targets=("all",)),), args.dtype),
        "QLoRA, int8": adapted(base, (every,), "int8"),
        "QLoRA, nf4": adapted(base, (every,), "nf4"),
    }
    rng = np.random.default_rng(0)
    shape = (1, args.batch, args.length)
    batch = Batch(rng.integers(0, args.vocabulary, shape, dtype=np.int32), np.ones(shape, np.bool_))
    config = StepConfig(layout=make_layout(), dtype=DTYPES[args.dtype], remat=args.remat)
    steps, memory, times = {}, {}, {name: [] for name in forms}
    for name, architecture in forms.items():
        optimizer = build_optimizer(SPEC, 100)
        state = random_state(architecture, optimizer, config, 0)
        step = train_step(architecture, optimizer, learning_rate(SPEC, 100), config)
        analysis = step.lower(state, batch).compile().memory_analysis()
        memory[name] = analysis.argument_size_in_bytes / MIB, analysis.temp_size_in_bytes / MIB
        steps[name] = [step, state]
    for call in range(args.calls + 1):
        for name, compiled_step in steps.items():
            start = time.perf_counter()
            compiled_step[1], metrics = compiled_step[0](compiled_step[1], batch)
            jax.block_until_ready(metrics)
            if call:
                times[name].append(time.perf_counter() - start)
    print(f"{parameter_count(base) / 1e6:.0f} M parameters, {args.batch} × {args.length} tokens")
    print(
        "| form | ms a step | of full | FLOPs of full | arguments MiB | temporaries MiB | of full |"
    )
    print("|---|---|---|---|---|---|---|")
    full = statistics.median(times["full"])
    flops = train_flops(replace(base), args.length)
    for name, (arguments, temporary) in memory.items():
        took = statistics.median(times[name])
        share = train_flops(forms[name], args.length) / flops
        total = (arguments + temporary) / sum(memory["full"])
        print(
            f"| {name} | {1000 * took:.0f} | {took / full:.2f} | {share:.2f} | {arguments:.0f}"
            f" | {temporary:.0f} | {total:.2f} |"
        )


if __name__ == "__main__":
    main()
