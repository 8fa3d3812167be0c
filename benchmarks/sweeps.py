"""Compare branches of a sweep trained in one program with branches trained in turn.

`python benchmarks/sweeps.py [--branches 3]`. The two alternate in one process; the time is the
median. On CPUs; what the plan says of other hardware is in `tune plan -v`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.training import Lora
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, random_state, split_state
from tunelang.runtime.training.train_step import train_step

SPEC = AdamW.unvalidated(lr=1e-4)
SIZES = ((1, 64), (1, 256), (4, 512))


def alternated(calls: int, *works: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each, after one call that is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for call in range(calls + 1):
        for work, seconds in zip(works, times, strict=True):
            begun = time.perf_counter()
            jax.block_until_ready(work())
            if call:
                seconds.append(time.perf_counter() - begun)
    return [statistics.median(seconds) for seconds in times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--branches", type=int, default=3)
    parser.add_argument("--calls", type=int, default=7)
    args = parser.parse_args()
    base = Architecture(
        vocabulary=8192, layers=8, width=512, heads=8, kv_heads=4, head_dim=64, mlp=1536,
        context=512,
    )  # fmt: skip
    every = (Lora(rank=16, targets=("all",)),)
    forms = {
        "full": base,
        "LoRA": adapted(base, every, "f32"),
        "QLoRA, nf4": adapted(base, every, "nf4"),
    }
    print(f"{parameter_count(base) / 1e6:.0f} M parameters, {args.branches} branches")
    print("| form | tokens of a branch | in turn, ms | one program, ms | ratio |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    optimizer, schedule = build_optimizer(SPEC, 100), learning_rate(SPEC, 100)
    for name, architecture in forms.items():
        config = StepConfig(layout=make_layout(), remat="dots")
        alone = train_step(architecture, optimizer, schedule, config)
        config = replace(config, branches=args.branches)
        together = train_step(architecture, optimizer, schedule, config)
        for rows, length in SIZES:
            shape = (1, rows, length)
            batch = Batch(rng.integers(0, 8192, shape, dtype=np.int32), np.ones(shape, np.bool_))
            state = random_state(architecture, optimizer, config, 0)
            changing, frozen = split_state(state)
            several: TrainState = jax.tree.map(
                lambda leaf: jnp.stack([leaf] * args.branches), changing
            )
            states = {
                "together": replace(several, frozen=frozen.frozen),
                **{
                    str(n): replace(jax.tree.map(jnp.copy, changing), frozen=frozen.frozen)
                    for n in range(args.branches)
                },
            }

            def one(batch: Batch = batch, states: Any = states, together: Any = together) -> Any:
                states["together"], metrics = together(states["together"], batch)
                return metrics

            def in_turn(batch: Batch = batch, states: Any = states, alone: Any = alone) -> Any:
                for n in range(args.branches):
                    states[str(n)], metrics = alone(states[str(n)], batch)
                    jax.block_until_ready(metrics)
                return metrics

            turn, fused = alternated(args.calls, in_turn, one)
            print(
                f"| {name} | {rows} × {length} | {1000 * turn:.0f} | {1000 * fused:.0f} |"
                f" {fused / turn:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
