"""Cross entropy and log-probabilities, in chunks over the sequence.

The logits of a batch, `[batch, length, vocab]`, are by far its largest array, so they never exist
as a whole: a scan goes over chunks of the sequence, and only one chunk's logits are in memory.

On several devices, each part of the batch gets its own copy of the head before the scan. So the
head is gathered once and not for every chunk; and its gradient, which is summed over the parts
where the copy was made, is exchanged once, after the scan.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Float, Float32, Int

from tunelang.runtime.sharding import Layout, constrain
from tunelang.runtime.user_functions import UserFunction


class LogitInputs(NamedTuple):
    """The inputs that the logits of a model are computed from, a chunk at a time."""

    hidden: Float[Array, "batch length width"]
    head: Float[Array, "vocab width"]
    cap: float | None = None
    """Bounds the logits, `cap * tanh(logits / cap)`."""


def cross_entropy(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    chunk: int,
    cap: float | None = None,
    layout: Layout | None = None,
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Return the weighted sum of `-log p(target)`, in nats, and the sum of the weights.

    Differentiable once, in all but the targets. The gradient is computed with the loss, so that the
    logits are computed once and not again in the backward pass.

    Args:
      hidden: Hidden states `[batch, length, width]`.
      head: `[vocab, width]`.
      targets: `[batch, length]`.
      weights: Of each token, `[batch, length]`.
      chunk: Tokens of a sequence whose logits are in memory at once.
      cap: Bounds the logits, `cap * tanh(logits / cap)`.
      layout: Where the arrays lie.

    References:
      Liger Kernel, arXiv:2410.10989, section 3.2.

    """
    split = Split.over(hidden.shape, chunk, layout)
    total = _chunked_cross_entropy(
        *with_head(hidden, head, split, layout), split(targets), split(weights.astype(jnp.float32)),
        cap,
    )  # fmt: skip
    return total, jnp.sum(weights, dtype=jnp.float32)


def custom_loss(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    function: UserFunction,
    *,
    chunk: int,
    cap: float | None = None,
    layout: Layout | None = None,
) -> Float[Array, ""]:
    """Return the weighted sum of the losses of tokens by a user's function.

    The function maps `logits` `[..., vocab]` and `targets` `[...]` to losses `[...]`. The other
    arguments are those of `cross_entropy`. The backward pass computes each chunk's logits again.
    """
    split = Split.over(hidden.shape, chunk, layout)
    parts, copies = with_head(hidden, head, split, layout)

    @jax.checkpoint
    def chunk_losses(copies: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = chunk_logits(hidden, copies, cap)
        losses: jax.Array = function(targets.shape, logits=logits, targets=targets)
        return losses

    def body(_: None, part: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        *inputs, weights = part
        # Padding behind a sequence may make a function NaN.
        losses = jnp.where(weights > 0, chunk_losses(copies, *inputs) * weights, 0.0)
        return None, jnp.sum(losses, axis=(1, 2))

    chunks = (parts, split(targets), split(weights.astype(jnp.float32)))
    _, sums = jax.lax.scan(body, None, chunks)
    return jnp.sum(sums)


def token_logprobs(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    *,
    chunk: int,
    cap: float | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
) -> Float32[Array, "batch length"]:
    """Return `log p(target)` of each token, in nats.

    The arguments are those of `cross_entropy`; the logits are divided by `temperature`, which is
    above 0, after the cap. The backward pass computes each chunk's logits again.
    """
    return _scores(hidden, head, targets, chunk, cap, temperature, layout, "none")[0]


def token_scores(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "vocab width"],
    targets: Int[Array, "batch length"],
    *,
    chunk: int,
    cap: float | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
    flows: bool = True,
) -> tuple[Float32[Array, "batch length"], Float32[Array, "batch length"]]:
    """Return the log-probability of each token, and the entropy of its distribution, in nats.

    Arguments and log-probabilities are those of `token_logprobs`. `flows` says whether the entropy
    has a gradient, which would be computed even where nothing reads it.
    """
    entropies: Entropies = "flows" if flows else "measured"
    log_probs, entropy = _scores(hidden, head, targets, chunk, cap, temperature, layout, entropies)
    assert entropy is not None
    return log_probs, entropy


Entropies = Literal["none", "measured", "flows"]
"""Whether entropies are computed, and whether a gradient flows through them."""


def _scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    chunk: int,
    cap: float | None,
    temperature: float,
    layout: Layout | None,
    entropies: Entropies,
) -> tuple[jax.Array, jax.Array | None]:
    split = Split.over(hidden.shape, chunk, layout)
    parts, copies = with_head(hidden, head, split, layout)

    @jax.checkpoint
    def chunk_scores(
        copies: jax.Array, hidden: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        logits = chunk_logits(hidden, copies, cap) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        entropy = None
        if entropies != "none":
            inputs = (logits, normaliser)
            values, log_sum = inputs if entropies == "flows" else jax.lax.stop_gradient(inputs)
            # As a product: XLA on CPUs takes four times as long over a sum next to that of `pick`.
            entropy = log_sum - jnp.einsum(
                "...v,...v->...", jnp.exp(values - log_sum[..., None]), values, precision="highest"
            )
        return pick(logits, targets) - normaliser, entropy

    def body(
        _: None, chunk: tuple[jax.Array, jax.Array]
    ) -> tuple[None, tuple[jax.Array, jax.Array | None]]:
        return None, chunk_scores(copies, *chunk)

    _, scores = jax.lax.scan(body, None, (parts, split(targets)))
    log_probs, entropy = jax.tree.map(split.join, scores)
    return log_probs, entropy


class Split:
    """The split of `[batch, length, ...]` into `[chunks, parts, rows, chunk, ...]`.

    Each device has one part, and all parts go through their chunks at once.
    """

    def __init__(
        self, batch: int, length: int, chunk: int, shards: int, length_shards: int
    ) -> None:
        """Split the batch into `shards`, and sequences into `length_shards` each."""
        self.shape = (shards, batch // shards, length_shards, length // length_shards)
        self.parts, self.length_shards = shards * length_shards, length_shards
        self.chunk = min(chunk, length // length_shards)
        self.chunks = -(-length // length_shards // self.chunk)

    @classmethod
    def over(cls, shape: tuple[int, ...], chunk: int, layout: Layout | None) -> Split:
        """Return the split of arrays `shape` over the parts of the batch."""
        batch, length, *_ = shape
        shards = 1 if layout is None or batch % layout.batch_shards else layout.batch_shards
        length_shards = 1 if layout is None else layout.length_shards(length)
        return cls(batch, length, chunk, shards, length_shards)

    def __call__(self, array: jax.Array) -> jax.Array:
        """Split, with zeros behind a part where the chunks do not divide it."""
        _, rows, _, length = self.shape
        tail = array.shape[2:]
        parts = array.reshape(*self.shape, *tail).swapaxes(1, 2).reshape(-1, rows, length, *tail)
        missing = self.chunks * self.chunk - length
        padded = jnp.pad(parts, ((0, 0), (0, 0), (0, missing), *((0, 0) for _ in tail)))
        return jnp.moveaxis(padded.reshape(self.parts, rows, self.chunks, self.chunk, *tail), 2, 0)

    def join(self, array: jax.Array) -> jax.Array:
        """Undo the split."""
        shards, rows, length_shards, length = self.shape
        tail = array.shape[4:]
        parts = jnp.moveaxis(array, 0, 2).reshape(self.parts, rows, -1, *tail)[:, :, :length]
        joined = parts.reshape(shards, length_shards, rows, length, *tail).swapaxes(1, 2)
        return joined.reshape(shards * rows, length_shards * length, *tail)


def with_head(
    hidden: jax.Array, head: jax.Array, split: Split, layout: Layout | None
) -> tuple[jax.Array, jax.Array]:
    """Split hidden states, and copy the head for each part, `[parts, vocab, width]`.

    Each device has the copy of its part. The head is gathered as it is used, and its gradient is
    scattered as it is summed: ahead of the backward pass of the layers, during which each device
    would otherwise hold all of it.
    """
    head = constrain(layout, head.astype(hidden.dtype), ("vocab", "embed"))
    axes = (
        "part" if split.length_shards > 1 else "batch" if split.parts > 1 else None,
        "vocab",
        None,
    )

    def copies_of(head: jax.Array) -> jax.Array:
        return constrain(layout, jnp.broadcast_to(head, (split.parts, *head.shape)), axes)

    if split.parts == 1:
        return split(hidden), copies_of(head)

    # The barrier: 30.1 -> 26.2 GiB of llama-3.1-70b on 64 v5p (2026-11, "Order of gradients" in
    # benchmarks/RESULTS.md). Delete when a rehearsal without it has this peak.
    @jax.custom_vjp
    def copy_head(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        return hidden, copies_of(head)

    def forward(
        hidden: CustomVJPPrimal, head: CustomVJPPrimal
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[()] | None]:
        return copy_head(hidden.value, head.value), () if head.perturbed else None

    def backward(
        trained: tuple[()] | None, gradients: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        hidden_gradient, copies_gradient = gradients
        if trained is None:  # nothing is to compute the head's gradient, which nothing reads
            return hidden_gradient, None
        head_gradient = jax.lax.reduce_sum(copies_gradient, (0,))
        head_gradient = constrain(layout, head_gradient, ("vocab", "embed"))
        barred: tuple[jax.Array, jax.Array] = jax.lax.optimization_barrier(
            (hidden_gradient, head_gradient)
        )
        return barred

    copy_head.defvjp(forward, backward, symbolic_zeros=True)
    hidden, copies = copy_head(hidden, head)
    return split(hidden), copies


def chunk_logits(hidden: jax.Array, copies: jax.Array, cap: float | None) -> jax.Array:
    """Return the capped logits `[parts, rows, chunk, vocab]` of a chunk, float32."""
    logits = jnp.einsum("pbcd,pvd->pbcv", hidden, copies, preferred_element_type=jnp.float32)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def pick(values: jax.Array, targets: jax.Array) -> jax.Array:
    """Return `values[..., target]` by comparison: it fuses and shards, which a gather does not."""
    return jnp.sum(jnp.where(_is_target(values, targets), values, 0.0), axis=-1)


def _is_target(values: jax.Array, targets: jax.Array) -> jax.Array:
    """Return whether each of `values` `[..., vocab]` is the target's, bool."""
    return (
        jax.lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1) == targets[..., None]
    )


# Logits are computed once, not again in the backward pass: three products with the head instead of
# four (not measured by itself). Delete when JAX can differentiate the body of a scan as it goes.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked_cross_entropy(
    hidden: jax.Array,
    copies: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    cap: float | None,
) -> jax.Array:
    def body(totals: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        hidden, targets, weights = chunk
        logits = chunk_logits(hidden, copies, cap)
        losses = jax.nn.logsumexp(logits, axis=-1) - pick(logits, targets)
        return totals + jnp.sum(losses * weights, axis=(1, 2)), None

    start = jnp.zeros(copies.shape[0], jnp.float32)
    totals, _ = jax.lax.scan(body, start, (hidden, targets, weights))
    return jnp.sum(totals)


Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _forward(
    hidden: jax.Array,
    copies: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    cap: float | None,
) -> tuple[jax.Array, Residuals]:
    """Return the loss, and its gradients for a cotangent of 1."""

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        totals, head_gradient = carry
        hidden, targets, weights = chunk
        logits = chunk_logits(hidden, copies, cap)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        losses = normaliser - pick(logits, targets)
        target = _is_target(logits, targets).astype(logits.dtype)
        gradient = (jnp.exp(logits - normaliser[..., None]) - target) * weights[..., None]
        if cap is not None:
            gradient = gradient * (1.0 - jnp.square(logits / cap))
        gradient = gradient.astype(hidden.dtype)
        hidden_gradient = jnp.einsum("pbcv,pvd->pbcd", gradient, copies)
        head_gradient += jnp.einsum(
            "pbcv,pbcd->pvd", gradient, hidden, preferred_element_type=jnp.float32
        )
        totals += jnp.sum(losses * weights, axis=(1, 2))
        return (totals, head_gradient), (hidden_gradient, losses)

    # Sums of each part, so that no device waits for the others within a chunk.
    zeros = jnp.zeros(copies.shape[0], jnp.float32)
    start = (zeros, jnp.zeros_like(copies, dtype=jnp.float32))
    (totals, head_gradient), (hidden_gradient, losses) = jax.lax.scan(
        body, start, (hidden, targets, weights)
    )
    return jnp.sum(totals), (hidden_gradient, head_gradient.astype(copies.dtype), losses)


def _backward(
    cap: float | None, residuals: Residuals, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    del cap
    hidden_gradient, head_gradient, losses = residuals
    return (
        (hidden_gradient.astype(cotangent.dtype) * cotangent).astype(hidden_gradient.dtype),
        (head_gradient.astype(cotangent.dtype) * cotangent).astype(head_gradient.dtype),
        None,
        losses * cotangent,
    )


_chunked_cross_entropy.defvjp(_forward, _backward)
