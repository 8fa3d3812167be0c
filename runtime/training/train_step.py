"""The training program of supervised stages: one jitted call that makes one or more steps.

A step's loss is the sum over its trained tokens divided by their number in the whole batch, so
that neither micro-batches nor devices change it. Micro-batches are scanned, and so are steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.parameters import (
    Params,
    abstract_decoder,
    merge_params,
    split_objective_params,
    uses_dropout,
)
from tunelang.runtime.sharding import jit
from tunelang.runtime.training.accumulate import accumulate
from tunelang.runtime.training.objective import (
    Batch,
    LikelihoodObjective,
    Models,
    Objective,
    shift_targets,
)
from tunelang.runtime.training.optimizers import Schedule
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import (
    ReadOnlyState,
    TrainState,
    abstract_state,
    split_state,
    stack_branches,
    state_shardings,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """The metrics of steps, `[steps]` float32 each."""

    loss: jax.Array
    """Mean over the trained tokens, in nats, before the update."""
    tokens: jax.Array
    """Trained tokens."""
    grad_norm: jax.Array
    """Global norm of the gradient, before clipping."""
    learning_rate: jax.Array
    more: dict[str, jax.Array] = field(default_factory=dict)
    """Metrics of the objective."""


@dataclass(frozen=True)
class StateProgram:
    """A jitted program from a state and a batch to the next state and metrics.

    The state that goes in is used up, except for its frozen parameters.
    """

    jitted: jax.stages.Wrapped
    """`(changing, read-only, batch) -> (changing, metrics)`, of the parts of `split_state`."""

    def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, PyTree]:
        """Run it."""
        changed, metrics = self.jitted(*split_state(state), batch)
        return replace(changed, frozen=state.frozen, aux_params=state.aux_params), metrics

    def lower(self, state: TrainState, batch: PyTree) -> jax.stages.Lowered:
        """Lower it for shapes and shardings."""
        return self.jitted.lower(*split_state(state), batch)


def train_step(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: StepConfig,
    objective: Objective | None = None,
) -> StateProgram:
    """Return the program `(state, batch) -> (state, metrics)`.

    Without an objective, it is the likelihood of the trained tokens. The batch has a leading axis,
    `[steps, batch, length]`, and that many steps are made. Raises `ValueError` when called with a
    batch that does not divide over micro-batches and devices.
    """
    objective = objective or LikelihoodObjective()
    graph, _ = abstract_decoder(architecture, config.dtype)

    def make_step(
        state: TrainState, read_only: ReadOnlyState, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        rows = batch.tokens.shape[0]
        _require_division(rows, config)
        keys = _dropout_keys(state.step, rows, config) if uses_dropout(architecture) else None

        def models(params: Params) -> Models:
            trained, extra = split_objective_params(params)
            decoder = nnx.merge(graph, merge_params(trained, read_only.frozen))
            return Models(decoder, extra, read_only.aux_params, config)

        tokens = jnp.sum(shift_targets(batch)[1])
        normalizers = objective.normalizers(models(jax.lax.stop_gradient(state.params)), batch)

        def loss(
            params: Params, part: tuple[Batch, jax.Array | None]
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective.loss(models(params), *part, normalizers)

        value, more, gradient = accumulate(
            loss, state.params, (batch, keys), config, partial(jax.tree.map, jnp.add)
        )
        state, norm, rate = apply_gradient(state, gradient, optimizer, schedule)
        return state, StepMetrics(value, tokens, norm, rate, more)

    def steps(
        state: TrainState, read_only: ReadOnlyState, batches: Batch
    ) -> tuple[TrainState, StepMetrics]:
        return jax.lax.scan(lambda state, batch: make_step(state, read_only, batch), state, batches)

    abstract = abstract_state(architecture, optimizer, config, objective.initial_params)
    return StateProgram(_jit_steps(steps, abstract, config))


def _require_division(rows: int, config: StepConfig) -> None:
    if rows % (config.micro_batches * config.layout.batch_shards):
        raise ValueError(
            f"{rows} sequences do not divide over {config.micro_batches} micro-batches on"
            f" {config.layout.batch_shards} parts of the mesh"
        )


def _dropout_keys(step: jax.Array, rows: int, config: StepConfig) -> jax.Array:
    """Return a random key for each row of a step's batch."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    keys: jax.Array = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))
    return keys


Steps = Callable[[TrainState, ReadOnlyState, Batch], tuple[TrainState, StepMetrics]]


def _jit_steps(steps: Steps, abstract: TrainState, config: StepConfig) -> jax.stages.Wrapped:
    """Jit steps for states like `abstract`; over branches, if there are several."""
    layout = config.layout
    places = state_shardings(abstract, config)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    batch_place = NamedSharding(
        layout.mesh, PartitionSpec(None, *layout.spec(("batch",), (layout.batch_shards,)))
    )
    changing, _ = split_state(places)
    run = steps
    if config.branches > 1:
        stacked = stack_branches(split_state(abstract)[0], config.branches)
        changing = jax.tree.map(lambda leaf: leaf.sharding, stacked)
        run = jax.vmap(steps, in_axes=(0, None, None))
    return jit(
        run,
        layout,
        # Auxiliary parameters may lie anywhere: a reference can have a layout of its own.
        in_shardings=(changing, ReadOnlyState(places.frozen, None), batch_place),
        out_shardings=(changing, everywhere),
        donate_argnums=0,
    )


def apply_gradient(
    state: TrainState,
    gradient: Params,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Make one update. Returns the state, the gradient's norm before clipping, the rate."""
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    updates = jax.tree.map(lambda update: state.scale * update, updates)
    params = optax.apply_updates(state.params, updates)
    rate = state.scale * schedule(state.step)
    new = TrainState(params, optimizer_state, state.step + 1, state.scale)
    return new, optax.tree.norm(gradient), rate
