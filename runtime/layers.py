"""The parts of a transformer block: projections, normalisation, attention heads, feed-forward.

Every parameter is stored in float32 with a name for each of its axes, and used in the dtype of
its input. Weights are drawn so that each output starts with the variance of its input, and those
that write to the residual stream are smaller by `sqrt(2 * layers)` (GPT-2), so that its variance
does not grow with depth. None starts at zero, except biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.compiler.architecture import Architecture
from tunelang.runtime.products import product
from tunelang.runtime.rope import Rotation, rotate

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`(query, key, value) -> (attended, extra)`: attention with or without a cache."""


def parameter(value: jax.Array, *axes: str) -> nnx.Param[jax.Array]:
    """Make a parameter with a logical name for each of its axes."""
    # The names are resolved by `sharding.Layout`, not by flax, which would want a mesh here.
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> jax.Array:
    """Draw normal float32 numbers with this standard deviation."""
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


class Linear(nnx.Module):
    """`x @ weight + bias`, contracting the last axes of `x` with the `inputs` of the weight."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool = False,
        gain: float = 1.0,
    ) -> None:
        fan_in = math.prod(inputs.values())
        shape = (*inputs.values(), *outputs.values())
        self.contracted = len(inputs)
        self.weight = parameter(normal(rngs, shape, gain * fan_in**-0.5), *inputs, *outputs)
        self.bias = (
            parameter(jnp.zeros(tuple(outputs.values()), jnp.float32), *outputs) if bias else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, length, *inputs]` to `[batch, length, *outputs]`."""
        y = product(x, self.weight[...].astype(x.dtype), self.contracted)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMS normalisation (arXiv:1910.07467) or layer normalisation (arXiv:1607.06450)."""

    def __init__(self, architecture: Architecture, size: int, axis: str) -> None:
        self.centred = architecture.norm == "layer"
        self.epsilon = architecture.norm_epsilon
        self.offset = 1.0 if architecture.norm_unit_offset else 0.0
        self.scale = parameter(jnp.full((size,), 1.0 - self.offset, jnp.float32), axis)
        self.bias = parameter(jnp.zeros((size,), jnp.float32), axis) if self.centred else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise over the last axis, in float32; shape and dtype stay."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        y = y * (self.scale[...] + self.offset)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


class Attention(nnx.Module):
    """The projections around attention; how heads attend is given at the call."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        embed = {"embed": a.width}
        queries = {"heads": a.heads, "head_dim": a.head_dim}
        keys = {"kv_heads": a.kv_heads, "head_dim": a.head_dim}
        self.q = Linear(rngs, embed, queries, bias=a.qkv_bias)
        self.k = Linear(rngs, embed, keys, bias=a.qkv_bias)
        self.v = Linear(rngs, embed, keys, bias=a.qkv_bias)
        self.o = Linear(rngs, queries, embed, bias=a.output_bias, gain=(2 * a.layers) ** -0.5)
        self.q_norm = Norm(a, a.head_dim, "head_dim") if a.qk_norm else None
        self.k_norm = Norm(a, a.head_dim, "head_dim") if a.qk_norm else None

    def __call__(
        self, x: jax.Array, turn: Rotation | None, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """`[batch, length, width]` to the same, and what `attend` returns beside its result."""
        query, key, value = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        attended, extra = attend(query, key, value)
        return self.o(attended), extra


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}
"""The GELU is its tanh approximation, as Gemma and GPT-2 have it."""


class FeedForward(nnx.Module):
    """Two projections with an activation between them, or three where it is gated."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        embed, hidden = {"embed": a.width}, {"mlp": a.mlp}
        self.activation = a.activation
        self.gate = Linear(rngs, embed, hidden, bias=a.mlp_bias) if a.gated else None
        self.up = Linear(rngs, embed, hidden, bias=a.mlp_bias)
        self.down = Linear(rngs, hidden, embed, bias=a.mlp_bias, gain=(2 * a.layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, length, width]` to the same."""
        activate = _ACTIVATIONS[self.activation]
        up = self.up(x)
        return self.down(activate(up) if self.gate is None else activate(self.gate(x)) * up)


class Block(nnx.Module):
    """Attention and feed-forward, each normalised and added to the residual stream."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        before, after = a.norm_placement != "post", a.norm_placement != "pre"
        self.dropout = a.dropout
        self.attention = Attention(a, rngs)
        self.mlp = FeedForward(a, rngs)
        self.attention_norm = Norm(a, a.width, "embed") if before else None
        self.mlp_norm = Norm(a, a.width, "embed") if before else None
        self.attention_out_norm = Norm(a, a.width, "embed") if after else None
        self.mlp_out_norm = Norm(a, a.width, "embed") if after else None

    def __call__(
        self, x: jax.Array, turn: Rotation | None, attend: Attend, keys: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """`[batch, length, width]` to the same, and what `attend` returns beside its result.

        `keys` `[batch]` are random keys for dropout; without them there is none.
        """
        y = x if self.attention_norm is None else self.attention_norm(x)
        y, extra = self.attention(y, turn, attend)
        y = y if self.attention_out_norm is None else self.attention_out_norm(y)
        x = x + dropout(y, keys, self.dropout, 0)
        y = self.mlp(x if self.mlp_norm is None else self.mlp_norm(x))
        y = y if self.mlp_out_norm is None else self.mlp_out_norm(y)
        return x + dropout(y, keys, self.dropout, 1), extra


def dropout(x: jax.Array, keys: jax.Array | None, rate: float, place: int) -> jax.Array:
    """Zero a share `rate` of `[batch, ...]` and scale up the rest (Srivastava et al. 2014).

    Each row has a random key of its own (`keys` `[batch]`), so that the result does not depend on
    which rows share a micro-batch; `place` sets apart the uses of a key. Without keys, `x`.
    """
    if keys is None or rate == 0.0:
        return x
    kept = jax.vmap(
        lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - rate, x.shape[1:])
    )(keys)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
