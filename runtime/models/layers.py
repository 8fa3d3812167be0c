"""The parts of a transformer block: projections, normalisation, attention heads, feed-forward.

Every parameter has a name for each of its axes and is used in the dtype of its input. What is
trained is in float32; frozen matrices may be in less. Weights are drawn so that each output starts
with the variance of its input, and those that write to the residual stream are smaller by
`sqrt(2 * layers)` (GPT-2), so that its variance does not grow with depth. None starts at zero,
except biases and one half of each adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tunelang.compiler.models.architecture import Adapter, Architecture, Mixture
from tunelang.runtime.models.matmul import product
from tunelang.runtime.models.quantization import dequantized, frozen_product, quantized
from tunelang.runtime.models.rope import Rotation, rotate
from tunelang.runtime.sharding import Layout, constrain

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`(query, key, value) -> (attended, extra)`: attention with or without a cache."""


DTYPES: dict[str, Any] = {"f32": jnp.float32, "bf16": jnp.bfloat16}
"""The language's word for a precision -> dtype."""


Parameter = nnx.Param[jax.Array]


def replaced(variable: Parameter, value: jax.Array) -> Parameter:
    """Return a parameter with another value and the same names."""
    return cast(Parameter, variable.replace(value))


def parameter(value: jax.Array, *axes: str) -> Parameter:
    """Make a parameter with a logical name for each of its axes."""
    # The names are resolved by `sharding.Layout`, not by flax, which would want a mesh here.
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> jax.Array:
    """Draw normal float32 numbers with this standard deviation."""
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


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
        self.a = parameter(drawn, *inputs, "rank")
        self.b = parameter(jnp.zeros((adapter.rank, *outputs.values())), "rank", *outputs)
        lengths = jnp.ones(tuple(outputs.values())) if adapter.magnitudes else None
        self.magnitude = None if lengths is None else parameter(lengths, *outputs)

    def update(self) -> jax.Array:
        """Return the update of the matrix, float32, without magnitudes."""
        return self.scale * product(self.a[...], self.b[...])

    def stretch(self, weight: jax.Array) -> jax.Array:
        """Return the factor `[*outputs]` of the columns of an updated matrix."""
        assert self.magnitude is not None
        # A constant to the gradient (section 4.3).
        return self.magnitude[...] / lengths_of(jax.lax.stop_gradient(weight), self.contracted)

    def __call__(self, x: jax.Array, keys: jax.Array | None, place: int) -> jax.Array:
        """`[batch, length, *inputs]` to what is added to the matrix's `[batch, length, *outputs]`.

        `keys` and `place` are those of `dropout`.
        """
        x = dropout(x, keys, self.dropout, place)
        low = product(x, self.a[...].astype(x.dtype), self.contracted)
        return self.scale * product(low, self.b[...].astype(x.dtype))


def lengths_of(weight: jax.Array, inputs: int) -> jax.Array:
    """Return the lengths `[*outputs]` of the columns of `[*inputs, *outputs]`."""
    squares = jnp.square(weight.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(squares, axis=tuple(range(inputs))))


class Linear(nnx.Module):
    """`x @ weight + bias`, contracting the last axes of `x` with the `inputs` of the weight.

    Adapters of the architecture that are on its matrix, whose `path` they name, are added.
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
        self.adapters = adapters_on(architecture, path, rngs, inputs, outputs)

    def matrix(self, dtype: Any) -> jax.Array:
        """Return the weight without adapters."""
        if self.scales is None:
            return self.weight[...].astype(dtype)
        return dequantized(self.weight[...], self.scales[...], self.contracted, dtype)

    def merged(self, last: str | None = None) -> jax.Array:
        """Return the weight with its adapters, float32; up to the one called `last`, whose
        magnitudes are left out.
        """
        weight = self.matrix(jnp.float32)
        for name, adapter in self.adapters.items():
            weight = weight + adapter.update()
            if name == last:
                break
            if adapter.magnitude is not None:
                weight = weight * adapter.stretch(weight)
        return weight

    def fold(self) -> None:
        """Put the adapters into the weight."""
        self.weight = replaced(self.weight, self.merged())
        self.scales, self.adapters = None, nnx.Dict()

    def measure(self) -> None:
        """Set the magnitudes of the last adapter to the lengths of the matrix that it is on."""
        for name, adapter in self.adapters.items():
            if adapter.magnitude is not None:
                adapter.magnitude[...] = lengths_of(self.merged(name), self.contracted)

    def __call__(self, x: jax.Array, keys: jax.Array | None = None, place: int = 0) -> jax.Array:
        """`[batch, length, *inputs]` to `[batch, length, *outputs]`.

        `keys` `[batch]` turn on the adapters' dropout; `place` sets it apart from that of others.
        """
        if self.scales is None:
            y = _converted_product(x, self.weight[...], self.contracted)
        else:
            y = frozen_product(x, self.weight[...], self.scales[...], self.contracted)
        for name, adapter in self.adapters.items():
            y = y + adapter(x, keys, place)
            if adapter.magnitude is not None:
                y = y * adapter.stretch(self.merged(name)).astype(y.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def adapters_on(
    architecture: Architecture,
    path: str,
    rngs: nnx.Rngs,
    inputs: dict[str, int],
    outputs: dict[str, int],
) -> nnx.Dict[LowRank]:
    """Make the adapters of a matrix, each by its place among those of the architecture."""
    found = {
        str(place): LowRank(rngs, adapter, inputs, outputs)
        for place, adapter in enumerate(architecture.adapters)
        if path in adapter.matrices
    }
    return nnx.Dict(found)


def _recomputed(function: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """Call an elementwise function of which the backward pass keeps the arguments alone: what is
    inside is quick to compute again, and in float32 takes more memory than all else of a layer.
    """
    found: jax.Array = jax.checkpoint(function, prevent_cse=False)(*arguments)
    return found


def _converted_product(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    """`product` with a weight of another dtype, of which the backward pass converts the original
    again: the converted ones of all layers would be kept beside them.
    """
    if weight.dtype == x.dtype:
        return product(x, weight, contracted)
    convert = jax.checkpoint(
        lambda x, weight: product(x, weight.astype(x.dtype), contracted), prevent_cse=False
    )
    found: jax.Array = convert(x, weight)
    return found


class Norm(nnx.Module):
    """RMS normalisation (arXiv:1910.07467) or layer normalisation (arXiv:1607.06450)."""

    def __init__(self, architecture: Architecture, **sizes: int) -> None:
        """`sizes` are the axes to normalise over, by name."""
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
            y = y * (scale + self.offset)
            return (y if bias is None else y + bias).astype(x.dtype)

        bias = None if self.bias is None else self.bias[...]
        return _recomputed(normalised, x, self.scale[...], bias)


class Attention(nnx.Module):
    """The projections around attention; how heads attend is given at the call."""

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
        of_queries = queries if a.qk_norm_joint else {"head_dim": a.head_dim}
        of_keys = keys if a.qk_norm_joint else {"head_dim": a.head_dim}
        self.q_norm = Norm(a, **of_queries) if a.qk_norm else None
        self.k_norm = Norm(a, **of_keys) if a.qk_norm else None

    def __call__(
        self, x: jax.Array, turn: Rotation | None, attend: Attend, keys: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """`[batch, length, width]` to the same, and what `attend` returns beside its result."""
        query, key, value = self.q(x, keys, 2), self.k(x, keys, 3), self.v(x, keys, 4)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        attended, extra = attend(query, key, value)
        return self.o(attended, keys, 5), extra


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
        inside = "blocks.mlp"
        self.gate = (
            Linear(a, f"{inside}.gate", rngs, embed, hidden, bias=a.mlp_bias) if a.gated else None
        )
        self.up = Linear(a, f"{inside}.up", rngs, embed, hidden, bias=a.mlp_bias)
        self.down = Linear(
            a, f"{inside}.down", rngs, hidden, embed, bias=a.mlp_bias, gain=(2 * a.layers) ** -0.5
        )

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """`[batch, length, width]` to the same."""
        activate = _ACTIVATIONS[self.activation]
        up = self.up(x, keys, 6)
        if self.gate is None:
            hidden = _recomputed(activate, up)
        else:
            gate = self.gate(x, keys, 7)
            hidden = _recomputed(lambda gate, up: activate(gate) * up, gate, up)
        return self.down(hidden, keys, 8)


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
        """`[batch, length, width]` to the same, and of each token what the load-balance loss reads:
        how many of its experts each one is, and the router's probabilities, `[..., experts]`.
        """
        mixture = self.mixture
        logits = jnp.matmul(x.astype(jnp.float32), self.router[...])
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, mixture.active)
        if mixture.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        matrices = [
            constrain(layout, each[...].astype(x.dtype), axes)
            for each, axes in (
                (self.experts.gate, ("expert", None, "mlp")),
                (self.experts.up, ("expert", None, "mlp")),
                (self.experts.down, ("expert", "mlp", None)),
            )
        ]
        activate = _ACTIVATIONS[self.activation]
        y = mixed(x, weights.astype(x.dtype), chosen, matrices, activate, layout)
        picked = jnp.sum(jax.nn.one_hot(chosen, mixture.count, dtype=jnp.float32), axis=-2)
        return y, (picked, probabilities)


def mixed(
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
    along = axes.get("expert", 1) > 1 and matrices[0].shape[0] % axes["expert"] == 0
    across = axes.get("tensor", 1) > 1 and matrices[0].shape[2] % axes["tensor"] == 0
    shared = along and "expert" in rows
    token = PartitionSpec(rows or None)
    one, two = "expert" if along else None, "tensor" if across else None
    specs = [PartitionSpec(one, None, two)] * 2 + [PartitionSpec(one, two, None)]

    def own(x: jax.Array, weights: jax.Array, chosen: jax.Array, *matrices: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("expert") * matrices[0].shape[0] if along else 0
        if shared:
            x, weights, chosen = (
                jax.lax.all_gather(each, "expert", axis=0, tiled=True)
                for each in (x, weights, chosen)
            )
        y = _grouped(x, weights, chosen, matrices, activate, first)
        if across:
            y = jax.lax.psum(y, "tensor")
        if shared:
            y = jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
        elif along:
            y = jax.lax.psum(y, "expert")
        return y

    spread: jax.Array = jax.shard_map(
        own,
        mesh=layout.mesh,
        in_specs=(token, token, token, *specs),
        out_specs=token,
        check_vma=False,
    )(x, weights, chosen, *matrices)
    return spread


def _grouped(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    matrices: Sequence[jax.Array],
    activate: Callable[[jax.Array], jax.Array],
    first: jax.Array | int,
) -> jax.Array:
    """`mixed` for the experts from `first` on; others' tokens add nothing."""
    gate, up, down = matrices
    count, active = gate.shape[0], chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    expert = chosen.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    own = tokens[order // active]
    hidden = activate(jax.lax.ragged_dot(own, gate, sizes)) * jax.lax.ragged_dot(own, up, sizes)
    made = jax.lax.ragged_dot(hidden, down, sizes)
    # Rows behind the last group are of experts that are elsewhere.
    there = jnp.arange(made.shape[0]) < jnp.sum(sizes)
    made = jnp.where(there[:, None], made * weights.reshape(-1)[order][:, None], 0)
    summed: jax.Array = jnp.zeros_like(tokens).at[order // active].add(made)
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


class Block(nnx.Module):
    """Attention and feed-forward, each normalised and added to the residual stream."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs) -> None:
        a = architecture
        before, after = a.norm_placement != "post", a.norm_placement != "pre"
        self.dropout = a.dropout
        self.attention = Attention(a, rngs)
        self.mlp = (
            FeedForward(a, rngs) if a.experts is None else MixtureOfExperts(a, a.experts, rngs)
        )
        self.attention_norm = Norm(a, embed=a.width) if before else None
        self.mlp_norm = Norm(a, embed=a.width) if before else None
        self.attention_out_norm = Norm(a, embed=a.width) if after else None
        self.mlp_out_norm = Norm(a, embed=a.width) if after else None

    def __call__(
        self,
        x: jax.Array,
        turn: Rotation | None,
        attend: Attend,
        keys: jax.Array | None,
        layout: Layout | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """`[batch, length, width]` to the same; what `attend` returns beside its result; what the
        load-balance loss reads, where there are experts.

        `keys` `[batch]` are random keys for dropout; without them there is none.
        """
        y = x if self.attention_norm is None else self.attention_norm(x)
        y, extra = self.attention(y, turn, attend, keys)
        y = y if self.attention_out_norm is None else self.attention_out_norm(y)
        x = x + dropout(y, keys, self.dropout, 0)
        y = x if self.mlp_norm is None else self.mlp_norm(x)
        routed: Any = None
        if isinstance(self.mlp, FeedForward):
            y = self.mlp(y, keys)
        else:
            y, routed = self.mlp(y, layout)
        y = y if self.mlp_out_norm is None else self.mlp_out_norm(y)
        return x + dropout(y, keys, self.dropout, 1), extra, routed

    @property
    def linears(self) -> list[Linear]:
        """Its matrices."""
        found = (each for part in (self.attention, self.mlp) for each in vars(part).values())
        return [each for each in found if isinstance(each, Linear)]


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
