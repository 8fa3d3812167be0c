"""The state of training: the part that a step changes, and the part that it only reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.parameters import (
    Params,
    merge_params,
    split_objective_params,
    split_trainable,
)
from tunelang.runtime.sharding import HOST, shardings
from tunelang.runtime.training.step_config import StepConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the weights that it leaves alone. Parameters carry the
    names of their axes.
    """

    params: Params
    """The trained parameters."""
    optimizer: PyTree
    step: jax.Array
    """int32 scalar: how many steps were made."""
    scale: jax.Array
    """float32 scalar: factor of every update. An optimizer built for a learning rate of 1 and
    scaled by the peak rate serves all branches of a sweep over rates with one program."""
    frozen: Params = field(default_factory=lambda: nnx.State({}))
    """The decoder's other parameters, where an adapter is trained."""
    aux_params: PyTree = None
    """Parameters of other models that the objective reads: a reference, a teacher; or the critic's
    frozen ones."""
    critic: TrainState | None = None
    """The state of a policy's critic, without frozen parameters."""

    @property
    def moments(self) -> PyTree:
        """The moments of the optimizers, which a checkpoint holds besides the parameters."""
        if self.critic is None:
            return self.optimizer
        critic = {"params": self.critic.params, "optimizer": self.critic.optimizer}
        return {"optimizer": self.optimizer, "critic": critic}

    def restored(self, params: Params, moments: PyTree, step: int) -> TrainState:
        """Return the state that had these parameters and `moments` after so many updates."""
        critic = self.critic
        if critic is not None:
            stored, moments = moments["critic"], moments["optimizer"]
            critic = critic.restored(stored["params"], stored["optimizer"], step)
        count = jax.device_put(jnp.int32(step), self.step.sharding)
        return replace(self, params=params, optimizer=moments, step=count, critic=critic)

    @property
    def trained_params(self) -> Params:
        """The trained parameters of the decoder."""
        return split_objective_params(self.params)[0]

    @property
    def decoder_params(self) -> Params:
        """The parameters of the decoder, trained and frozen."""
        return merge_params(self.trained_params, self.frozen)


class ReadOnlyState(NamedTuple):
    """The part of a state that a step only reads."""

    frozen: Params
    aux_params: PyTree


def split_state(state: TrainState) -> tuple[TrainState, ReadOnlyState]:
    """Split a state into the part that a step changes and the part that it only reads."""
    changing = replace(state, frozen=nnx.State({}), aux_params=None)
    return changing, ReadOnlyState(state.frozen, state.aux_params)


def abstract_state(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    extra: Callable[[], Params] = lambda: nnx.State({}),
) -> TrainState:
    """Return the state as shapes and shardings, which `train_step(...).lower` takes for arrays."""
    state = jax.eval_shape(lambda: _fresh(architecture, optimizer, config, 0, extra()))
    shaped: TrainState = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        state_shardings(state, config),
    )
    return shaped


def random_state(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    seed: int,
    scale: float = 1.0,
) -> TrainState:
    """Return a state with random parameters, made where they belong; equal on every mesh."""
    abstract = jax.eval_shape(lambda: _fresh(architecture, optimizer, config, 0))
    places = state_shardings(abstract, config)
    make = jax.jit(lambda seed: _fresh(architecture, optimizer, config, seed), out_shardings=places)
    state: TrainState = make(seed)
    return replace(state, scale=jax.device_put(jnp.float32(scale), places.scale))


def initial_state(
    architecture: Architecture,
    params: Params,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    scale: float = 1.0,
) -> TrainState:
    """Return the state of a run that starts from these parameters, which it takes over."""
    params, frozen = split_trainable(architecture, params)
    shapes = jax.eval_shape(optimizer.init, params)
    places = shardings(shapes, config.layout, HOST if config.offloaded else None)
    if config.offloaded:  # on the devices there is no room for all of them
        moments = jax.tree.map(
            lambda leaf, place: jax.device_put(np.zeros(leaf.shape, leaf.dtype), place),
            shapes, places,
        )  # fmt: skip
    else:
        moments = jax.jit(optimizer.init, out_shardings=places)(params)
    everywhere = NamedSharding(config.layout.mesh, PartitionSpec())
    zero, factor = jnp.zeros((), jnp.int32), jnp.float32(scale)
    step, factor = jax.device_put((zero, factor), everywhere)
    return TrainState(params, moments, step, factor, frozen)


def stack_state(state: TrainState, branches: int) -> TrainState:
    """Return an abstract state whose trained part has one entry for each branch of a sweep."""
    changing, read_only = split_state(state)
    stacked: TrainState = stack_branches(changing, branches)
    return replace(stacked, frozen=read_only.frozen, aux_params=read_only.aux_params)


def stack_branches(tree: PyTree, count: int) -> PyTree:
    """Return the shapes and shardings of so many trees of arrays with one leading axis."""

    def stack(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=place)

    return jax.tree.map(stack, tree)


def _fresh(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    seed: int | jax.Array,
    extra: Params = nnx.State({}),  # noqa: B008 - it is empty and stays so
) -> TrainState:
    decoder = Decoder(architecture, nnx.Rngs(jax.random.key(seed)), config.dtype)
    decoder.set_magnitudes()
    params, frozen = split_trainable(architecture, nnx.state(decoder, nnx.Param))
    params = merge_params(params, extra)
    step, scale = jnp.zeros((), jnp.int32), jnp.float32(1.0)
    return TrainState(params, optimizer.init(params), step, scale, frozen)


def state_shardings(state: TrainState, config: StepConfig) -> TrainState:
    """Return the shardings of a state, arranged as it is."""
    layout = config.layout
    return replace(
        state,
        params=shardings(state.params, layout),
        optimizer=shardings(state.optimizer, layout, HOST if config.offloaded else None),
        aux_params=None,
        step=shardings(state.step, layout),
        scale=shardings(state.scale, layout),
        frozen=shardings(state.frozen, layout),
    )
