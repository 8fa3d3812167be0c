"""The parts of a transformer block: projections, normalisation, attention heads, feed-forward.

Every parameter has a name for each of its axes and is used in the dtype of its input. What is
trained is in float32; frozen matrices may be in less. Weights are drawn so that each output starts
with the variance of its input, and those that write to the residual stream are smaller by
`sqrt(2 * layers)` (GPT-2), so that its variance does not grow with depth. None starts at zero,
except biases and one half of each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.lora import column_norms, make_adapters
from tunelang.runtime.models.matmul import product
from tunelang.runtime.models.moe import MixtureOfExperts
from tunelang.runtime.models.primitives import (
    ACTIVATIONS,
    DTYPES,
    Parameter,
    add_leading_axes,
    dropout,
    normal,
    parameter,
    recompute_in_backward,
    with_value,
)
from tunelang.runtime.models.quantization import dequantized, frozen_product, quantized
from tunelang.runtime.models.rope import Rotation, rotate
from tunelang.runtime.sharding import Layout

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, PyTree]]
"""`(query, key, value) -> (attended, extra)`: attention with or without a cache."""


class Linear(nnx.Module):
    """A linear layer, `x @ weight + bias`.

    The last axes of `x` are contracted with the `inputs` of the weight. The architecture's
    adapters whose matrices include `path` are added.
    """

    def __init__(
        self,
        architecture: Architecture,
        path: str,
        rngs: nnx.Rngs,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool = False,
        gain: float = 1.0,
    ) -> None:
        fan_in = math.prod(inputs.values())
        shape = (*inputs.values(), *outputs.values())
        axes = (*inputs, *outputs)
        self.contracted = len(inputs)
        weight = normal(rngs, shape, gain * fan_in**-0.5)
        if architecture.storage in ("nf4", "int8"):
            weight, scales = quantized(weight, self.contracted, architecture.storage)
            self.scales: Parameter | None = parameter(scales, *axes)
        else:
            weight = weight.astype(DTYPES[architecture.storage])
            self.scales = None
        self.weight: Parameter = parameter(weight, *axes)
        self.bias = (
            parameter(jnp.zeros(tuple(outputs.values()), jnp.float32), *outputs) if bias else None
        )
        self.adapters = make_adapters(architecture, path, rngs, inputs, outputs)

    def matrix(self, dtype: DTypeLike) -> jax.Array:
        """Return the weight without adapters."""
        if self.scales is None:
            return self.weight[...].astype(dtype)
        return dequantized(self.weight[...], self.scales[...], self.contracted, dtype)

    def merged_weight(self, last: str | None = None) -> jax.Array:
        """Return the weight with its adapters, float32; up to the one called `last`, whose
        magnitudes are left out.
        """
        weight = self.matrix(jnp.float32)
        for name, adapter in self.adapters.items():
            weight = weight + adapter.update()
            if name == last:
                break
            if adapter.magnitude is not None:
                weight = weight * add_leading_axes(adapter.stretch(weight), weight.ndim)
        return weight

    def merge_adapters(self) -> None:
        """Put the adapters into the weight."""
        self.weight = with_value(self.weight, self.merged_weight())
        self.scales, self.adapters = None, nnx.Dict()

    def set_magnitudes(self) -> None:
        """Set the magnitudes of the last adapter to the lengths of the matrix that it is on."""
        for name, adapter in self.adapters.items():
            if adapter.magnitude is not None:
                adapter.magnitude[...] = column_norms(self.merged_weight(name), self.contracted)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None, place: int = 0) -> jax.Array:
        """Map `[batch, length, *inputs]` to `[batch, length, *outputs]`.

        `keys` `[batch]` turn on the adapters' dropout; `place` sets it apart from that of others.
        """
        if self.scales is None:
            y = _converted_product(x, self.weight[...], self.contracted)
        else:
            y = frozen_product(x, self.weight[...], self.scales[...], self.contracted)
        for name, adapter in self.adapters.items():
            y = y + adapter(x, keys, place)
            if adapter.magnitude is not None:
                stretch = adapter.stretch(self.merged_weight(name)).astype(y.dtype)
                y = y * add_leading_axes(stretch, y.ndim)
        if self.bias is None:
            return y
        return y + add_leading_axes(self.bias[...].astype(x.dtype), y.ndim)


def _converted_product(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """Multiply with a weight of another dtype, which the backward pass converts again."""
    if weight.dtype == x.dtype:
        return product(x, weight, contracted)
    # Else the converted weights of all layers are kept for the backward pass. For the gain see
    # `recompute_in_backward`. Delete when XLA converts again, in a scan, rather than keep a copy.
    convert = jax.checkpoint(
        lambda x, weight: product(x, weight.astype(x.dtype), contracted), prevent_cse=False
    )
    result: jax.Array = convert(x, weight)
    return result


class Norm(nnx.Module):
    """RMS normalisation (arXiv:1910.07467) or layer normalisation (arXiv:1607.06450)."""

    def __init__(self, architecture: Architecture, **sizes: int) -> None:
        """Make a norm over axes of these sizes, by name."""
        shape = tuple(sizes.values())
        self.centred = architecture.norm == "layer"
        self.epsilon = architecture.norm_epsilon
        self.offset = 1.0 if architecture.norm_unit_offset else 0.0
        self.scale = parameter(jnp.full(shape, 1.0 - self.offset, jnp.float32), *sizes)
        self.bias = parameter(jnp.zeros(shape, jnp.float32), *sizes) if self.centred else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise over the last axes, in float32; shape and dtype stay."""
        axes = tuple(range(-self.scale.ndim, 0))

        def normalised(x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
            y = x.astype(jnp.float32)
            if self.centred:
                y = y - jnp.mean(y, axis=axes, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + self.epsilon)
            y = y * add_leading_axes(scale + self.offset, y.ndim)
            return (y if bias is None else y + add_leading_axes(bias, y.ndim)).astype(x.dtype)

        bias = None if self.bias is None else self.bias[...]
        return recompute_in_backward(normalised, x, self.scale[...], bias)


class Attention(nnx.Module):
    """The projections around attention; the call says how heads attend."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        embed = {"embed": a.width}
        queries = {"heads": a.heads, "head_dim": a.head_dim}
        keys = {"kv_heads": a.kv_heads, "head_dim": a.head_dim}
        inside = "blocks.attention"
        self.q = Linear(a, f"{inside}.q", rngs, embed, queries, bias=a.qkv_bias)
        self.k = Linear(a, f"{inside}.k", rngs, embed, keys, bias=a.qkv_bias)
        self.v = Linear(a, f"{inside}.v", rngs, embed, keys, bias=a.qkv_bias)
        self.o = Linear(
            a, f"{inside}.o", rngs, queries, embed, bias=a.output_bias, gain=(2 * a.layers) ** -0.5
        )
        query_sizes = queries if a.qk_norm_joint else {"head_dim": a.head_dim}
        key_sizes = keys if a.qk_norm_joint else {"head_dim": a.head_dim}
        self.q_norm = Norm(a, **query_sizes) if a.qk_norm else None
        self.k_norm = Norm(a, **key_sizes) if a.qk_norm else None

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: Attend, keys: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        """Map `[batch, length, width]` to the same; returns the further output of `attend` too."""
        query, key, value = self.q(x, keys, 2), self.k(x, keys, 3), self.v(x, keys, 4)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        attended, extra = attend(query, key, value)
        return self.o(attended, keys, 5), extra


class FeedForward(nnx.Module):
    """Two projections with an activation between them, or three where it is gated."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        embed, hidden = {"embed": a.width}, {"mlp": a.mlp}
        self.activation = a.activation
        inside = "blocks.mlp"
        self.gate = (
            Linear(a, f"{inside}.gate", rngs, embed, hidden, bias=a.mlp_bias) if a.gated else None
        )
        self.up = Linear(a, f"{inside}.up", rngs, embed, hidden, bias=a.mlp_bias)
        self.down = Linear(
            a, f"{inside}.down", rngs, hidden, embed, bias=a.mlp_bias, gain=(2 * a.layers) ** -0.5
        )

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Map `[batch, length, width]` to the same."""
        activate = ACTIVATIONS[self.activation]
        up = self.up(x, keys, 6)
        if self.gate is None:
            hidden = recompute_in_backward(activate, up)
        else:
            gate = self.gate(x, keys, 7)
            hidden = recompute_in_backward(lambda gate, up: activate(gate) * up, gate, up)
        return self.down(hidden, keys, 8)


class Block(nnx.Module):
    """Attention and feed-forward, each normalised and added to the residual stream."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        norm_inputs, norm_outputs = a.norm_placement != "post", a.norm_placement != "pre"
        self.dropout = a.dropout
        self.attention = Attention(a, rngs)
        self.mlp = (
            FeedForward(a, rngs) if a.experts is None else MixtureOfExperts(a, a.experts, rngs)
        )
        self.attention_norm = Norm(a, embed=a.width) if norm_inputs else None
        self.mlp_norm = Norm(a, embed=a.width) if norm_inputs else None
        self.attention_out_norm = Norm(a, embed=a.width) if norm_outputs else None
        self.mlp_out_norm = Norm(a, embed=a.width) if norm_outputs else None

    def __call__(
        self,
        x: jax.Array,
        rotation: Rotation | None,
        attend: Attend,
        keys: jax.Array | None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, PyTree, tuple[jax.Array, jax.Array] | None]:
        """Map `[batch, length, width]` to the same.

        Returns the further output of `attend` too, and where there are experts the inputs of
        `moe.balance_loss`.

        `keys` `[batch]` are random keys for dropout; without them there is none.
        """
        y = x if self.attention_norm is None else self.attention_norm(x)
        y, extra = self.attention(y, rotation, attend, keys)
        y = y if self.attention_out_norm is None else self.attention_out_norm(y)
        x = x + dropout(y, keys, self.dropout, 0)
        y = x if self.mlp_norm is None else self.mlp_norm(x)
        routing: tuple[jax.Array, jax.Array] | None = None
        if isinstance(self.mlp, FeedForward):
            y = self.mlp(y, keys)
        else:
            y, routing = self.mlp(y, layout)
        y = y if self.mlp_out_norm is None else self.mlp_out_norm(y)
        return x + dropout(y, keys, self.dropout, 1), extra, routing

    @property
    def linears(self) -> list[Linear]:
        """The linear layers of the block."""
        modules = (*vars(self.attention).values(), *vars(self.mlp).values())
        return [module for module in modules if isinstance(module, Linear)]
