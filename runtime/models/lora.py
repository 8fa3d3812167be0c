"""Adapters: low-rank updates of frozen matrices."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.compiler.models.architecture import Adapter, Architecture
from tunelang.runtime.models.matmul import product
from tunelang.runtime.models.primitives import Parameter, dropout, parameter


class LowRank(nnx.Module):
    """An update `scale * a @ b` of a matrix (LoRA, arXiv:2106.09685), zero at first.

    With magnitudes, the columns of the updated matrix are scaled to learned lengths, those of the
    matrix at first (DoRA, arXiv:2402.09353).
    """

    def __init__(
        self, rngs: nnx.Rngs, adapter: Adapter, inputs: dict[str, int], outputs: dict[str, int]
    ) -> None:
        self.scale, self.dropout = adapter.scale, adapter.dropout
        bound = math.prod(inputs.values()) ** -0.5
        shape = (*inputs.values(), adapter.rank)
        drawn = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        self.contracted = len(inputs)
        zeros = jnp.zeros((adapter.rank, *outputs.values()))
        self.a = parameter(drawn, *inputs, "rank", kind=nnx.LoRAParam)
        self.b = parameter(zeros, "rank", *outputs, kind=nnx.LoRAParam)
        ones = jnp.ones(tuple(outputs.values()))
        self.magnitude = (
            parameter(ones, *outputs, kind=nnx.LoRAParam) if adapter.magnitudes else None
        )

    def update(self) -> jax.Array:
        """Return the update of the matrix, float32, without magnitudes."""
        return self.scale * product(self.a[...], self.b[...])

    def stretch(self, weight: jax.Array) -> jax.Array:
        """Return the factor `[*outputs]` of the columns of an updated matrix."""
        assert self.magnitude is not None
        # A constant to the gradient (section 4.3).
        return self.magnitude[...] / column_norms(jax.lax.stop_gradient(weight), self.contracted)

    def __call__(self, x: jax.Array, keys: jax.Array | None, place: int) -> jax.Array:
        """Map `[batch, length, *inputs]` to the addend of the matrix's `[batch, length, *outputs]`.

        `keys` and `place` are those of `dropout`.
        """
        x = dropout(x, keys, self.dropout, place)
        low = product(x, self.a[...].astype(x.dtype), self.contracted)
        return self.scale * product(low, self.b[...].astype(x.dtype))


def column_norms(weight: jax.Array, inputs: int) -> jax.Array:
    """Return the lengths `[*outputs]` of the columns of `[*inputs, *outputs]`."""
    squares = jnp.square(weight.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(squares, axis=tuple(range(inputs))))


def make_adapters(
    architecture: Architecture,
    path: str,
    rngs: nnx.Rngs,
    inputs: dict[str, int],
    outputs: dict[str, int],
) -> nnx.Dict[LowRank]:
    """Make the adapters of a matrix, each by its place among those of the architecture."""
    adapters = {
        str(place): LowRank(rngs, adapter, inputs, outputs)
        for place, adapter in enumerate(architecture.adapters)
        if path in adapter.matrices
    }
    return nnx.Dict(adapters)


def with_updates(table: Parameter, adapters: nnx.Dict[LowRank]) -> jax.Array:
    """Return a table with the updates of its adapters."""
    weight: jax.Array = table[...]
    for adapter in adapters.values():
        weight = weight.astype(jnp.float32) + adapter.update()
    return weight
