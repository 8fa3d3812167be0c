"""Distillation: divergences in chunks over the sequence, and transfer of maps and features.

Logits of either model, `[batch, length, vocab]`, never exist as a whole: one scan goes over chunks
of the sequence for both. The teacher of a chunk is a hidden state and a head, or the
log-probabilities of its `k` likeliest tokens, stored ahead. As in `cross_entropy`, the gradient
is computed with the loss, and each part of the batch has its own copy of the heads.

Sums are returned, which the caller divides. Only the student gets gradients. What lies outside a
mask, or where weights are 0, counts nothing even where it is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, PyTree

from tunelang.runtime.sharding import Layout
from tunelang.runtime.training.cross_entropy import (
    LogitInputs,
    Split,
    chunk_logits,
    pick,
    with_head,
)

Kind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


class TopK(NamedTuple):
    """A teacher's `k` likeliest tokens, likeliest first."""

    ids: Int[Array, "batch length k"]
    log_probs: Float[Array, "batch length k"]
    """Log-probabilities within the full vocabulary, in nats, of the logits over the temperature."""


class Divergence(NamedTuple):
    """The loss of a student: `(1 - hard) T² D + hard (-log p(target))`."""

    kind: Kind
    """With the teacher's `p` and the student's `q`, softmax of the logits over `T`, `D` is
    `KL(p || q)` (`forward_kl`), `KL(q || p)` (`reverse_kl`), or `beta KL(p || m) + (1 - beta)
    KL(q || m)` where `m = beta p + (1 - beta) q` (`jensen_shannon`)."""
    beta: float = 0.5
    """Above 0 and below 1."""
    temperature: float = 1.0
    """`T`, of both models' logits in `D`; `-log p(target)` is at temperature 1."""
    hard: float = 0.0
    """Share of the cross entropy with the targets."""


class Parts(NamedTuple):
    """Weighted sums over tokens, in nats, without gradients.

    The divergence is at the temperature and without its square; the cross entropy at 1.
    """

    divergence: jax.Array
    cross_entropy: jax.Array


class _Settings(NamedTuple):
    loss: Divergence
    student_cap: float | None
    teacher_cap: float | None


def divergence(
    student: LogitInputs,
    teacher: LogitInputs | TopK,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    loss: Divergence,
    *,
    chunk: int,
    layout: Layout | None = None,
) -> tuple[Float32[Array, ""], Parts]:
    """Compute the weighted sum of a divergence from a teacher, and its parts.

    Differentiable once, in the student's hidden states and head; the teacher and the weights get
    no gradient.

    Args:
      student: Hidden states `[batch, length, width]` and head `[vocab, width]`.
      teacher: The same with a width of its own; or its likeliest tokens at this temperature,
        `[batch, length, k]`. `D` is then between distributions over these tokens and one outcome
        more for all others, so it is at most the divergence over the whole vocabulary, and equal to
        it where `k` is `vocab`; the teacher's mass on the rest is at least float32's epsilon.
      targets: Of the cross entropy, `[batch, length]`.
      weights: Of each token, `[batch, length]`; 0 where nothing counts.
      loss: The divergence, its temperature, the share of the cross entropy.
      chunk: Tokens of a sequence whose logits are in memory at once.
      layout: Where the arrays lie.

    Returns:
      The sum, and its parts without gradients.

    References:
      GKD, arXiv:2306.13649, equation 1 (`jensen_shannon`). Hinton et al., arXiv:1503.02531, section
      2: `T²` keeps the size of the divergence's gradient next to the cross entropy's. TRL leaves it
      out: its loss is `parts.divergence`.

    """
    split = Split.over(student.hidden.shape, chunk, layout)
    teacher_inputs: tuple[jax.Array, ...]
    if isinstance(teacher, TopK):
        log_probs = teacher.log_probs.astype(jnp.float32)
        teacher_inputs, teacher_copies, teacher_cap = (
            (split(teacher.ids), split(log_probs)),
            None,
            None,
        )
    else:
        states, teacher_copies = with_head(teacher.hidden, teacher.head, split, layout)
        teacher_inputs, teacher_cap = (states,), teacher.cap
    return _chunked(
        _Settings(loss, student.cap, teacher_cap),
        *with_head(student.hidden, student.head, split, layout),
        teacher_inputs, teacher_copies,
        split(targets), split(weights.astype(jnp.float32)),
    )  # fmt: skip


def top_k(
    model: LogitInputs, *, k: int, temperature: float, chunk: int, layout: Layout | None = None
) -> TopK:
    """Return the `k` likeliest tokens of a model at each token, without gradients.

    Args:
      model: Hidden states `[batch, length, width]` and head `[vocab, width]`.
      k: How many tokens, at most `vocab`.
      temperature: The logits are divided by it, after the cap.
      chunk: Tokens of a sequence whose logits are in memory at once.
      layout: Where the arrays lie.

    """
    split = Split.over(model.hidden.shape, chunk, layout)
    states, copies = with_head(*jax.lax.stop_gradient((model.hidden, model.head)), split, layout)

    def body(_: None, hidden: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits = chunk_logits(hidden, copies, model.cap) / temperature
        return None, _likeliest(jax.nn.log_softmax(logits), k, layout)

    _, (log_probs, ids) = jax.lax.scan(body, None, states)
    return TopK(split.join(ids), split.join(log_probs))


def _likeliest(log_probs: jax.Array, k: int, layout: Layout | None) -> tuple[jax.Array, jax.Array]:
    """Return values and ids of the `k` largest, each part on its devices.

    Left to itself, the compiler would gather all the parts.
    """

    def top(log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, ids = jax.lax.top_k(log_probs, k)
        return values, ids

    if layout is None:
        return top(log_probs)
    parts = PartitionSpec(layout.spec(("batch",), log_probs.shape[:1])[0])
    sharded_top: Callable[[jax.Array], tuple[jax.Array, jax.Array]] = jax.shard_map(
        top, mesh=layout.mesh, in_specs=parts, out_specs=parts, check_vma=False
    )
    return sharded_top(log_probs)


def _outcomes(
    logits: jax.Array,
    teacher: tuple[jax.Array, ...],
    teacher_copies: jax.Array | None,
    settings: _Settings,
) -> tuple[jax.Array, jax.Array]:
    """Return log-probabilities of student and teacher.

    They are of each token, or of the `k` tokens and of all others together.
    """
    logits = logits / settings.loss.temperature
    if teacher_copies is not None:
        teacher_logits = chunk_logits(teacher[0], teacher_copies, settings.teacher_cap)
        teacher_logits = teacher_logits / settings.loss.temperature
        return jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher_logits)
    ids, log_probs = teacher
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if ids.shape[-1] < logits.shape[-1]:
        others = jnp.where(_among(ids, logits), -jnp.inf, logits)
        others = jax.nn.logsumexp(others, axis=-1, keepdims=True)
        chosen = jnp.concatenate([chosen, others], axis=-1)
        other_mass = 1.0 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
        other_log_prob = jnp.log(jnp.maximum(other_mass, np.finfo(np.float32).eps))
        log_probs = jnp.concatenate([log_probs, other_log_prob], axis=-1)
    return jax.nn.log_softmax(chosen), log_probs


def _among(ids: jax.Array, logits: jax.Array) -> jax.Array:
    """Return whether each of the logits is of one of these tokens.

    Marked by `vmap` over each axis, so that the result is split as the logits are.
    """

    def mark(marked: jax.Array, ids: jax.Array) -> jax.Array:
        return marked.at[ids].set(True)

    for _ in ids.shape[:-1]:
        mark = jax.vmap(mark)
    return mark(jnp.zeros_like(logits, bool), ids)


def _divergence(student: jax.Array, teacher: jax.Array, settings: _Settings) -> jax.Array:
    """Compute the divergence of log-probabilities over the last axis, in nats."""
    if settings.loss.kind == "forward_kl":
        return _kl(teacher, student)
    if settings.loss.kind == "reverse_kl":
        return _kl(student, teacher)
    beta = settings.loss.beta
    mixture = jnp.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _losses(
    logits: jax.Array,
    teacher: tuple[jax.Array, ...],
    teacher_copies: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    settings: _Settings,
) -> tuple[jax.Array, Parts]:
    """Compute the weighted sum over a chunk of logits `[parts, batch / parts, chunk, vocab]`.

    The parts of the loss are `[parts]`.
    """
    soft = _divergence(*_outcomes(logits, teacher, teacher_copies, settings), settings)
    hard = jax.nn.logsumexp(logits, axis=-1) - pick(logits, targets)
    parts = Parts(*(jnp.sum(losses * weights, axis=(1, 2)) for losses in (soft, hard)))
    return _total(parts, settings), parts


def _total(parts: Parts, settings: _Settings) -> jax.Array:
    soft, hard = (jnp.sum(part) for part in parts)
    share, temperature = settings.loss.hard, settings.loss.temperature
    return (1.0 - share) * temperature**2 * soft + share * hard


Loss = tuple[jax.Array, Parts]
Residuals = tuple[jax.Array, jax.Array]


# As in `cross_entropy`: the logits of both models are computed once.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    settings: _Settings,
    hidden: jax.Array,
    copies: jax.Array,
    teacher: tuple[jax.Array, ...],
    teacher_copies: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
) -> Loss:
    # The compiler drops the gradients, which nothing reads.
    return _forward(settings, hidden, copies, teacher, teacher_copies, targets, weights)[0]


def _forward(
    settings: _Settings,
    hidden: jax.Array,
    copies: jax.Array,
    teacher: tuple[jax.Array, ...],
    teacher_copies: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[Loss, Residuals]:
    """Return the loss with its parts, and its gradients for a cotangent of 1."""
    cap = settings.student_cap

    def body(
        carry: tuple[Parts, jax.Array], chunk: PyTree
    ) -> tuple[tuple[Parts, jax.Array], jax.Array]:
        sums, head_gradient = carry
        (hidden, teacher), targets, weights = chunk
        hidden, teacher = jax.tree.map(
            lambda array: jnp.where(weights[..., None] != 0, array, jnp.zeros((), array.dtype)),
            (hidden, teacher),
        )
        logits = chunk_logits(hidden, copies, cap)
        gradient, parts = jax.grad(_losses, has_aux=True)(
            logits, teacher, teacher_copies, targets, weights, settings
        )
        if cap is not None:
            gradient = gradient * (1.0 - jnp.square(logits / cap))
        gradient = gradient.astype(hidden.dtype)
        head_gradient += jnp.einsum(
            "pbcv,pbcd->pvd", gradient, hidden, preferred_element_type=jnp.float32
        )
        hidden_gradient = jnp.einsum("pbcv,pvd->pbcd", gradient, copies)
        return (jax.tree.map(jnp.add, sums, parts), head_gradient), hidden_gradient

    zeros = jnp.zeros(copies.shape[0], jnp.float32)
    (sums, head_gradient), hidden_gradient = jax.lax.scan(
        body,
        (Parts(zeros, zeros), jnp.zeros_like(copies, dtype=jnp.float32)),
        ((hidden, teacher), targets, weights),
    )
    loss = _total(sums, settings), jax.tree.map(jnp.sum, sums)
    return loss, (hidden_gradient, head_gradient.astype(copies.dtype))


def _backward(
    settings: _Settings, residuals: Residuals, cotangents: Loss
) -> tuple[jax.Array, jax.Array, None, None, None, None]:
    del settings
    loss = cotangents[0]
    hidden, head = (
        (gradient.astype(loss.dtype) * loss).astype(gradient.dtype) for gradient in residuals
    )
    return hidden, head, None, None, None, None


_chunked.defvjp(_forward, _backward)


def layer_map(
    student_layers: int, teacher_layers: int, chosen: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the teacher's layer, from 0, for each of the student's: the chosen, or uniform ones.

    Uniform: layer `i` of `n`, from 1, learns from `i N / n`, rounded up, of `N`; the last from the
    last.

    Raises:
      ValueError: Where those chosen are not one for each layer of the student, or not among the
        teacher's.

    References:
      TinyBERT, arXiv:1909.10351, section 4.1. For numbers that do not divide the paper says
      nothing.

    """
    if chosen is None:
        return tuple(
            -(-i * teacher_layers // student_layers) - 1 for i in range(1, student_layers + 1)
        )
    if len(chosen) != student_layers or not all(0 <= layer < teacher_layers for layer in chosen):
        raise ValueError(f"{chosen} for {student_layers} of {teacher_layers} layers")
    return tuple(chosen)


def attention_transfer(
    student_maps: Float[Array, "layers batch heads queries keys"],
    teacher_maps: Float[Array, "layers batch teacher_heads queries keys"],
    mask: Bool[Array, "batch queries keys"],
    *,
    distance: Literal["squared", "kl"],
) -> Float32[Array, ""]:
    """Sum the distance between maps of attention that are averaged over their heads.

    Args:
      student_maps: Probabilities, `[layers, batch, heads, queries, keys]`.
      teacher_maps: The same with the teacher's heads; carries no gradient.
      mask: True where a query may attend to a key, `[batch, queries, keys]`.
      distance: `squared`, summed over layers and pairs of the mask; `kl`, KL(teacher || student)
        in nats, over layers and queries.

    References:
      TinyBERT, arXiv:1909.10351, equation 7. Differs: maps are averaged over heads, so that both
      models may have their own number, and are probabilities, not logits.

    """
    shown = mask[None, :, None]
    student, teacher = (
        jnp.mean(jnp.where(shown, maps, 0), axis=2, dtype=jnp.float32)
        for maps in (student_maps, jax.lax.stop_gradient(teacher_maps))
    )
    if distance == "squared":
        return jnp.sum(jnp.square(student - teacher))
    tiny = np.finfo(np.float32).tiny
    ratio = jnp.log(jnp.maximum(teacher, tiny)) - jnp.log(jnp.maximum(student, tiny))
    return jnp.sum(teacher * ratio)


def feature_transfer(
    student_hidden: Float[Array, "batch length width"],
    teacher_hidden: Float[Array, "batch length teacher_width"],
    projection: Float[Array, "width teacher_width"],
    mask: Bool[Array, "batch length"],
    *,
    pooling: Literal["token", "mean", "last"],
    distance: Literal["squared", "cosine"],
) -> Float32[Array, ""]:
    """Sum the distance between the student's features, projected, and the teacher's.

    Args:
      student_hidden: Features `[batch, length, width]`.
      teacher_hidden: Features `[batch, length, teacher_width]`; carries no gradient.
      projection: Of the student's features, `[width, teacher_width]`.
      mask: True on the tokens that count, `[batch, length]`.
      pooling: `token`, summed over the tokens of the mask; `mean` or `last`, over sequences that
        have any, of their mean or last feature.
      distance: `squared`, the mean over the width of squared differences; `cosine`, 1 less the
        cosine.

    References:
      TinyBERT, arXiv:1909.10351, equation 8 (`token`, `squared`).

    """
    student, teacher = (
        jnp.where(mask[..., None], hidden, 0)
        for hidden in (student_hidden, jax.lax.stop_gradient(teacher_hidden))
    )
    if pooling != "token":
        counts = mask.astype(jnp.float32)
        shares = counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
        if pooling == "last":
            places = jnp.arange(mask.shape[1])[None]
            last = jnp.max(jnp.where(mask, places, 0), axis=1, keepdims=True)
            shares = (mask & (places == last)).astype(jnp.float32)
        student, teacher = (
            jnp.einsum("bl,bld->bd", shares, hidden.astype(jnp.float32))
            for hidden in (student, teacher)
        )
        mask = jnp.any(mask, axis=1)
    student = jnp.einsum(
        "...s,st->...t", student, projection.astype(student.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if distance == "squared":
        distances = jnp.mean(jnp.square(student - teacher), axis=-1)
    else:
        distances = 1.0 - jnp.sum(_unit(student) * _unit(teacher.astype(jnp.float32)), axis=-1)
    return jnp.sum(jnp.where(mask, distances, 0.0))


def _unit(vectors: jax.Array) -> jax.Array:
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))
