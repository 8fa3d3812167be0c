"""The decoder: one network for every architecture, to train, to score and to sample with.

Blocks are stacked: each parameter of a block has a leading axis `layers`, and the layers are run
by a scan, so that the size of the program does not grow with depth. An architecture whose layers
repeat a pattern (local and global attention) is scanned layer by layer as well, where the mask may
be computed; kernels that have to know it beforehand make the scan one over whole periods, with the
layers of a period written out in the body, and what is left of the last period behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Key, PyTree

from tunelang.compiler.layout.stage_layout import Remat
from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.runtime.models import attention, rope
from tunelang.runtime.models.attention import Kernel, Window
from tunelang.runtime.models.kv_cache import KEYS, VALUES, Cache
from tunelang.runtime.models.layers import Block, Norm
from tunelang.runtime.models.lora import make_adapters, with_updates
from tunelang.runtime.models.matmul import product
from tunelang.runtime.models.primitives import (
    DTYPES,
    Params,
    dropout,
    normal,
    parameter,
    with_value,
)
from tunelang.runtime.models.remat import rematerialize
from tunelang.runtime.models.rope import Local
from tunelang.runtime.sharding import Layout, constrain

RESIDUAL = ("batch", "length", None)
"""Logical axes of the residual stream."""
SHARED = ("shared", None, "embed")
"""Logical axes of the embeddings that are looked up for all devices which share a table."""
Routing = tuple[jax.Array, jax.Array]
"""The inputs of `moe.balance_loss`: how many of a token's experts each one is, and the router's
probabilities, `[layers, batch, length, experts]` float32."""
Extra = Literal["none", "keys and values", "maps"]
"""The further output of layers, next to hidden states: keys and values of their attention, or its
maps with the hidden states of each layer."""
Carry = TypeVar("Carry")
RunLayer = Callable[[Block, Carry, Local, jax.Array], tuple[Carry, PyTree]]
"""`(block, carry, local, index) -> (carry, extras)`: runs one layer within the scan."""

_UNBOUNDED = 2**30
"""A window that holds every sequence."""


class Decoder(nnx.Module):
    """A decoder-only transformer: tokens to hidden states, to logits, one token at a time.

    Parameters are float32, and frozen matrices as the architecture's `storage` says; activations
    have `dtype`, float32 or bfloat16.
    """

    def __init__(
        self, architecture: Architecture, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        self.architecture = a = architecture
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

        def draw_table(rows: int) -> jax.Array:
            return normal(rngs, (rows, a.width), deviation)

        self.embedding = parameter(draw_table(a.vocabulary).astype(stored), "vocab", "embed")
        self.embedding_adapters = make_adapters(a, "embedding", rngs, vocabulary, width)
        self.positions = (
            parameter(draw_table(a.context), "position", "embed")
            if a.position == "learned"
            else None
        )
        self.blocks = stacked(rngs)
        self.norm = Norm(a, embed=a.width)
        self.head = (
            None
            if a.tied or a.scores
            else parameter(draw_table(a.vocabulary).astype(stored), "vocab", "embed")
        )
        self.head_adapters = make_adapters(a, "head", rngs, vocabulary, width)
        self.score = parameter(normal(rngs, (a.width,), deviation), "embed") if a.scores else None

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        dropout_keys: Key[Array, " batch"] | None = None,
        layout: Layout | None = None,
        remat: Remat = "none",
        kernel: Kernel = "xla",
    ) -> tuple[Float[Array, "batch length width"], Routing | None]:
        """Return the hidden states, and the routing of the layers where there are experts.

        Tokens attend within their segment only; without `segments`, a sequence is one. Positions
        default to the place in the sequence: packed sequences have to give theirs. `dropout_keys`
        turn dropout on.
        """
        hidden, (_, routing) = self._run_sequences(
            tokens, segments, positions, dropout_keys, layout, remat, kernel, extra="none"
        )
        return hidden, routing

    def run_with_maps(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None,
        positions: Int[Array, "#batch length"] | None,
        dropout_keys: Key[Array, " batch"] | None = None,
        *,
        layout: Layout | None = None,
        remat: Remat = "none",
    ) -> tuple[
        Float[Array, "batch length width"],
        Routing | None,
        Float32[Array, "layers batch length length"],
        Float[Array, "layers batch length width"],
    ]:
        """Return what a call does, and what distillation matches of each layer: maps of attention,
        averaged over heads, and hidden states.
        """
        hidden, ((maps, features), routing) = self._run_sequences(
            tokens, segments, positions, dropout_keys, layout, remat, "xla", extra="maps"
        )
        return hidden, routing, maps, features

    def prefill(
        self,
        tokens: Int[Array, "batch length"],
        lengths: Int[Array, " batch"],
        *,
        layout: Layout | None = None,
        kernel: Kernel = "xla",
    ) -> tuple[Float[Array, "batch width"], Cache]:
        """Return the hidden state of each prompt's last token, and the prompts' cache.

        Prompts stand at the left of `tokens` and have `lengths`, at least 1. The cache has one slot
        for each prompt and the capacity `length`: `insert` copies it into a larger one.
        """
        hidden, ((keys, values), _) = self._run_sequences(
            tokens, None, None, None, layout, "none", kernel, extra="keys and values"
        )
        cache = Cache(
            tuple(constrain(layout, layer.transpose(0, 2, 3, 1), KEYS) for layer in keys),
            tuple(constrain(layout, layer.transpose(0, 2, 1, 3), VALUES) for layer in values),
            lengths.astype(jnp.int32),
        )
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return last, cache

    def continuations(
        self,
        prompts: Int[Array, "prompts prompt_length"],
        lengths: Int[Array, " prompts"],
        tokens: Int[Array, "prompts group length"],
        *,
        layout: Layout | None = None,
        remat: Remat = "none",
        kernel: Kernel = "xla",
    ) -> Float[Array, "prompts group length width"]:
        """Return the hidden states that predict each token of completions.

        `tokens` continue the prompts, which stand at the left of `prompts` and have `lengths`, at
        least 1. A prompt is run once for its whole group, and the completions attend to its keys
        and values: the result is that of whole sequences, each a prompt and its completion.
        """
        count, group, length = tokens.shape
        rows = tokens.reshape(count * group, length)
        places = jnp.repeat(lengths, group)[:, None] + jnp.arange(length)[None]
        rotations = rope.rotations(self.architecture, places)
        prompt_places = jnp.arange(prompts.shape[1])[None]
        run_prompt = self._sequence_layer(
            rope.rotations(self.architecture, prompt_places),
            None,
            None,
            layout,
            kernel,
            "keys and values",
        )

        def run_layer(
            block: Block,
            carry: tuple[jax.Array, jax.Array],
            local: Local,
            index: jax.Array,
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            prompt, x = carry
            # Both in one pass over the layers, so that weights are gathered once, and their
            # gradients from the two add up at once.
            prompt, (prefix, _) = run_prompt(block, prompt, local, index)

            def attend(
                query: jax.Array, key: jax.Array, value: jax.Array
            ) -> tuple[jax.Array, None]:
                attended = attention.prefixed_attention(
                    query,
                    key,
                    value,
                    prefix,
                    lengths,
                    window=self.window(local),
                    scale=self.query_scale,
                    cap=self.architecture.attention_cap,
                )
                return attended, None

            x, _, _ = block(x, rope.layer_rotation(rotations, local), attend, None, layout)
            return (prompt, constrain(layout, x, RESIDUAL)), None

        start = (
            self.embed(prompts, prompt_places, None, layout),
            self.embed(rows, places, None, layout),
        )
        (prompt, x), _ = self._scan_layers(start, run_layer, remat)
        # The last token predicts nothing: it keeps products at sizes that kernels like.
        later = self.norm(x).reshape(count, group, length, -1)[:, :, :-1]
        last = jnp.take_along_axis(prompt, (lengths - 1)[:, None, None], axis=1)
        first = jnp.broadcast_to(self.norm(last)[:, None], (count, group, 1, last.shape[-1]))
        return jnp.concatenate([first, later], axis=2)

    def head_weight(self) -> Float[Array, "vocab width"]:
        """Return the output head: its own, or the embedding."""
        if self.head is None:
            return with_updates(self.embedding, self.embedding_adapters)
        return with_updates(self.head, self.head_adapters)

    def scores(self, hidden: Float[Array, "*batch width"]) -> Float32[Array, "*batch"]:
        """Return one number for each hidden state."""
        assert self.score is not None
        return score_hidden(hidden, self.score[...])

    def merge_adapters(self) -> Decoder:
        """Return the decoder whose weights, float32, are these with the adapters in them."""
        decoder: Decoder = nnx.merge(*nnx.split(self))
        graph, stacked = nnx.split(self.blocks)
        merged_graph: nnx.GraphDef[Block] = graph

        def merge(state: Params) -> Params:
            nonlocal merged_graph
            block: Block = nnx.merge(graph, state)
            for linear in block.linears:
                linear.merge_adapters()
            merged_graph, state = nnx.split(block)
            return state

        stacked = jax.vmap(merge)(stacked)
        decoder.blocks = nnx.merge(merged_graph, stacked)
        table = with_updates(self.embedding, self.embedding_adapters)
        decoder.embedding = with_value(self.embedding, table.astype(jnp.float32))
        if self.head is not None:
            decoder.head = with_value(self.head, self.head_weight().astype(jnp.float32))
        decoder.embedding_adapters, decoder.head_adapters = nnx.Dict(), nnx.Dict()
        decoder.architecture = plain(self.architecture)
        return decoder

    def set_magnitudes(self) -> None:
        """Set the magnitudes of the adapters to the norms of the columns that they scale."""
        graph, stacked = nnx.split(self.blocks)

        def measure(state: Params) -> Params:
            block: Block = nnx.merge(graph, state)
            for linear in block.linears:
                linear.set_magnitudes()
            return nnx.state(block)

        self.blocks = nnx.merge(graph, jax.vmap(measure)(stacked))

    def logits(
        self, hidden: Float[Array, "*batch width"], head: Float[Array, "width vocab"] | None = None
    ) -> Float32[Array, "*batch vocab"]:
        """Return the capped logits of hidden states.

        For a few tokens, as in sampling, which passes the transposed `head` in the dtype of the
        activations. Losses use `training.cross_entropy`, which never holds the logits of a
        whole batch.
        """
        if head is None:
            head = self.head_weight().astype(hidden.dtype).T
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        cap = self.architecture.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def query_scale(self) -> float:
        """The factor of the attention logits."""
        stated = self.architecture.query_scale
        return self.architecture.head_dim**-0.5 if stated is None else stated

    def window(self, local: Local) -> Window:
        """Return how many tokens a layer attends to, its own included; None for all."""
        if isinstance(local, bool):
            return self.architecture.window if local else None
        return jnp.where(local, self.architecture.window or 0, _UNBOUNDED)

    def embed(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        dropout_keys: jax.Array | None,
        layout: Layout | None,
    ) -> jax.Array:
        """Return the embeddings `[batch, length, width]` of `tokens` `[batch, length]`."""
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

    def _run_sequences(
        self,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        dropout_keys: jax.Array | None,
        layout: Layout | None,
        remat: Remat,
        kernel: Kernel,
        *,
        extra: Extra,
    ) -> tuple[jax.Array, PyTree]:
        """Return the hidden states of sequences, and `(extras, routing)` of all layers, stacked."""
        places = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        run_layer = self._sequence_layer(
            rope.rotations(self.architecture, places), segments, dropout_keys, layout, kernel, extra
        )
        x = self.embed(tokens, places, dropout_keys, layout)
        x, extras = self._scan_layers(x, run_layer, remat)
        return self.norm(x), extras

    def _sequence_layer(
        self,
        rotations: rope.Rotations,
        segments: jax.Array | None,
        dropout_keys: jax.Array | None,
        layout: Layout | None,
        kernel: Kernel,
        extra: Extra,
    ) -> RunLayer[jax.Array]:
        """Return the function that runs a block over whole sequences."""
        a = self.architecture

        def run_layer(
            block: Block, x: jax.Array, local: Local, index: jax.Array
        ) -> tuple[jax.Array, PyTree]:
            def attend(
                query: jax.Array, key: jax.Array, value: jax.Array
            ) -> tuple[jax.Array, PyTree]:
                def attend_within(window: Window) -> jax.Array:
                    return attention.self_attention(
                        query,
                        key,
                        value,
                        segments=segments,
                        window=window,
                        scale=self.query_scale,
                        cap=a.attention_cap,
                        kernel=kernel,
                        layout=layout,
                    )

                if kernel == "xla" or isinstance(local, bool):
                    attended = attend_within(self.window(local))
                else:  # kernels know windows when they are compiled
                    branches = partial(attend_within, a.window), partial(attend_within, None)
                    attended = jax.lax.cond(local, *branches)
                if extra == "maps":
                    return attended, attention.attention_maps(
                        query,
                        key,
                        segments=segments,
                        window=self.window(local),
                        scale=self.query_scale,
                        cap=a.attention_cap,
                    )
                return attended, (key, value) if extra == "keys and values" else None

            keys = dropout_keys
            if keys is not None:
                keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
            x, attention_extra, routing = block(
                x, rope.layer_rotation(rotations, local), attend, keys, layout
            )
            x = constrain(layout, x, RESIDUAL)
            return x, ((attention_extra, x) if extra == "maps" else attention_extra, routing)

        return run_layer

    def _scan_layers(
        self, carry: Carry, run_layer: RunLayer[Carry], remat: Remat
    ) -> tuple[Carry, PyTree]:
        """Run the blocks; returns the last carry, and the layers' extras stacked.

        One layer after another, whatever the pattern: a scan keeps its input for the backward pass
        as it is, and of a part of it there would be a copy.
        """
        a = self.architecture
        graph, stacked = nnx.split(self.blocks)
        ranks = frozenset(adapter.rank for adapter in a.adapters)
        alike = len(set(a.pattern)) == 1

        def run(
            carry: Carry, state: Params, index: jax.Array, local: jax.Array
        ) -> tuple[Carry, PyTree]:
            static: Local = a.pattern[0] == "local" if alike else local
            return run_layer(nnx.merge(graph, state), carry, static, index)

        run = rematerialize(run, remat, ranks)
        is_local = jnp.array([span == "local" for span in a.spans])
        inputs = stacked, jnp.arange(a.layers), is_local
        result: tuple[Carry, PyTree] = jax.lax.scan(lambda carry, x: run(carry, *x), carry, inputs)
        return result


def score_hidden(
    hidden: Float[Array, "*batch width"], head: Float[Array, " width"]
) -> Float32[Array, "*batch"]:
    """Return the products of hidden states and a head, float32."""
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), head.astype(jnp.float32))
