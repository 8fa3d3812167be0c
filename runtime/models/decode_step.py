"""Decoding: one token for each slot of the cache, through layers that are written out.

A scan over the layers, as training has it, would slice the weights and the cache of each, which
costs as much as the products do for one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.runtime.models import rope
from tunelang.runtime.models.attention import cached_attention
from tunelang.runtime.models.decoder import RESIDUAL, Decoder
from tunelang.runtime.models.kv_cache import Cache
from tunelang.runtime.models.layers import Block
from tunelang.runtime.models.primitives import Params
from tunelang.runtime.sharding import Layout, constrain


class DecodeWeights(NamedTuple):
    """Weights as `decode_step` reads them: matrices in the dtype of the activations."""

    blocks: tuple[Params, ...]
    """The state of each layer's block."""
    head: jax.Array
    """`[width, vocab]`."""


def decode_weights(decoder: Decoder) -> DecodeWeights:
    """Take the weights of each layer out of the stack.

    Computed ahead of a loop, this is a copy of all of them; within it, slices that a product
    reads in place where the compiler can (XLA on GPU and TPU; on CPU it copies them).
    """
    _, stacked = nnx.split(decoder.blocks)

    def cast_matrix(
        path: tuple[str, ...], variable: nnx.Variable[jax.Array]
    ) -> nnx.Variable[jax.Array]:
        array = variable.get_value()
        matrix = path[-1] == "weight" or path[-2] == "experts"
        if not matrix or not jnp.issubdtype(array.dtype, jnp.floating):
            return variable
        return variable.replace(array.astype(decoder.dtype))

    stacked = nnx.map_state(cast_matrix, stacked)
    blocks = tuple(
        jax.tree.map(lambda array, index=index: array[index], stacked)
        for index in range(decoder.architecture.layers)
    )
    return DecodeWeights(blocks, decoder.head_weight().astype(decoder.dtype).T)


def decode_step(
    decoder: Decoder,
    tokens: jax.Array,
    cache: Cache,
    weights: DecodeWeights,
    *,
    layout: Layout | None = None,
) -> tuple[jax.Array, Cache]:
    """Append one token to each slot: `tokens` `[slots]` to hidden states `[slots, width]`.

    Each token goes to its slot's own position, `cache.lengths`; those of the returned cache are
    one greater. A full slot keeps its cache, and its hidden state is wrong.
    """
    positions = cache.lengths
    slots = jnp.arange(tokens.shape[0])
    rotations = rope.rotations(decoder.architecture, positions[:, None])
    graph, _ = nnx.split(decoder.blocks)
    x = decoder.embed(tokens[:, None], positions[:, None], None, layout)
    layers: list[tuple[jax.Array, jax.Array]] = []
    for span, state, *cached in zip(
        decoder.architecture.spans, weights.blocks, cache.keys, cache.values, strict=True
    ):

        def attend(
            query: jax.Array,
            key: jax.Array,
            value: jax.Array,
            local: bool = span == "local",
            cached: Sequence[jax.Array] = cached,
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            keys, values = cached
            keys = keys.at[slots, :, :, positions].set(key[:, 0].astype(keys.dtype))
            values = values.at[slots, :, positions].set(value[:, 0].astype(values.dtype))
            attended = cached_attention(
                query,
                keys.astype(query.dtype),
                values.astype(query.dtype),
                positions,
                window=decoder.window(local),
                scale=decoder.query_scale,
                cap=decoder.architecture.attention_cap,
            )
            return attended, (keys, values)

        block: Block = nnx.merge(graph, state)
        rotation = rope.layer_rotation(rotations, span == "local")
        x, layer, _ = block(x, rotation, attend, None, layout)
        x = constrain(layout, x, RESIDUAL)
        layers.append(layer)
    keys, values = zip(*layers, strict=True)
    return decoder.norm(x)[:, 0], Cache(keys, values, positions + 1)
