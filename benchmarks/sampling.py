"""Time one draw of a token on this machine, against top-p by a full sort.

    PYTHONPATH=.types python benchmarks/sampling.py

Prints milliseconds, the least of a few runs, for 8 slots and vocabularies of three sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation import token_sampling

SLOTS = 8
CASES = {
    "no filter": Sampling(),
    "top-k 50": Sampling(top_k=50),
    "top-p 95%": Sampling(top_p=0.95),
    "all": Sampling(top_k=50, top_p=0.95, min_p=0.01),
}


def by_sort(scaled: Array, top_p: Array) -> Array:
    """Find the tokens that top-p keeps by sorting the vocabulary."""
    probabilities = jax.nn.softmax(scaled, -1)
    ordered = jnp.sort(probabilities, -1, descending=True)
    before = jnp.cumsum(ordered, -1) - ordered
    least = jnp.where(before < top_p[:, None], ordered, 2.0).min(-1, keepdims=True)
    return probabilities >= least


def milliseconds(function: Callable[..., object], *args: object) -> float:
    """Time five calls of the compiled function and take the least."""
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Print the table."""
    print(f"{'vocabulary':>10}  {'top-p by sort':>14}  {'top-p here':>10}", end="")
    print("".join(f"  {'step, ' + name:>16}" for name in CASES))
    for vocab in (256, 32_768, 150_000):
        logits = 3 * jax.random.normal(jax.random.key(0), (SLOTS, vocab))
        slots = jnp.arange(SLOTS)
        keys = token_sampling.token_keys(jnp.int32(0), jnp.int32(0), slots, slots, slots)
        nucleus = token_sampling.slot_settings(CASES["top-p 95%"], SLOTS)
        scaled = token_sampling.scale(logits, nucleus.temperature)
        row = [
            milliseconds(by_sort, scaled, nucleus.top_p),
            milliseconds(token_sampling.filtered, scaled, nucleus),
        ]
        for case in CASES.values():
            row.append(
                milliseconds(
                    token_sampling.sample_tokens,
                    logits,
                    keys,
                    token_sampling.slot_settings(case, SLOTS),
                )
            )
        print(f"{vocab:>10}  {row[0]:>14.2f}  {row[1]:>10.2f}", end="")
        print("".join(f"  {value:>16.2f}" for value in row[2:]), flush=True)


if __name__ == "__main__":
    main()
