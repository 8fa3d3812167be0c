"""Attention: causal within segments, optionally within a window, with grouped heads.

`plain_attention` is what XLA compiles. The kernels that never hold all logits are tested against
it: cuDNN's, which comes by `jax.nn.dot_product_attention` and has no soft-capped logits, and JAX's
splash attention for TPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec

from tunelang.runtime.models.matmul import product
from tunelang.runtime.sharding import Layout

Kernel = Literal["xla", "cudnn", "splash", "cudnn_vmap"]
"""`cudnn_vmap` is cuDNN's kernel under `vmap`, for the branches of a fused sweep."""

SPLASH_BLOCK = 512
"""The most queries or keys that the splash kernel works on at once."""

_MASKED = float(np.finfo(np.float32).min)


Window = int | jax.Array | None


def visible(query_positions: jax.Array, key_positions: jax.Array, window: Window) -> jax.Array:
    """Which keys a query may attend to: those at its own position and before it, and of these the
    last `window`. Positions `[..., queries]` and `[..., keys]` give `[..., queries, keys]`.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    cap: float | None = None,
    split: bool = False,
) -> jax.Array:
    """Softmax attention (arXiv:1706.03762) with grouped heads (arXiv:2305.13245), in plain JAX.

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
    logits = scale * product(rows, key.transpose(0, 2, 3, 1), 1, 2, jnp.float32)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    logits = logits.reshape(*grouped.shape[:4], key.shape[1])
    seen = mask[:, None, :, None] if split else mask[:, None, None]
    # Added, not chosen: the backward pass has no use for a mask, which then is not kept for it.
    unseen = jax.lax.stop_gradient(jnp.where(seen, 0.0, _MASKED))
    weights = jax.nn.softmax(logits + unseen, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, kv_heads, -1, key.shape[1])
    found = product(weights, value.swapaxes(1, 2), 1, 2).reshape(grouped.shape)
    back = (0, 2, 1, 3, 4) if split else (0, 3, 1, 2, 4)
    return found.transpose(back).reshape(query.shape)


def attention_maps(
    query: jax.Array,
    key: jax.Array,
    *,
    segments: jax.Array | None,
    window: Window,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """Return the weights that `self_attention` gives to its values, averaged over heads, `[batch,
    queries, keys]` float32; they exist as a whole.
    """
    group = query.shape[2] // key.shape[2]
    key = jnp.repeat(key, group, axis=2)
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    order = jnp.arange(query.shape[1])
    mask = visible(order, order, window)[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    logits = jnp.where(mask[:, None], logits, _MASKED)
    return jnp.mean(jax.nn.softmax(logits, axis=-1), axis=1)


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segments: jax.Array | None,
    window: Window,
    scale: float,
    cap: float | None,
    kernel: Kernel,
    layout: Layout | None = None,
) -> jax.Array:
    """Causal attention of sequences to themselves.

    Query `[batch, length, heads, head_dim]`, key and value `[batch, length, kv_heads, head_dim]`.
    `segments` `[batch, length]` numbers the examples that share a sequence: tokens attend only
    within theirs; without it, a sequence is one example. A token attends to the last `window`
    tokens, itself included; an array only where the kernel is `xla`. Returns `[batch, length,
    heads, head_dim]`.
    """
    if kernel == "cudnn_vmap":
        if segments is None:
            segments = jnp.zeros(query.shape[:2], jnp.int32)
        alone = partial(
            self_attention, window=window, scale=scale, cap=cap, kernel="cudnn", layout=layout
        )
        return _attend_branches(query, key, value, segments, alone)
    known = window if isinstance(window, int) else None
    split = layout is not None and layout.length_shards(query.shape[1]) > 1
    if layout is not None and split:
        # Queries are split, and all of them read all keys.
        query = layout.constrain(query, ("batch", "length", "heads", None))
        whole = ("batch", None, "kv_heads", None)
        key, value = layout.constrain(key, whole), layout.constrain(value, whole)
    if kernel == "splash":
        if segments is None:
            segments = jnp.zeros(query.shape[:2], jnp.int32)
        return _splash(query * scale, key, value, segments, known, cap, layout)
    if layout is not None and split and kernel == "cudnn" and cap is None:
        return _split_cudnn(query, key, value, segments, known, scale, layout)
    same = None if segments is None else segments[:, :, None] == segments[:, None, :]
    if cap is not None or kernel == "xla":
        order = jnp.arange(query.shape[1])
        mask = visible(order, order, window)[None]
        mask = mask if same is None else mask & same
        return plain_attention(query, key, value, mask, scale=scale, cap=cap, split=split)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if same is None else same[:, None],
        scale=scale,
        is_causal=True,
        local_window_size=None if known is None else (known - 1, 0),
        implementation=kernel,
    )


Attend = Callable[..., jax.Array]


# cuDNN's kernel has no batching rule with masks (jax 0.10.2): without this, branches of a sweep
# could not use it. Delete when `jax.vmap` of `jax.nn.dot_product_attention` with cuDNN and a mask
# compiles.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_branches(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, attend: Attend
) -> jax.Array:
    """Attend in the rows of all branches at once.

    The backward pass runs the forward pass again.
    """

    def alone(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        return attend(query, key, value, segments=ids)

    found: jax.Array = _merged(alone)(query, key, value, segments)
    return found


def _attend_branches_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, attend: Attend
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attend_branches(query, key, value, segments, attend), (query, key, value, segments)


def _attend_branches_backward(
    attend: Attend, residuals: tuple[jax.Array, ...], gradient: jax.Array
) -> Any:
    def back(
        query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array, gradient: jax.Array
    ) -> Any:
        _, pull = jax.vjp(partial(attend, segments=ids), query, key, value)
        return pull(gradient)

    zero = np.zeros(residuals[-1].shape, jax.dtypes.float0)
    return (*_merged(back)(*residuals, gradient), zero)


_attend_branches.defvjp(_attend_branches_forward, _attend_branches_backward)


def _merged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays `[rows, ...]` that under `vmap` is called once, with all rows."""
    called = jax.custom_batching.custom_vmap(function)

    @called.def_vmap
    def rule(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[Any, Any]:
        def merge(array: jax.Array, own: bool) -> jax.Array:
            whole = array if own else jnp.broadcast_to(array, (size, *array.shape))
            # Rows first: they are split over devices, branches are not.
            return whole.swapaxes(0, 1).reshape(-1, *whole.shape[2:])

        def apart(array: jax.Array) -> jax.Array:
            return array.reshape(-1, size, *array.shape[1:]).swapaxes(0, 1)

        found = function(*map(merge, arrays, batched))
        return jax.tree.map(apart, found), jax.tree.map(lambda _: True, found)

    return called


def _split_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    window: int | None,
    scale: float,
    layout: Layout,
) -> jax.Array:
    """`self_attention` by cuDNN's kernel of sequences that are split over devices: each runs its
    queries, with a mask, since these do not begin where the keys do.
    """
    queries, keys = _places(query, key, layout)
    order = jnp.arange(query.shape[1])
    mask = visible(order, order, window)[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    rows, length, *_ = queries
    mask_place = PartitionSpec(None if segments is None else rows, None, length)

    def own(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation="cudnn"
        )

    found: jax.Array = jax.shard_map(
        own,
        mesh=layout.mesh,
        in_specs=(queries, keys, keys, mask_place),
        out_specs=queries,
        check_vma=False,
    )(query, key, value, mask[:, None])
    return found


def _places(
    query: jax.Array, key: jax.Array, layout: Layout
) -> tuple[PartitionSpec, PartitionSpec]:
    """Return where queries and where keys lie, of which a device reads its own.

    Heads are split where keys are too, so that each device has those of its queries; or where all
    of them share one key.
    """
    rows = layout.spec(("batch",), query.shape[:1])[0]
    length = layout.spec(("length",), query.shape[1:2])[0]
    keys = layout.spec(("kv_heads",), (key.shape[2],))[0]
    heads = layout.spec(("heads",), (query.shape[2],))[0] if key.shape[2] == 1 else keys
    return PartitionSpec(rows, length, heads), PartitionSpec(rows, None, keys)


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    window: int | None,
    cap: float | None,
    layout: Layout | None,
) -> jax.Array:
    """`self_attention` by JAX's kernel for TPUs, of scaled queries; elsewhere it is interpreted.

    The length, or of sequences that are split their part, has to be a multiple of 128. A device
    runs its own rows, heads and queries.
    """
    length = query.shape[1]
    across = 1 if layout is None else layout.length_shards(length)
    block = next(size for size in (SPLASH_BLOCK, 256, 128) if length // across % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    square = (length, length)
    mask = (
        splash_attention.CausalMask(square)
        if window is None
        else splash_attention.LocalMask(square, (window - 1, 0), 0)
    )
    devices = jax.devices() if layout is None else list(layout.mesh.devices.flat)
    ways = 1
    if layout is not None:
        queries, keys = _places(query, key, layout)
        rows, split, tensor = queries
        ways = 1 if tensor is None else layout.mesh.shape["tensor"]
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * (query.shape[2] // ways)),
        block_sizes=sizes,
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=across,
        interpret=devices[0].platform != "tpu",
    )

    def own(
        kernel: Any,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        own_segments: jax.Array,
        segments: jax.Array,
    ) -> jax.Array:
        def row(query: jax.Array, key: jax.Array, value: jax.Array, *ids: jax.Array) -> jax.Array:
            attended: jax.Array = kernel(
                query, key, value, segment_ids=splash_attention.SegmentIds(*ids)
            )
            return attended

        query, key, value = (each.swapaxes(1, 2) for each in (query, key, value))
        return jax.vmap(row)(query, key, value, own_segments, segments).swapaxes(1, 2)

    if layout is None:
        return own(kernel, query, key, value, segments, segments)
    mask_places = NamedSharding(layout.mesh, PartitionSpec(None, split))
    found: jax.Array = jax.shard_map(
        own,
        mesh=layout.mesh,
        in_specs=(
            kernel.manual_sharding_spec(mask_places), queries, keys, keys,
            PartitionSpec(rows, split), PartitionSpec(rows),
        ),
        out_specs=queries,
        check_vma=False,
    )(kernel, query, key, value, segments, segments)  # fmt: skip
    return found


def prefixed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    prefix: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    *,
    window: Window,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """Causal attention of completions to themselves and to a prompt that a group of them shares.

    Query `[prompts * group, length, heads, head_dim]`, key and value `[prompts * group, length,
    kv_heads, head_dim]`; `prefix` is key and value of the prompts, `[prompts, prompt_length,
    kv_heads, head_dim]`, of which the first `lengths` `[prompts]` tokens count. Returns the shape
    of the query. The softmax is in float32 over both; a prompt's keys are read once for all
    completions of its group.
    """
    prefix_key, prefix_value = prefix
    prompts, before, kv_heads, head_dim = prefix_key.shape
    completions, length = query.shape[:2]
    group, heads = completions // prompts, query.shape[2] // kv_heads
    # Axes: prompts, kv_heads, group, heads of a group, length, head_dim.
    grouped = query.reshape(prompts, group, length, kv_heads, heads, head_dim)
    rows = grouped.transpose(0, 3, 1, 4, 2, 5)
    shape = (prompts, kv_heads, group, heads, length)

    def apart(array: jax.Array) -> jax.Array:
        return array.reshape(prompts, group, length, kv_heads, head_dim).transpose(0, 3, 1, 2, 4)

    def weights(logits: jax.Array, mask: jax.Array) -> jax.Array:
        logits = scale * logits
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return jnp.where(mask, logits.reshape(*shape, -1), _MASKED)

    places = jnp.arange(length)
    prompt_places = jnp.arange(before)[None]
    inside = prompt_places[None] < lengths[:, None, None]
    near = visible(lengths[:, None] + places[None], prompt_places, window) & inside
    far = product(
        rows.reshape(prompts, kv_heads, -1, head_dim),
        prefix_key.transpose(0, 2, 3, 1),
        1, 2, jnp.float32,
    )  # fmt: skip
    own = product(
        rows.reshape(prompts, kv_heads, group, -1, head_dim),
        apart(key).swapaxes(3, 4),
        1, 3, jnp.float32,
    )  # fmt: skip
    far = weights(far, near[:, None, None, None])
    own = weights(own, visible(places, places, window))
    largest = jax.lax.stop_gradient(jnp.maximum(far.max(-1), own.max(-1)))[..., None]
    far, own = jnp.exp(far - largest), jnp.exp(own - largest)
    total = far.sum(-1) + own.sum(-1)
    found = product(
        far.astype(value.dtype).reshape(prompts, kv_heads, -1, before),
        prefix_value.swapaxes(1, 2),
        1, 2, jnp.float32,
    ).reshape(*shape, head_dim) + product(
        own.astype(value.dtype).reshape(prompts, kv_heads, group, -1, length),
        apart(value),
        1, 3, jnp.float32,
    ).reshape(*shape, head_dim)  # fmt: skip
    found = (found / total[..., None]).astype(query.dtype)
    return found.transpose(0, 2, 4, 1, 3, 5).reshape(query.shape)


def cached_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    window: Window,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """Attention of one new token in each slot to the slot's cache.

    Query `[slots, 1, heads, head_dim]`, keys `[slots, kv_heads, head_dim, capacity]` and values
    `[slots, kv_heads, capacity, head_dim]` with the new token's already at `positions` `[slots]`;
    what lies behind it is not looked at. Returns `[slots, 1, heads, head_dim]`.
    """
    slots, kv_heads, head_dim, capacity = keys.shape
    grouped = query.reshape(slots, kv_heads, -1, head_dim)
    logits = scale * jnp.einsum(
        "bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32
    )
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    mask = visible(positions[:, None], jnp.arange(capacity)[None], window)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, _MASKED), axis=-1)
    return jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values).reshape(query.shape)
