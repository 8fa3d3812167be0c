"""The function that training minimizes: batches, the protocol of objectives, and the likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree
from typing_extensions import override

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.moe import balance_loss
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.sharding import jit
from tunelang.runtime.training.cross_entropy import cross_entropy, custom_loss
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.user_functions import UserFunction

AnyArray = Any
"""A JAX or numpy array. Batches built on the host are passed to jitted functions unconverted."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sequences to train on. Each field is `[batch, length]`, or `[steps, batch, length]`."""

    tokens: AnyArray
    """int32."""
    trained: AnyArray
    """bool: whether the loss counts the prediction of this token from those before it. The first
    token of a segment never counts, since nothing precedes it."""
    segments: AnyArray = None
    """int32: the number of the token's example among those that share the sequence, from 1; 0 is
    padding. None: each sequence is one example, padded at its end."""
    positions: AnyArray = None
    """int32: the position of the token in its example. None: its position in the sequence."""
    extras: PyTree = None
    """Arrays that only the objective reads: a tree of `[batch, ...]`."""


@dataclass(frozen=True)
class Models:
    """The models that an objective evaluates."""

    decoder: Decoder
    """The trained model."""
    extra: Params
    """The objective's own trained parameters."""
    aux_params: PyTree
    """Parameters of a second model that is not trained: a reference or a teacher."""
    config: StepConfig


@runtime_checkable
class Objective(Protocol):
    """A loss that is a sum over the micro-batches of a batch."""

    def initial_params(self) -> Params:
        """Return the objective's own trained parameters, initialised; below `OBJECTIVE_PARAMS`."""
        return nnx.State({})

    def normalizers(self, models: Models, batch: Batch) -> PyTree:
        """Compute the scalars that every micro-batch's loss is divided by, from the whole batch."""

    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, normalizers: PyTree
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of a micro-batch and its metrics; over the micro-batches, each adds up.

        `keys` `[batch]` are the random keys of the dropout; None without dropout.
        """


@dataclass(frozen=True)
class LikelihoodObjective(Objective):
    """The mean over the trained tokens of the batch of `-log p`, or of a loss of the user's own."""

    custom: UserFunction | None = None

    @override
    def normalizers(self, models: Models, batch: Batch) -> jax.Array:
        """Return the number of trained tokens."""
        del models
        return jnp.maximum(jnp.sum(shift_targets(batch)[1]), 1.0)

    @override
    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, normalizers: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        total = summed_loss(models.decoder, batch, keys, models.config, custom=self.custom)
        return total / normalizers, {}


def summed_loss(
    decoder: Decoder,
    batch: Batch,
    keys: jax.Array | None,
    config: StepConfig,
    *,
    balanced: bool = True,
    custom: UserFunction | None = None,
) -> jax.Array:
    """Sum the loss of the trained tokens of a batch, in nats; `custom` replaces the cross entropy.

    With `balanced`, the experts' load-balance loss is added, weighted by the trained tokens.
    """
    hidden, routed = hidden_states(decoder, batch, keys, config)
    targets, counted = shift_targets(batch)
    inputs = hidden, decoder.head_weight(), targets, counted
    chunk, cap, layout = config.chunk, decoder.architecture.logit_cap, config.layout
    if custom is None:
        total, _ = cross_entropy(*inputs, chunk=chunk, cap=cap, layout=layout)
    else:
        total = custom_loss(*inputs, custom, chunk=chunk, cap=cap, layout=layout)
    if balanced:
        # The loss of a batch is the mean over its micro-batches, by their trained tokens.
        total += jnp.sum(counted) * balance(decoder, batch, routed)
    return total


def balance(
    decoder: Decoder, batch: Batch, routed: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Return the load-balance loss of experts over a part of a batch, 0 without any."""
    mixture = decoder.architecture.experts
    if mixture is None or routed is None:
        return jnp.zeros((), jnp.float32)
    is_token = jnp.ones(batch.tokens.shape, bool) if batch.segments is None else batch.segments > 0
    loss: jax.Array = mixture.balance * balance_loss(*routed, is_token)
    return loss


def hidden_states(
    decoder: Decoder, batch: Batch, keys: jax.Array | None, config: StepConfig
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Return the hidden states of a batch, and the routing of experts."""
    return decoder(
        batch.tokens,
        segments=batch.segments,
        positions=batch.positions,
        dropout_keys=keys,
        layout=config.layout,
        remat=config.remat,
        kernel=config.attends,
    )


def shift_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the token that each position predicts, and whether it counts (float32).

    Both are `[batch, length]`.
    """
    targets = jnp.roll(batch.tokens, -1, axis=1)
    counted = jnp.roll(batch.trained.astype(bool), -1, axis=1).at[:, -1].set(False)
    if batch.segments is not None:
        following = jnp.roll(batch.segments, -1, axis=1)
        counted &= (following == batch.segments) & (batch.segments > 0)
    return targets, counted.astype(jnp.float32)


def loss_program(architecture: Architecture, config: StepConfig) -> jax.stages.Wrapped:
    """Return the jitted `(params, batch) -> (loss, tokens)`: sums over `[steps, batch, length]`."""
    graph, _ = abstract_decoder(architecture, config.dtype)

    def total(params: Params, batches: Batch) -> tuple[jax.Array, jax.Array]:
        def body(
            sums: tuple[jax.Array, jax.Array], batch: Batch
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            loss = summed_loss(nnx.merge(graph, params), batch, None, config, balanced=False)
            return (sums[0] + loss, sums[1] + jnp.sum(shift_targets(batch)[1])), None

        zero = jnp.zeros((), jnp.float32)
        sums, _ = jax.lax.scan(body, (zero, zero), batches)
        return sums

    return jit(total, config.layout)
