"""The decoder: one network for every architecture, to train, to score and to sample with.

Blocks are stacked: each parameter of a block has a leading axis `layers`, and the layers are run
by a scan, so that the size of the program does not grow with depth. An architecture whose layers
repeat a pattern (local and global attention) is scanned layer by layer as well, where the mask may
be computed; kernels that have to know it beforehand make the scan one over whole periods, with the
layers of a period written out in the body, and what is left of the last period behind it. Only
`step` writes out all layers: for one token, the slices of weights and cache that a scan makes cost
as much as the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tunelang.compiler.models.architecture import Architecture, Span, plain
from tunelang.runtime.models import rope
from tunelang.runtime.models.attention import (
    Kernel,
    Window,
    attention_maps,
    cached_attention,
    prefixed_attention,
    self_attention,
)
from tunelang.runtime.models.layers import (
    DTYPES,
    Block,
    LowRank,
    Norm,
    Parameter,
    adapters_on,
    dropout,
    normal,
    parameter,
    replaced,
)
from tunelang.runtime.models.matmul import product
from tunelang.runtime.sharding import Layout, constrain

Remat = Literal["none", "dots", "full"]
RESIDUAL = ("batch", "length", None)
"""Logical axes of the residual stream."""
SHARED = ("shared", None, "embed")
"""Those of what is looked up for the tokens of all devices that split a table's rows."""
KEYS = ("batch", "kv_heads", "head_dim", None)
"""Logical axes of a layer's cached keys."""
VALUES = ("batch", "kv_heads", None, "head_dim")
"""Logical axes of a layer's cached values."""
Local = bool | jax.Array
"""Whether a layer attends within a window; computed where one program is for several layers."""
_UNBOUNDED = 2**30
"""A window that holds every sequence."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in slots that may be at different positions."""

    keys: tuple[jax.Array, ...]
    """Of each layer `[slots, kv_heads, head_dim, capacity]`, already rotated. Both products of
    attention then read a matrix as it lies."""
    values: tuple[jax.Array, ...]
    """Of each layer `[slots, kv_heads, capacity, head_dim]`."""
    lengths: jax.Array
    """`[slots]` int32: how many tokens of each slot are filled in; the rest is meaningless."""


class Unstacked(NamedTuple):
    """Weights as `Decoder.step` reads them: matrices in the dtype of the activations."""

    blocks: tuple[Any, ...]
    """Of each layer the state of its block."""
    head: jax.Array
    """`[width, vocab]`."""


class Decoder(nnx.Module):
    """A decoder-only transformer: tokens to hidden states, to logits, one token at a time.

    Parameters are float32, and frozen matrices as the architecture's `storage` says; activations
    have `dtype`, float32 or bfloat16.
    """

    def __init__(
        self, architecture: Architecture, rngs: nnx.Rngs, dtype: Any = jnp.float32
    ) -> None:
        a = architecture
        self.architecture = a
        self.dtype = dtype

        @nnx.split_rngs(splits=a.layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(a, rngs)

        # With this deviation, the logits of a tied head start with variance 1. Where embeddings
        # are scaled up by `sqrt(width)`, they then enter with variance 1 as well.
        deviation = a.width**-0.5
        stored = DTYPES.get(a.storage, dtype)
        vocabulary, width = {"vocab": a.vocabulary}, {"embed": a.width}
        table = normal(rngs, (a.vocabulary, a.width), deviation).astype(stored)
        self.embedding = parameter(table, "vocab", "embed")
        self.embedding_adapters = adapters_on(a, "embedding", rngs, vocabulary, width)
        self.positions = (
            parameter(normal(rngs, (a.context, a.width), deviation), "position", "embed")
            if a.position == "learned"
            else None
        )
        self.blocks = stacked(rngs)
        self.norm = Norm(a, embed=a.width)
        self.head = (
            None
            if a.tied or a.scores
            else parameter(
                normal(rngs, (a.vocabulary, a.width), deviation).astype(stored), "vocab", "embed"
            )
        )
        self.head_adapters = adapters_on(a, "head", rngs, vocabulary, width)
        self.score = parameter(normal(rngs, (a.width,), deviation), "embed") if a.scores else None

    def __call__(self, tokens: jax.Array, **given: Any) -> jax.Array:
        """Hidden states `[batch, length, width]` after the last normalisation; see `routed`."""
        return self.routed(tokens, **given)[0]

    def routed(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        positions: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        layout: Layout | None = None,
        remat: Remat = "none",
        kernel: Kernel = "xla",
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Return the hidden states, and where there are experts what `layers.balance_loss` reads,
        of each layer.

        `tokens`, `segments` and `positions` are `[batch, length]` int32. Tokens attend within
        their segment only; without `segments`, a sequence is one. Positions default to the place
        in the sequence: packed sequences have to give theirs. `dropout_keys` `[batch]` turns
        dropout on.
        """
        hidden, (_, routed) = self._sequence(
            tokens, segments, positions, dropout_keys, layout, remat, kernel, keep=False
        )
        return hidden, routed

    def traced(
        self,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        dropout_keys: jax.Array | None = None,
        *,
        layout: Layout | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None, jax.Array, jax.Array]:
        """`routed`, and of each layer what distillation matches: maps of attention averaged over
        heads `[layers, batch, length, length]` float32, and hidden states `[layers, batch, length,
        width]`.
        """
        hidden, (kept, routed) = self._sequence(
            tokens, segments, positions, dropout_keys, layout, remat, "xla", keep=True, maps=True
        )
        return hidden, routed, *kept

    def prefill(
        self,
        tokens: jax.Array,
        lengths: jax.Array,
        *,
        layout: Layout | None = None,
        kernel: Kernel = "xla",
    ) -> tuple[jax.Array, Cache]:
        """Return the hidden state of each prompt's last token, `[batch, width]`, and their cache.

        Prompts stand at the left of `tokens` `[batch, length]` and have `lengths` `[batch]`, at
        least 1. The cache has one slot for each prompt and the capacity `length`: `insert` copies
        it into a larger one.
        """
        hidden, extra = self._sequence(tokens, None, None, None, layout, "none", kernel, keep=True)
        (keys, values), _ = extra
        cache = Cache(
            tuple(constrain(layout, each.transpose(0, 2, 3, 1), KEYS) for each in keys),
            tuple(constrain(layout, each.transpose(0, 2, 1, 3), VALUES) for each in values),
            lengths.astype(jnp.int32),
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, cache

    def continuations(
        self,
        prompts: jax.Array,
        lengths: jax.Array,
        tokens: jax.Array,
        *,
        layout: Layout | None = None,
        remat: Remat = "none",
        kernel: Kernel = "xla",
    ) -> jax.Array:
        """Hidden states `[prompts, group, length, width]` that predict each token of completions.

        `tokens` `[prompts, group, length]` continue the prompts, which stand at the left of
        `prompts` `[prompts, prompt_length]` and have `lengths` `[prompts]`, at least 1. A prompt is
        run once for its whole group, and the completions attend to its keys and values: the result
        is that of whole sequences, each a prompt and its completion.
        """
        a = self.architecture
        count, group, length = tokens.shape
        rows = tokens.reshape(count * group, length)
        places = jnp.repeat(lengths, group)[:, None] + jnp.arange(length)
        turns = self._turns(places)
        before = jnp.arange(prompts.shape[1])[None]
        prompt_layer = self._layer(self._turns(before), None, None, layout, kernel, keep=True)

        def layer(
            block: Block, carry: tuple[jax.Array, jax.Array], local: Local, index: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            prompt, x = carry
            # Both in one pass over the layers, so that weights are gathered once, and what they
            # get from the two adds up at once.
            prompt, (prefix, _) = prompt_layer(block, prompt, local, index)

            def attend(
                query: jax.Array, key: jax.Array, value: jax.Array
            ) -> tuple[jax.Array, None]:
                attended = prefixed_attention(
                    query,
                    key,
                    value,
                    prefix,
                    lengths,
                    window=self._window(local),
                    scale=self._query_scale,
                    cap=a.attention_cap,
                )
                return attended, None

            x, *_rest = block(x, _turn(turns, local), attend, None, layout)
            return (prompt, constrain(layout, x, RESIDUAL)), None

        first = self._embed(prompts, before, None, layout)
        x = self._embed(rows, places, None, layout)
        (prompt, x), _ = self._layers((first, x), layer, remat)
        # The last token predicts nothing: it keeps products at sizes that kernels like.
        behind = self.norm(x).reshape(count, group, length, a.width)[:, :, :-1]
        last = jnp.take_along_axis(prompt, (lengths - 1)[:, None, None], axis=1)
        last = jnp.broadcast_to(self.norm(last)[:, None], (count, group, 1, a.width))
        return jnp.concatenate([last, behind], axis=2)

    def unstacked(self) -> Unstacked:
        """Take the weights of each layer out of the stack.

        Computed ahead of a loop, this is a copy of all of them; within it, slices that a product
        reads in place where the compiler can (XLA on GPU and TPU; on CPU it copies them).
        """
        _, stacked = nnx.split(self.blocks)

        def read(path: tuple[Any, ...], each: nnx.Variable[Any]) -> Any:
            array = each.get_value()
            matrix = path[-1] == "weight" or path[-2] == "experts"
            matrix = matrix and jnp.issubdtype(array.dtype, jnp.floating)
            return each.replace(array.astype(self.dtype)) if matrix else each

        stacked = nnx.map_state(read, stacked)
        blocks = tuple(
            jax.tree.map(lambda array, index=index: array[index], stacked)
            for index in range(self.architecture.layers)
        )
        return Unstacked(blocks, self.head_weight().astype(self.dtype).T)

    def step(
        self, tokens: jax.Array, cache: Cache, weights: Unstacked, *, layout: Layout | None = None
    ) -> tuple[jax.Array, Cache]:
        """Append one token to each slot: `tokens` `[slots]` to hidden states `[slots, width]`.

        Each token goes to its slot's own position, `cache.lengths`; those that are returned are
        one greater. A slot whose cache is full keeps what it holds, and its hidden state is wrong.
        """
        a = self.architecture
        places = cache.lengths
        slots = jnp.arange(tokens.shape[0])
        turns = self._turns(places[:, None])
        graph, _ = nnx.split(self.blocks)
        x = self._embed(tokens[:, None], places[:, None], None, layout)
        written: list[tuple[jax.Array, jax.Array]] = []
        for span, own, *cached in zip(
            a.spans, weights.blocks, cache.keys, cache.values, strict=True
        ):

            def attend(
                query: jax.Array,
                key: jax.Array,
                value: jax.Array,
                local: Local = span == "local",
                cached: Sequence[jax.Array] = cached,
            ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                keys, values = cached
                keys = keys.at[slots, :, :, places].set(key[:, 0].astype(keys.dtype))
                values = values.at[slots, :, places].set(value[:, 0].astype(values.dtype))
                attended = cached_attention(
                    query,
                    keys.astype(query.dtype),
                    values.astype(query.dtype),
                    places,
                    window=self._window(local),
                    scale=self._query_scale,
                    cap=a.attention_cap,
                )
                return attended, (keys, values)

            block: Block = nnx.merge(graph, own)
            x, layer, _routed = block(x, _turn(turns, span == "local"), attend, None, layout)
            x = constrain(layout, x, RESIDUAL)
            written.append(layer)
        cache = Cache(tuple(k for k, _ in written), tuple(v for _, v in written), places + 1)
        return self.norm(x)[:, 0], cache

    def head_weight(self) -> jax.Array:
        """Return the output head `[vocab, width]`: its own, or the embedding."""
        if self.head is None:
            return _updated(self.embedding, self.embedding_adapters)
        return _updated(self.head, self.head_adapters)

    def scores(self, hidden: jax.Array) -> jax.Array:
        """One number for each hidden state `[..., width]`, float32."""
        assert self.score is not None
        return scored(hidden, self.score[...])

    def merged(self) -> Decoder:
        """Return the decoder whose weights, float32, are these with the adapters in them."""
        decoder: Decoder = nnx.merge(*nnx.split(self))
        graph, stacked = nnx.split(self.blocks)
        folded: Any = None

        def fold(own: Any) -> Any:
            nonlocal folded
            block: Block = nnx.merge(graph, own)
            for linear in block.linears:
                linear.fold()
            folded, state = nnx.split(block)
            return state

        stacked = jax.vmap(fold)(stacked)
        decoder.blocks = nnx.merge(folded, stacked)
        table = _updated(self.embedding, self.embedding_adapters)
        decoder.embedding = replaced(self.embedding, table.astype(jnp.float32))
        if self.head is not None:
            decoder.head = replaced(self.head, self.head_weight().astype(jnp.float32))
        decoder.embedding_adapters, decoder.head_adapters = nnx.Dict(), nnx.Dict()
        decoder.architecture = plain(self.architecture)
        return decoder

    def measure(self) -> None:
        """Set the magnitudes of the adapters to the lengths of the columns that they are of."""
        graph, stacked = nnx.split(self.blocks)

        def one(own: Any) -> Any:
            block: Block = nnx.merge(graph, own)
            for linear in block.linears:
                linear.measure()
            return nnx.split(block)[1]

        self.blocks = nnx.merge(graph, jax.vmap(one)(stacked))

    def logits(self, hidden: jax.Array, weights: Unstacked | None = None) -> jax.Array:
        """Capped logits `[..., vocab]`, float32, of hidden states `[..., width]`.

        For a few tokens, as in sampling. Losses use `runtime.losses`, which never holds the logits
        of a whole batch.
        """
        head = self.head_weight().astype(hidden.dtype).T if weights is None else weights.head
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        cap = self.architecture.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def _query_scale(self) -> float:
        stated = self.architecture.query_scale
        return self.architecture.head_dim**-0.5 if stated is None else stated

    def _window(self, local: Local) -> int | jax.Array | None:
        """Return how many tokens a layer attends to, its own included; None for all."""
        if isinstance(local, bool):
            return self.architecture.window if local else None
        return jnp.where(local, self.architecture.window or 0, _UNBOUNDED)

    def _turns(self, positions: jax.Array) -> dict[Span, rope.Rotation]:
        if self.architecture.position != "rope":
            return {}
        kinds = set(self.architecture.pattern)
        return {
            span: rope.rotation(positions, rope.frequencies(self.architecture, span))
            for span in kinds
        }

    def _embed(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        dropout_keys: jax.Array | None,
        layout: Layout | None,
    ) -> jax.Array:
        # Looked up in float32, so that the gradients of a frequent token are added up in float32.
        # A device looks up its part of the rows for all tokens that the others have too, and gets
        # the rest for its own: the table is never whole, nor is its gradient.
        everyone = constrain(layout, tokens, ("shared", None))
        x = constrain(layout, self.embedding[...][everyone].astype(self.dtype), SHARED)
        x = constrain(layout, x, RESIDUAL)
        for adapter in self.embedding_adapters.values():
            low = constrain(layout, adapter.a[...], ("vocab", None))[tokens]
            x = x + adapter.scale * product(low, adapter.b[...]).astype(self.dtype)
        x = x * jnp.asarray(self.architecture.embedding_scale, self.dtype)
        if self.positions is not None:
            x = x + self.positions[...][positions].astype(self.dtype)
        x = dropout(x, dropout_keys, self.architecture.dropout, self.architecture.layers)
        return constrain(layout, x, RESIDUAL)

    def _sequence(
        self,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        dropout_keys: jax.Array | None,
        layout: Layout | None,
        remat: Remat,
        kernel: Kernel,
        *,
        keep: bool,
        maps: bool = False,
    ) -> tuple[jax.Array, Any]:
        """Hidden states of whole sequences; with `keep`, the keys and values of all layers, or with
        `maps` their maps of attention and hidden states; and what the routers of experts say.
        """
        places = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        layer = self._layer(
            self._turns(places), segments, dropout_keys, layout, kernel, keep=keep, maps=maps
        )
        x = self._embed(tokens, places, dropout_keys, layout)
        x, extra = self._layers(x, layer, remat)
        return self.norm(x), extra

    def _layer(
        self,
        turns: dict[Span, rope.Rotation],
        segments: jax.Array | None,
        dropout_keys: jax.Array | None,
        layout: Layout | None,
        kernel: Kernel,
        *,
        keep: bool,
        maps: bool = False,
    ) -> Callable[[Block, jax.Array, Local, jax.Array], tuple[jax.Array, Any]]:
        """Return what runs a block over whole sequences; see `_sequence`."""
        a = self.architecture

        def layer(
            block: Block, x: jax.Array, local: Local, index: jax.Array
        ) -> tuple[jax.Array, Any]:
            def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
                def attended(window: Window) -> jax.Array:
                    return self_attention(
                        query,
                        key,
                        value,
                        segments=segments,
                        window=window,
                        scale=self._query_scale,
                        cap=a.attention_cap,
                        kernel=kernel,
                        layout=layout,
                    )

                if kernel == "xla" or isinstance(local, bool):
                    found = attended(self._window(local))
                else:  # kernels know windows when they are compiled
                    branches = partial(attended, a.window), partial(attended, None)
                    found = jax.lax.cond(local, *branches)
                if maps:
                    return found, attention_maps(
                        query,
                        key,
                        segments=segments,
                        window=self._window(local),
                        scale=self._query_scale,
                        cap=a.attention_cap,
                    )
                return found, (key, value) if keep else None

            keys = None if dropout_keys is None else _fold(dropout_keys, index)
            x, kept, routed = block(x, _turn(turns, local), attend, keys, layout)
            x = constrain(layout, x, RESIDUAL)
            return x, ((kept, x) if maps else kept, routed)

        return layer

    def _layers(
        self,
        carry: Any,
        layer: Callable[[Block, Any, Local, jax.Array], tuple[Any, Any]],
        remat: Remat,
    ) -> tuple[Any, Any]:
        """Run the blocks; returns the last carry, and the layers' extras stacked.

        One layer after another, whatever the pattern: what is given to a scan is kept for the
        backward pass as it is, and of a part of it there would be a copy.
        """
        a = self.architecture
        graph, state = nnx.split(self.blocks)
        ranks = frozenset(adapter.rank for adapter in a.adapters)
        alike = len(set(a.pattern)) == 1

        def run(carry: Any, own: Any, index: jax.Array, local: jax.Array) -> tuple[Any, Any]:
            known: Local = a.pattern[0] == "local" if alike else local
            return layer(nnx.merge(graph, own), carry, known, index)

        run = _rematerialised(run, remat, ranks)
        locals_ = jnp.array([span == "local" for span in a.spans])
        each = state, jnp.arange(a.layers), locals_
        found: tuple[Any, Any] = jax.lax.scan(lambda carry, own: run(carry, *own), carry, each)
        return found


def _turn(turns: dict[Span, rope.Rotation], local: Local) -> rope.Rotation | None:
    """Return how a layer rotates its heads."""
    if isinstance(local, bool):
        return turns.get("local" if local else "global")
    if not turns:
        return None
    chosen: rope.Rotation = jax.tree.map(partial(jnp.where, local), turns["local"], turns["global"])
    return chosen


def scored(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Products `[...]` of hidden states `[..., width]` with a head `[width]`, float32."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head.astype(jnp.float32))


def _updated(table: Parameter, adapters: nnx.Dict[LowRank]) -> jax.Array:
    weight: jax.Array = table[...]
    for adapter in adapters.values():
        weight = weight + adapter.update()
    return weight


def _fold(keys: jax.Array, data: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, data)


def _dots(ranks: frozenset[int]) -> Callable[..., bool]:
    """Keep the products with weights, but not what an adapter adds to them: as large, and little
    to compute again.
    """

    def keeps(primitive: Any, *operands: Any, **given: Any) -> bool:
        if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
            primitive, *operands, **given
        ):
            return False
        (contracted, _), _ = given["dimension_numbers"]
        return math.prod(operands[0].shape[axis] for axis in contracted) not in ranks

    return keeps


def _rematerialised(
    function: Callable[..., Any], remat: Remat, ranks: frozenset[int]
) -> Callable[..., Any]:
    """Make a layer keep for the backward pass only what the policy says."""
    if remat == "none":
        return function
    # Within a scan the compiler cannot merge the repeated computation with the first one, so that
    # the barriers against it, which also hinder fusion, are not needed.
    policy = _dots(ranks) if remat == "dots" else None
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def empty_cache(architecture: Architecture, slots: int, capacity: int, dtype: Any) -> Cache:
    """Return a cache with `slots` empty slots of `capacity` tokens."""
    a = architecture

    def layers(*sizes: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros((slots, a.kv_heads, *sizes), dtype) for _ in range(a.layers))

    return Cache(
        layers(a.head_dim, capacity), layers(capacity, a.head_dim), jnp.zeros(slots, jnp.int32)
    )


def insert(cache: Cache, prompts: Cache, rows: jax.Array, slots: jax.Array) -> Cache:
    """Copy prompts into slots: prompt `rows[i]` into slot `slots[i]`, both `[count]` int32.

    A prompt may go to many slots (the completions of a group); a slot beyond the last is left
    out, so that `rows` can have a fixed size. `ValueError` where prompts are longer than slots.
    """
    length, capacity = prompts.values[0].shape[2], cache.values[0].shape[2]
    if length > capacity:
        raise ValueError(f"prompts of {length} tokens for slots of {capacity}")

    def put(into: jax.Array, what: jax.Array, *places: slice) -> jax.Array:
        return into.at[slots, *places].set(what[rows].astype(into.dtype), mode="drop")

    every, filled = slice(None), slice(length)
    return Cache(
        tuple(
            put(*each, every, every, filled) for each in zip(cache.keys, prompts.keys, strict=True)
        ),
        tuple(put(*each, every, filled) for each in zip(cache.values, prompts.values, strict=True)),
        cache.lengths.at[slots].set(prompts.lengths[rows], mode="drop"),
    )
