"""Measure rollouts of one configuration on the local devices: completions/s and tokens/s.

    PYTHONPATH=.types python benchmarks/rollout.py --width 256 --layers 4 --slots 32 --prompts 32

Prints one line of JSON for each of three cases: `even`, where every completion has `max-tokens`
tokens; `skewed`, where every other one ends after a quarter of them; and `skewed, no refill`, where
slots wait until all of them are free. Figures are of the median call, after one that compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation.engine import Admission, Engine, Prefilled, Slots, make_engine
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Episodes, Prompt
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.sharding import make_layout, shardings


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Completions/s and tokens/s of rollouts.")
    sizes = {
        "width": 256, "layers": 4, "heads": 4, "kv-heads": 2, "mlp": 704, "vocabulary": 4096,
        "prompts": 16, "prompt-length": 64, "group": 8, "slots": 32, "max-tokens": 128,
        "calls": 3, "data": 1, "fsdp": 1, "tensor": 1,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--refill-at",
        type=int,
        help="refill when this many slots are free; default: an eighth of them",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--top-p", type=float)
    return parser.parse_args()


def skewed(engine: Engine, short: int, max_tokens: int) -> Engine:
    """Let every other completion of a group draw only its last `short` tokens.

    Random parameters stop nowhere in particular. To start a completion late in its count of tokens
    makes it as long as wanted, and changes nothing else that takes time.
    """

    @partial(jax.jit, donate_argnums=0)
    def start_late(state: Slots, admission: Admission) -> Slots:
        start = jnp.where(jnp.asarray(admission.sample) % 2 == 1, max_tokens - short, 0)
        return replace(state, drawn=state.drawn.at[admission.slot].set(start, mode="drop"))

    def admit(state: Slots, prompts: Prefilled, admission: Admission) -> Slots:
        admitted: Slots = start_late(engine.admit(state, prompts, admission), admission)
        return admitted

    return replace(engine, admit=admit)


def main() -> None:
    """Compile, run, print."""
    args = arguments()
    architecture = Architecture(
        vocabulary=args.vocabulary, layers=args.layers, width=args.width, heads=args.heads,
        kv_heads=args.kv_heads, head_dim=args.width // args.heads, mlp=args.mlp,
        context=args.prompt_length + args.max_tokens,
    )  # fmt: skip
    layout = make_layout(args.data, args.fsdp, args.tensor)
    params = nnx.state(Decoder(architecture, nnx.Rngs(0), DTYPES[args.dtype]), nnx.Param)
    params = jax.device_put(params, shardings(params, layout))
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(rng.integers(0, args.vocabulary, args.prompt_length).tolist(), index)
        for index in range(args.prompts)
    ]
    sampling = Sampling(max_tokens=args.max_tokens, top_p=args.top_p)
    short = args.max_tokens // 4

    def run(engine: Engine, step: int) -> Episodes:
        sampler = Sampler(engine, sampling, stop_ids=(), pad=0)
        return sampler.sample(params, prompts, group=args.group, seed=0, step=step)

    engine = make_engine(
        architecture, slots=args.slots, capacity=architecture.context, layout=layout,
        dtype=DTYPES[args.dtype],
    )  # fmt: skip
    if args.refill_at is not None:
        engine = replace(engine, refill_at=args.refill_at)
    batches = replace(engine, refill_at=args.slots)
    cases = {
        "even": (engine, args.max_tokens),
        "skewed": (skewed(engine, short, args.max_tokens), short),
        "skewed, no refill": (skewed(batches, short, args.max_tokens), short),
    }
    count = args.prompts * args.group
    for name, (case, odd) in cases.items():
        times = []
        for step in range(args.calls + 1):
            start = time.perf_counter()
            episodes = run(case, step)
            times.append(time.perf_counter() - start)
        took = statistics.median(times[1:])
        tokens = args.prompts * sum(
            odd if sample % 2 else args.max_tokens for sample in range(args.group)
        )
        print(json.dumps({
            "case": name,
            "parameters": parameter_count(architecture),
            "first_call_s": round(times[0], 1),
            "completions_per_s": round(count / took, 2),
            "tokens_per_s": round(tokens / took),
            "decode_steps": episodes.work.decode_steps,
            "decode_calls": episodes.work.decode_calls,
            "slots_used": round(tokens / (episodes.work.decode_steps * args.slots), 3),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
