"""Measure time and memory of the training step of one configuration on the local devices.

    python benchmarks/train_step.py --width 256 --layers 4 --length 256 --batch 16

Prints one line of JSON: the time to compile (s), tokens/s (the median call), the model's FLOP/s
(without what rematerialisation repeats), and memory of one device in MiB as the compiler states
it (the state and batch that go in, and what the program needs beside them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import jax
import numpy as np

from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count, train_flops
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import ReadOnlyState, random_state
from tunelang.runtime.training.train_step import train_step

MIB = 2**20


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time and memory of the training step.")
    sizes = {
        "width": 256, "layers": 4, "heads": 4, "kv-heads": 4, "mlp": 704, "vocabulary": 4096,
        "length": 256, "batch": 16, "micro-batches": 1, "chunk": 128, "steps": 1, "calls": 10,
        "data": 1, "fsdp": 1, "tensor": 1,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--kernel", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument(
        "--packed", action="store_true", help="pack four segments into each sequence"
    )
    return parser.parse_args()


def make_batch(args: argparse.Namespace, vocabulary: int) -> Batch:
    """Random tokens, all trained."""
    shape = (args.steps, args.batch, args.length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    segments = positions = None
    if args.packed:
        place = np.arange(args.length, dtype=np.int32)
        segment_length = -(-args.length // 4)
        segments = np.broadcast_to(place // segment_length + 1, shape)
        positions = np.broadcast_to(place % segment_length, shape)
    return Batch(tokens, np.ones(shape, bool), segments, positions)


def main() -> None:
    """Compile, run, print."""
    args = arguments()
    architecture = Architecture(
        vocabulary=args.vocabulary, layers=args.layers, width=args.width, heads=args.heads,
        kv_heads=args.kv_heads, head_dim=args.width // args.heads, mlp=args.mlp,
        context=args.length, tied=not args.untied,
    )  # fmt: skip
    spec = AdamW(lr=1e-3)
    optimizer, schedule = build_optimizer(spec, 1000), learning_rate(spec, 1000)
    config = StepConfig(
        layout=make_layout(args.data, args.fsdp, args.tensor), dtype=DTYPES[args.dtype],
        micro_batches=args.micro_batches, remat=args.remat, kernel=args.kernel,
        chunk=args.chunk,
    )  # fmt: skip
    state = random_state(architecture, optimizer, config, 0)
    batch = make_batch(args, architecture.vocabulary)
    start = time.perf_counter()
    step = train_step(architecture, optimizer, schedule, config).lower(state, batch).compile()
    compiled = time.perf_counter() - start
    times = []
    for _ in range(args.calls + 1):
        start = time.perf_counter()
        state, metrics = step(state, ReadOnlyState(state.frozen, None), batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    rate = args.steps * args.batch * args.length / statistics.median(times[1:])
    memory = step.memory_analysis()
    print(json.dumps({
        "parameters": parameter_count(architecture),
        "compile_s": round(compiled, 1),
        "tokens_per_s": round(rate),
        "model_gflops": round(rate * train_flops(architecture, args.length) / 1e9, 1),
        "arguments_mib": round(memory.argument_size_in_bytes / MIB, 1),
        "temporaries_mib": round(memory.temp_size_in_bytes / MIB, 1),
        "loss": round(float(metrics.loss[-1]), 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
