"""Attention kernels that never hold all logits: cuDNN's over split sequences and sweeps, splash.

`attention.self_attention` chooses among them. They are tested against `attention.plain_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, PyTree

from tunelang.runtime.sharding import Layout

SPLASH_BLOCK = 512
"""The most queries or keys that the splash kernel works on at once."""

Query = Float[Array, "batch length heads head_dim"]
Keys = Float[Array, "batch length kv_heads head_dim"]
Segments = Int[Array, "batch length"]
Attend = Callable[[Array, Array, Array, Array], Array]
"""`(query, key, value, segments) -> attended`."""
Result = TypeVar("Result")


# cuDNN's kernel has no batching rule with masks (jax 0.10.2): without this, branches of a sweep
# could not use it. Delete when `jax.vmap` of `jax.nn.dot_product_attention` with cuDNN and a mask
# compiles.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_branches(
    query: Query, key: Keys, value: Keys, segments: Segments, attend: Attend
) -> Query:
    """Attend in the rows of all branches at once, where this is called under `vmap`.

    The backward pass runs the forward pass again.
    """
    return _with_merged_rows(attend)(query, key, value, segments)


def _branches_forward(
    query: Array, key: Array, value: Array, segments: Array, attend: Attend
) -> tuple[Array, tuple[Array, ...]]:
    return attend_branches(query, key, value, segments, attend), (query, key, value, segments)


def _branches_backward(
    attend: Attend, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array | np.ndarray, ...]:
    def differentiate(
        query: Array, key: Array, value: Array, segments: Array, gradient: Array
    ) -> tuple[Array, ...]:
        _, pull = jax.vjp(
            lambda query, key, value: attend(query, key, value, segments), query, key, value
        )
        gradients: tuple[Array, ...] = pull(gradient)
        return gradients

    gradients = _with_merged_rows(differentiate)(*residuals, gradient)
    return (*gradients, np.zeros(residuals[-1].shape, jax.dtypes.float0))


attend_branches.defvjp(_branches_forward, _branches_backward)


def _with_merged_rows(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function of arrays `[rows, ...]` that under `vmap` is called once, with all rows."""
    with_rule = jax.custom_batching.custom_vmap(function)

    @with_rule.def_vmap
    def rule(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[Result, PyTree]:
        def merge(array: Array, is_batched: bool) -> Array:
            every = array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            # Rows first: they are split over devices, branches are not.
            return every.swapaxes(0, 1).reshape(-1, *every.shape[2:])

        def unmerge(array: Array) -> Array:
            return array.reshape(-1, size, *array.shape[1:]).swapaxes(0, 1)

        results = function(*map(merge, arrays, batched))
        return jax.tree.map(unmerge, results), jax.tree.map(lambda _: True, results)

    return with_rule


def split_cudnn(
    query: Query,
    key: Keys,
    value: Keys,
    mask: Bool[Array, "rows length length"],
    scale: float,
    layout: Layout,
) -> Query:
    """Attend by cuDNN's kernel within sequences that are split over devices.

    Each device runs its own queries, with a mask `[batch or 1, queries, keys]`, since these do not
    begin where the keys do.
    """
    queries, keys = _specs(query, key, layout)
    rows, length, *_ = queries
    mask_spec = PartitionSpec(rows if mask.shape[0] == query.shape[0] else None, None, length)

    def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation="cudnn"
        )

    on_devices: Callable[..., Array] = jax.shard_map(
        attend,
        mesh=layout.mesh,
        in_specs=(queries, keys, keys, mask_spec),
        out_specs=queries,
        check_vma=False,
    )
    return on_devices(query, key, value, mask[:, None])


def _specs(query: Array, key: Array, layout: Layout) -> tuple[PartitionSpec, PartitionSpec]:
    """Return how queries and how keys are split over devices.

    Heads are split where keys are too, so that each device has those of its queries; or where all
    of them share one key.
    """
    rows = layout.spec(("batch",), query.shape[:1])[0]
    length = layout.spec(("length",), query.shape[1:2])[0]
    keys = layout.spec(("kv_heads",), (key.shape[2],))[0]
    heads = layout.spec(("heads",), (query.shape[2],))[0] if key.shape[2] == 1 else keys
    return PartitionSpec(rows, length, heads), PartitionSpec(rows, None, keys)


def splash(
    query: Query,
    key: Keys,
    value: Keys,
    segments: Segments,
    window: int | None,
    cap: float | None,
    layout: Layout | None,
) -> Query:
    """Attend by JAX's splash kernel for TPUs; on other devices it is interpreted.

    Queries are scaled already. The length, or of sequences that are split their part, has to be a
    multiple of 128. A device runs its own rows, heads and queries.
    """
    devices = jax.devices() if layout is None else layout.mesh.devices.flat
    interpret = next(iter(devices)).platform != "tpu"
    if layout is None:
        kernel = _splash_kernel(query, window, cap, 1, 1, interpret)
        return _run_splash(kernel, query, key, value, segments, segments)
    queries, keys = _specs(query, key, layout)
    rows, length, heads = queries
    length_shards = layout.length_shards(query.shape[1])
    head_shards = 1 if heads is None else layout.mesh.shape["tensor"]
    kernel = _splash_kernel(query, window, cap, length_shards, head_shards, interpret)
    mask_places = NamedSharding(layout.mesh, PartitionSpec(None, length))
    on_devices: Callable[..., Array] = jax.shard_map(
        _run_splash,
        mesh=layout.mesh,
        in_specs=(
            kernel.manual_sharding_spec(mask_places), queries, keys, keys,
            PartitionSpec(rows, length), PartitionSpec(rows),
        ),
        out_specs=queries,
        check_vma=False,
    )  # fmt: skip
    return on_devices(kernel, query, key, value, segments, segments)


SplashKernel = splash_attention.splash_attention_kernel.SplashAttentionKernel


def _splash_kernel(
    query: Array,
    window: int | None,
    cap: float | None,
    length_shards: int,
    head_shards: int,
    interpret: bool,
) -> SplashKernel:
    """Make the kernel for the heads and queries of a device."""
    length = query.shape[1]
    block = next(size for size in (SPLASH_BLOCK, 256, 128) if length // length_shards % size == 0)
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
    kernel: SplashKernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * (query.shape[2] // head_shards)),
        block_sizes=sizes,
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=length_shards,
        interpret=interpret,
    )
    return kernel


def _run_splash(
    kernel: SplashKernel,
    query: Array,
    key: Array,
    value: Array,
    query_segments: Array,
    key_segments: Array,
) -> Array:
    """Run the kernel on each row of a device."""

    def run_row(query: Array, key: Array, value: Array, *segments: Array) -> Array:
        ids = splash_attention.SegmentIds(*segments)
        return cast(Array, kernel(query, key, value, segment_ids=ids))

    query, key, value = (array.swapaxes(1, 2) for array in (query, key, value))
    return jax.vmap(run_row)(query, key, value, query_segments, key_segments).swapaxes(1, 2)
