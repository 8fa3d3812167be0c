"""Attention: causal within segments, optionally within a window, with grouped heads.

`plain_attention` is what XLA compiles, and what the kernels of `fused_attention` are tested
against. cuDNN's comes by `jax.nn.dot_product_attention` and has no soft-capped logits.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Int

from tunelang.runtime.models import fused_attention
from tunelang.runtime.models.matmul import product
from tunelang.runtime.sharding import Layout

Kernel = Literal["xla", "cudnn", "splash", "cudnn_vmap"]
"""`cudnn_vmap` is cuDNN's kernel under `vmap`, for the branches of a fused sweep."""

_MASKED = float(np.finfo(np.float32).min)

Window = int | Int[Array, ""] | None
"""How many tokens a token attends to, itself included; None for all before it."""


def visible(
    query_positions: Int[Array, "*batch queries"],
    key_positions: Int[Array, "*#batch keys"],
    window: Window,
) -> Bool[Array, "*batch queries keys"]:
    """Return which keys a query may attend to.

    These are the keys at its own position and before it, and of them the last `window`.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def causal_mask(
    length: int, window: Window, segments: Int[Array, "batch length"] | None
) -> Bool[Array, "rows length length"]:
    """Return which tokens of a sequence attend to which, `[batch or 1, queries, keys]`."""
    order = jnp.arange(length)
    mask = visible(order, order, window)[None]
    return mask if segments is None else mask & same_segment(segments)


def same_segment(segments: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    """Return which tokens are of one example."""
    return segments[:, :, None] == segments[:, None, :]


def plain_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "#batch queries keys"],
    *,
    scale: float,
    cap: float | None = None,
    split: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Attend by softmax (arXiv:1706.03762) with grouped heads (arXiv:2305.13245), in plain JAX.

    Query `[batch, queries, heads, head_dim]`, key and value `[batch, keys, kv_heads, head_dim]`,
    mask `[batch or 1, queries, keys]`, True where a query attends; every query needs one key. With
    `cap`, the logits are `cap * tanh(logits / cap)` (Gemma 2, arXiv:2408.00118). The softmax is in
    float32. `split` says that queries are, over devices. Returns `[batch, queries, heads,
    head_dim]`.
    """
    batch, queries, _, head_dim = query.shape
    kv_heads = key.shape[2]
    # The heads of a group are rows of one product, so that each key is read once for all of them:
    # in front of the queries or behind, whichever is split over devices.
    order = (0, 2, 1, 3, 4) if split else (0, 2, 3, 1, 4)
    grouped = query.reshape(batch, queries, kv_heads, -1, head_dim).transpose(order)
    rows = grouped.reshape(batch, kv_heads, -1, head_dim)
    logits = _cap(scale * product(rows, key.transpose(0, 2, 3, 1), 1, 2, jnp.float32), cap)
    logits = logits.reshape(*grouped.shape[:4], key.shape[1])
    seen = mask[:, None, :, None] if split else mask[:, None, None]
    # Added, not chosen: the backward pass has no use for a mask, which then is not kept for it.
    unseen = jax.lax.stop_gradient(jnp.where(seen, 0.0, _MASKED))
    weights = jax.nn.softmax(logits + unseen, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, kv_heads, -1, key.shape[1])
    attended = product(weights, value.swapaxes(1, 2), 1, 2).reshape(grouped.shape)
    inverse_order = (0, 2, 1, 3, 4) if split else (0, 3, 1, 2, 4)
    return attended.transpose(inverse_order).reshape(query.shape)


def _cap(logits: Array, cap: float | None) -> Array:
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attention_maps(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"] | None,
    window: Window,
    scale: float,
    cap: float | None,
) -> Float32[Array, "batch length length"]:
    """Return the weights that `self_attention` gives to its values, averaged over heads.

    The result is `[batch, queries, keys]`; the weights of all heads exist at once.
    """
    group = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, group, axis=2)
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    mask = causal_mask(query.shape[1], window, segments)
    logits = jnp.where(mask[:, None], _cap(logits, cap), _MASKED)
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)


def self_attention(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"] | None,
    window: Window,
    scale: float,
    cap: float | None,
    kernel: Kernel,
    layout: Layout | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Attend from sequences to themselves, each token to those before it and itself.

    Query `[batch, length, heads, head_dim]`, key and value `[batch, length, kv_heads, head_dim]`.
    `segments` `[batch, length]` numbers the examples that share a sequence: tokens attend only
    within theirs; without it, a sequence is one example. A token attends to the last `window`
    tokens, itself included; an array only where the kernel is `xla`. Returns `[batch, length,
    heads, head_dim]`.
    """
    if segments is None and kernel in ("cudnn_vmap", "splash"):
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    if kernel == "cudnn_vmap":

        def attend(query: Array, key: Array, value: Array, segments: Array) -> Array:
            return self_attention(
                query, key, value, segments=segments, window=window, scale=scale, cap=cap,
                kernel="cudnn", layout=layout,
            )  # fmt: skip

        assert segments is not None
        return fused_attention.attend_branches(query, key, value, segments, attend)
    length = query.shape[1]
    static_window = window if isinstance(window, int) else None
    split = layout is not None and layout.length_shards(length) > 1
    if layout is not None and split:
        # Queries are split, and all of them read all keys.
        query = layout.constrain(query, ("batch", "length", "heads", None))
        key_axes = ("batch", None, "kv_heads", None)
        key, value = layout.constrain(key, key_axes), layout.constrain(value, key_axes)
    if kernel == "splash":
        assert segments is not None
        return fused_attention.splash(
            query * scale, key, value, segments, static_window, cap, layout
        )
    if cap is not None or kernel == "xla":
        mask = causal_mask(length, window, segments)
        return plain_attention(query, key, value, mask, scale=scale, cap=cap, split=split)
    if layout is not None and split:
        mask = causal_mask(length, static_window, segments)
        return fused_attention.split_cudnn(query, key, value, mask, scale, layout)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if segments is None else same_segment(segments)[:, None],
        scale=scale,
        is_causal=True,
        local_window_size=None if static_window is None else (static_window - 1, 0),
        implementation=kernel,
    )


def prefixed_attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    prefix: tuple[
        Float[Array, "prompts prompt_length kv_heads head_dim"],
        Float[Array, "prompts prompt_length kv_heads head_dim"],
    ],
    lengths: Int[Array, " prompts"],
    *,
    window: Window,
    scale: float,
    cap: float | None,
) -> Float[Array, "rows length heads head_dim"]:
    """Attend from completions to themselves and to a prompt that a group of them shares.

    Query `[prompts * group, length, heads, head_dim]`, key and value `[prompts * group, length,
    kv_heads, head_dim]`; `prefix` is key and value of the prompts, `[prompts, prompt_length,
    kv_heads, head_dim]`, of which the first `lengths` `[prompts]` tokens count. Returns the shape
    of the query. The softmax is in float32 over both; a prompt's keys are read once for all
    completions of its group.
    """
    prefix_key, prefix_value = prefix
    prompts, prompt_length, kv_heads, head_dim = prefix_key.shape
    completions, length = query.shape[:2]
    group, heads = completions // prompts, query.shape[2] // kv_heads
    # Axes: prompts, kv_heads, group, heads of a group, length, head_dim.
    grouped = query.reshape(prompts, group, length, kv_heads, heads, head_dim)
    rows = grouped.transpose(0, 3, 1, 4, 2, 5)
    shape = (prompts, kv_heads, group, heads, length)

    def by_head(array: Array) -> Array:
        return array.reshape(prompts, group, length, kv_heads, head_dim).transpose(0, 3, 1, 2, 4)

    def masked_logits(logits: Array, mask: Array) -> Array:
        return jnp.where(mask, _cap(scale * logits, cap).reshape(*shape, -1), _MASKED)

    order = jnp.arange(length)
    prompt_order = jnp.arange(prompt_length)[None]
    is_prompt = prompt_order[None] < lengths[:, None, None]
    prompt_mask = visible(lengths[:, None] + order[None], prompt_order, window) & is_prompt
    prompt_logits = product(
        rows.reshape(prompts, kv_heads, -1, head_dim),
        prefix_key.transpose(0, 2, 3, 1),
        1, 2, jnp.float32,
    )  # fmt: skip
    logits = product(
        rows.reshape(prompts, kv_heads, group, -1, head_dim),
        by_head(key).swapaxes(3, 4),
        1, 3, jnp.float32,
    )  # fmt: skip
    prompt_logits = masked_logits(prompt_logits, prompt_mask[:, None, None, None])
    logits = masked_logits(logits, visible(order, order, window))
    largest = jnp.maximum(prompt_logits.max(-1), logits.max(-1))
    largest = jax.lax.stop_gradient(largest)[..., None]
    prompt_weights, weights = jnp.exp(prompt_logits - largest), jnp.exp(logits - largest)
    total = prompt_weights.sum(-1) + weights.sum(-1)
    attended = product(
        prompt_weights.astype(value.dtype).reshape(prompts, kv_heads, -1, prompt_length),
        prefix_value.swapaxes(1, 2),
        1, 2, jnp.float32,
    ).reshape(*shape, head_dim) + product(
        weights.astype(value.dtype).reshape(prompts, kv_heads, group, -1, length),
        by_head(value),
        1, 3, jnp.float32,
    ).reshape(*shape, head_dim)  # fmt: skip
    attended = (attended / total[..., None]).astype(query.dtype)
    return attended.transpose(0, 2, 4, 1, 3, 5).reshape(query.shape)


def cached_attention(
    query: Float[Array, "slots 1 heads head_dim"],
    keys: Float[Array, "slots kv_heads head_dim capacity"],
    values: Float[Array, "slots kv_heads capacity head_dim"],
    positions: Int[Array, " slots"],
    *,
    window: Window,
    scale: float,
    cap: float | None,
) -> Float[Array, "slots 1 heads head_dim"]:
    """Attend from one new token in each slot to the slot's cache.

    Query `[slots, 1, heads, head_dim]`, keys `[slots, kv_heads, head_dim, capacity]` and values
    `[slots, kv_heads, capacity, head_dim]` with the new token's already at `positions` `[slots]`;
    what lies behind it is not looked at. Returns `[slots, 1, heads, head_dim]`.
    """
    slots, kv_heads, head_dim, capacity = keys.shape
    grouped = query.reshape(slots, kv_heads, -1, head_dim)
    logits = scale * jnp.einsum(
        "bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32
    )
    mask = visible(positions[:, None], jnp.arange(capacity)[None], window)
    weights = jax.nn.softmax(jnp.where(mask[:, None], _cap(logits, cap), _MASKED), axis=-1)
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values).reshape(query.shape)
