"""Mixtures of experts: feed-forward layers of which each token goes through a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tunelang.compiler.models.architecture import Architecture, Mixture
from tunelang.runtime.models.primitives import ACTIVATIONS, DTYPES, Parameter, normal, parameter
from tunelang.runtime.sharding import Layout, constrain


class Experts(nnx.Module):
    """The matrices of all experts."""

    def __init__(self, architecture: Architecture, mixture: Mixture, rngs: nnx.Rngs) -> None:
        a, count, hidden = architecture, mixture.count, mixture.width

        def matrices(inputs: int, outputs: int, gain: float, *axes: str) -> Parameter:
            drawn = normal(rngs, (count, inputs, outputs), gain * inputs**-0.5)
            stored = DTYPES.get(a.storage, jnp.bfloat16)
            return parameter(drawn.astype(stored), "expert", *axes)

        self.gate = matrices(a.width, hidden, 1.0, "embed", "mlp")
        self.up = matrices(a.width, hidden, 1.0, "embed", "mlp")
        self.down = matrices(hidden, a.width, (2 * a.layers) ** -0.5, "mlp", "embed")


class MixtureOfExperts(nnx.Module):
    """Feed-forward layers of which a router picks a few for each token (arXiv:1701.06538)."""

    def __init__(self, architecture: Architecture, mixture: Mixture, rngs: nnx.Rngs) -> None:
        a = architecture
        self.mixture, self.activation = mixture, a.activation
        self.router = parameter(
            normal(rngs, (a.width, mixture.count), a.width**-0.5), "embed", "experts"
        )
        self.experts = Experts(a, mixture, rngs)

    def __call__(
        self, x: jax.Array, layout: Layout | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Map `[batch, length, width]` to the same.

        Returns the inputs of `balance_loss` too, of each token: how many of its experts each one
        is, and the router's probabilities, `[..., experts]`.
        """
        mixture = self.mixture
        logits = jnp.matmul(x.astype(jnp.float32), self.router[...])
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, mixture.active)
        if mixture.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        matrices = [
            constrain(layout, matrix[...].astype(x.dtype), axes)
            for matrix, axes in (
                (self.experts.gate, ("expert", None, "mlp")),
                (self.experts.up, ("expert", None, "mlp")),
                (self.experts.down, ("expert", "mlp", None)),
            )
        ]
        activate = ACTIVATIONS[self.activation]
        y = run_experts(x, weights.astype(x.dtype), chosen, matrices, activate, layout)
        picked = jnp.sum(jax.nn.one_hot(chosen, mixture.count, dtype=jnp.float32), axis=-2)
        return y, (picked, probabilities)


def run_experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    matrices: Sequence[jax.Array],
    activate: Callable[[jax.Array], jax.Array],
    layout: Layout | None,
) -> jax.Array:
    """Run each token `[batch, length, width]` through its experts, and add up by their weights.

    `weights` and `chosen` are `[batch, length, active]`. Tokens are ordered by expert, so that
    those of an expert are one group of a grouped product. Over devices, each sorts its own; along
    the `expert` axis of a mesh every device runs the tokens of all through the experts it has.
    """
    if layout is None:
        return _grouped(x, weights, chosen, matrices, activate, 0)
    axes = dict(layout.mesh.shape)
    batch = layout.spec(("batch",), (x.shape[0],))[0]
    rows = () if batch is None else (batch if isinstance(batch, tuple) else (batch,))
    split_experts = axes.get("expert", 1) > 1 and matrices[0].shape[0] % axes["expert"] == 0
    split_hidden = axes.get("tensor", 1) > 1 and matrices[0].shape[2] % axes["tensor"] == 0
    shared = split_experts and "expert" in rows
    token = PartitionSpec(rows or None)
    expert, hidden = "expert" if split_experts else None, "tensor" if split_hidden else None
    specs = [PartitionSpec(expert, None, hidden)] * 2 + [PartitionSpec(expert, hidden, None)]

    def run_on_device(
        x: jax.Array, weights: jax.Array, chosen: jax.Array, *matrices: jax.Array
    ) -> jax.Array:
        first = jax.lax.axis_index("expert") * matrices[0].shape[0] if split_experts else 0
        if shared:
            x, weights, chosen = (
                jax.lax.all_gather(array, "expert", axis=0, tiled=True)
                for array in (x, weights, chosen)
            )
        y = _grouped(x, weights, chosen, matrices, activate, first)
        if split_hidden:
            y = jax.lax.psum(y, "tensor")
        if shared:
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        elif split_experts:
            y = jax.lax.psum(y, "expert")
        return y

    combined: jax.Array = jax.shard_map(
        run_on_device,
        mesh=layout.mesh,
        in_specs=(token, token, token, *specs),
        out_specs=token,
        check_vma=False,
    )(x, weights, chosen, *matrices)
    return combined


def _grouped(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    matrices: Sequence[jax.Array],
    activate: Callable[[jax.Array], jax.Array],
    first: jax.Array | int,
) -> jax.Array:
    """Run tokens through the experts from `first` on; other experts add nothing."""
    gate, up, down = matrices
    count, active = gate.shape[0], chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    rows = tokens[order // active]
    hidden = activate(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    outputs = jax.lax.ragged_dot(hidden, down, sizes)
    # Rows behind the last group are of experts on other devices.
    is_local = jnp.arange(outputs.shape[0]) < jnp.sum(sizes)
    outputs = jnp.where(is_local[:, None], outputs * weights.reshape(-1)[order][:, None], 0)
    summed: jax.Array = jnp.zeros_like(tokens).at[order // active].add(outputs)
    return summed.reshape(x.shape)


def balance_loss(picked: jax.Array, probabilities: jax.Array, counted: jax.Array) -> jax.Array:
    """Return the load-balance loss (Switch Transformers, arXiv:2101.03961, equation 4).

    The mean over layers of `experts * sum(share of choices * mean probability)`, which is 1 where
    all experts get equal shares; `[layers, batch, length, experts]` each, over tokens that are
    `counted` `[batch, length]`.
    """
    counted = counted.astype(jnp.float32)[None, ..., None]
    total = jnp.maximum(jnp.sum(counted), 1.0)
    choices = jnp.sum(picked * counted, axis=(1, 2)) / total
    means = jnp.sum(probabilities * counted, axis=(1, 2)) / total
    share = choices / jnp.maximum(jnp.sum(choices, axis=-1, keepdims=True), 1e-9)
    return jnp.mean(picked.shape[-1] * jnp.sum(share * means, axis=-1))
