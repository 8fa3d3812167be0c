"""The training program of policy optimisation: completions and their advantages to an update.

Completions lie one in a row, prompt first, padded behind: attention is causal, so that no mask is
needed for the padding. As in supervised training, the loss of an update is a sum over a denominator
of all its tokens or sequences, so that neither micro-batches nor devices change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tunelang.compiler.architecture import Architecture
from tunelang.dsl.vocabulary.stages import Policy
from tunelang.runtime import objectives
from tunelang.runtime.decoder import Decoder
from tunelang.runtime.losses import token_logprobs, token_scores
from tunelang.runtime.objectives import Completions, Totals
from tunelang.runtime.optimizers import Schedule
from tunelang.runtime.train import (
    AnyArray,
    Program,
    TrainState,
    abstract_decoder,
    accumulate,
    updated,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Completions with their prompts; log-probabilities are those of the *next* token, in nats, at
    the temperature of the rollout.
    """

    tokens: AnyArray
    """`[completions, length]` int32."""
    mask: AnyArray
    """`[completions, length]` bool: true where the next token counts."""
    advantages: AnyArray
    """`[completions]` float32."""
    sampler: AnyArray
    """`[completions, length]`: as the sampler reported them."""
    old: AnyArray = None
    """`[completions, length]`: by this program before the step's first update; needed where a step
    makes several."""
    reference: AnyArray = None
    """`[completions, length]`: by the reference model."""


StepProgram = Callable[[TrainState, PolicyBatch], tuple[TrainState, dict[str, jax.Array]]]
ScoreProgram = Callable[[Any, AnyArray], jax.Array]


def policy_step(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    policy: Policy,
    program: Program,
) -> StepProgram:
    """Return the jitted `(state, batch) -> (state, metrics)`; the state that goes in is used up.

    Makes `passes * minibatches` updates. Metrics are scalars: those of `objectives.metrics` over
    all updates, the mean `grad_norm` and the `learning_rate` of the last.
    """
    graph, _ = abstract_decoder(architecture, program.dtype)
    layout = program.layout
    temperature = policy.rollout.temperature or 1.0

    def loss(params: Any, part: tuple[PolicyBatch, jax.Array]) -> tuple[jax.Array, Any]:
        batch, denominator = part[0], part[1][0]
        decoder = nnx.merge(graph, params)
        hidden = decoder(batch.tokens, layout=layout, remat=program.remat, kernel=program.kernel)
        now, entropy = token_scores(
            hidden,
            decoder.head_weight(),
            jnp.roll(batch.tokens, -1, axis=1),
            chunk=program.chunk,
            cap=architecture.logit_cap,
            temperature=temperature,
            layout=layout,
        )
        completions = Completions(
            now=now,
            mask=batch.mask,
            advantages=jnp.broadcast_to(batch.advantages[:, None], now.shape),
            old=batch.old,
            sampler=batch.sampler,
            reference=batch.reference,
            entropy=entropy,
        )
        total, totals = objectives.objective(policy, completions)
        return total / jnp.maximum(denominator, 1.0), totals

    def update(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, Any]:
        denominator = objectives.denominator(policy, batch.mask)
        # One for each row, so that micro-batches are cut out of it as of all else.
        rows = jnp.broadcast_to(denominator, batch.advantages.shape)
        value, totals, gradient = accumulate(
            loss,
            state.params,
            (batch, rows),
            program,
            objectives.add,
            lambda part: jnp.any(part[0].mask),
        )
        state, norm, rate = updated(state, gradient, optimizer, schedule)
        return state, (value * denominator, totals, norm, rate)

    def step(state: TrainState, batch: PolicyBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        if policy.passes * policy.minibatches == 1:
            state, (value, totals, norm, rate) = update(state, batch)
            found = objectives.metrics(value, totals)
            return state, {**found, "grad_norm": norm, "learning_rate": rate}

        def one_pass(state: TrainState, _: None) -> tuple[TrainState, Any]:
            key = jax.random.fold_in(jax.random.key(program.seed), state.step)
            order = jax.random.permutation(key, batch.advantages.shape[0])
            mixed = jax.tree.map(lambda array: array[order], batch)
            parts = jax.tree.map(
                lambda array: array.reshape(policy.minibatches, -1, *array.shape[1:]), mixed
            )
            return jax.lax.scan(update, state, parts)

        state, made = jax.lax.scan(one_pass, state, length=policy.passes)
        value, totals, norm, rate = made
        summed = jax.tree.map(jnp.sum, totals)
        summed = Totals(
            summed.denominator, summed.tokens, summed.sums, jax.tree.map(jnp.max, totals.maxima)
        )
        found = objectives.metrics(jnp.sum(value), summed)
        return state, {**found, "grad_norm": jnp.mean(norm), "learning_rate": rate[-1, -1]}

    return jax.jit(step, donate_argnums=0)


def score_program(architecture: Architecture, program: Program, temperature: float) -> ScoreProgram:
    """Return the jitted `(params, tokens [rows, length]) -> log-probabilities [rows, length]`: of
    each next token at a temperature, in nats.
    """
    graph, _ = abstract_decoder(architecture, program.dtype)

    def part(params: Any, tokens: jax.Array) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, params)
        return token_logprobs(
            decoder(tokens, layout=program.layout, kernel=program.kernel),
            decoder.head_weight(),
            jnp.roll(tokens, -1, axis=1),
            chunk=program.chunk,
            cap=architecture.logit_cap,
            temperature=temperature or 1.0,
            layout=program.layout,
        )

    def score(params: Any, tokens: jax.Array) -> jax.Array:
        if program.micro_batches == 1:
            return part(params, tokens)
        rows = tokens.reshape(-1, program.micro_batches, tokens.shape[1]).swapaxes(0, 1)
        rows = program.layout.constrain(rows, (None, "batch", None))
        found: jax.Array = jax.lax.map(lambda one: part(params, one), rows)
        scores: jax.Array = found.swapaxes(0, 1).reshape(tokens.shape)
        return scores

    return jax.jit(score)


def useful_first(batch: PolicyBatch, program: Program) -> PolicyBatch:
    """Order the rows of a batch of numpy arrays so that those in which no token counts share
    micro-batches, which the step then skips. Micro-batch `m` of `n` is rows `m`, `m + n`, ...
    """
    order = np.argsort(~batch.mask.any(1), kind="stable")
    rows = order.reshape(program.micro_batches, -1).T.reshape(-1)
    return replace(batch, **{n: a[rows] for n, a in vars(batch).items() if a is not None})


def placed(batch: PolicyBatch, program: Program) -> PolicyBatch:
    """Put a batch of numpy arrays where the program reads it: rows over the mesh."""

    def put(array: Any) -> jax.Array:
        spec = program.layout.spec(("batch", *(None,) * (array.ndim - 1)), array.shape)
        place = NamedSharding(program.layout.mesh, PartitionSpec(*spec))
        there: jax.Array = jax.device_put(array, place)
        return there

    return replace(batch, **{name: put(a) for name, a in vars(batch).items() if a is not None})
