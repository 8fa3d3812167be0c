"""Distillation: divergences in chunks over the sequence, and transfer of maps and features.

Logits of either model, `[batch, length, vocab]`, never exist as a whole: one scan goes over chunks
of the sequence for both. The teacher of a chunk is a hidden state and a head, or the
log-probabilities of its `k` likeliest tokens, stored ahead. As in `losses`, the gradient is
computed beside the loss, and each part of the batch has its own copy of the heads.

Sums are returned, which the caller divides. Only the student gets gradients. What lies outside a
mask, or where weights are 0, counts nothing even where it is not a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tunelang.runtime.sharding import Layout
from tunelang.runtime.training.cross_entropy import Split, chunk_logits, pick, with_head

Kind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


class Parts(NamedTuple):
    """Weighted sums over tokens, in nats, without gradients.

    The divergence is at the temperature and without its square; the cross entropy at 1.
    """

    divergence: jax.Array
    cross_entropy: jax.Array


class _Settings(NamedTuple):
    kind: Kind
    beta: float
    temperature: float
    hard: float
    student_cap: float | None
    teacher_cap: float | None


def divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    kind: Kind,
    beta: float,
    temperature: float,
    hard: float,
    chunk: int,
    student_cap: float | None = None,
    teacher_cap: float | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, Parts]:
    """Return the weighted sum of `(1 - hard) T² D + hard (-log p(target))`, and its parts.

    Hidden states `[batch, length, width]` and heads `[vocab, width]`, of one vocabulary, each model
    with its width; `targets` `[batch, length]` int32, `weights` `[batch, length]` float32. `chunk`
    is in tokens of a sequence; the caps bound the logits, as in `losses.cross_entropy`.

    With the teacher's `p` and the student's `q`, softmax of the logits over the temperature `T`,
    `D` is KL(p || q) as `forward_kl`, KL(q || p) as `reverse_kl`, and as `jensen_shannon`
    `beta KL(p || m) + (1 - beta) KL(q || m)` where `m = beta p + (1 - beta) q` and `beta` is above
    0 and below 1 (GKD, arXiv:2306.13649, equation 1). `T²` keeps the size of the divergence's
    gradient beside the hard loss's, which is at temperature 1 (arXiv:1503.02531, section 2); TRL
    leaves it out: its loss is `parts.divergence`.

    Differentiable once, in the student's hidden states and head; the teacher and the weights get
    no gradient.
    """
    split = Split.of(student_hidden.shape, chunk, layout)
    teacher, teacher_copies = with_head(teacher_hidden, teacher_head, split, layout)
    return _chunked(
        _Settings(kind, beta, temperature, hard, student_cap, teacher_cap),
        *with_head(student_hidden, student_head, split, layout),
        (teacher,), teacher_copies,
        split(targets), split(weights.astype(jnp.float32)),
    )  # fmt: skip


def top_k_divergence(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_ids: jax.Array,
    teacher_log_probs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    kind: Kind,
    beta: float,
    temperature: float,
    hard: float,
    chunk: int,
    student_cap: float | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, Parts]:
    """`divergence` from a teacher of which the likeliest tokens are known, and the rest as one.

    `teacher_ids` int32 and `teacher_log_probs`, both `[batch, length, k]`, are of `top_k` at this
    temperature. `D` is between distributions over these tokens and one outcome more for all others,
    so it is at most the divergence over the whole vocabulary, and equal to it where `k` is `vocab`.
    The teacher's mass on the rest is at least float32's epsilon.
    """
    split = Split.of(student_hidden.shape, chunk, layout)
    return _chunked(
        _Settings(kind, beta, temperature, hard, student_cap, None),
        *with_head(student_hidden, student_head, split, layout),
        (split(teacher_ids), split(teacher_log_probs.astype(jnp.float32))), None,
        split(targets), split(weights.astype(jnp.float32)),
    )  # fmt: skip


def top_k(
    hidden: jax.Array,
    head: jax.Array,
    *,
    k: int,
    temperature: float,
    chunk: int,
    cap: float | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The `k` likeliest tokens, int32, and their log-probabilities, float32; `[batch, length, k]`.

    Likeliest first; log-probabilities are of the whole vocabulary, in nats, of the logits over the
    temperature. Arguments as of `divergence`. Without gradients.
    """
    split = Split.of(hidden.shape, chunk, layout)
    states, copies = with_head(*jax.lax.stop_gradient((hidden, head)), split, layout)

    def body(_: None, hidden: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        logits = chunk_logits(hidden, copies, cap) / temperature
        return None, _likeliest(jax.nn.log_softmax(logits), k, layout)

    _, (log_probs, ids) = jax.lax.scan(body, None, states)
    return split.join(ids), split.join(log_probs)


def _likeliest(log_probs: jax.Array, k: int, layout: Layout | None) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of each part on its own devices; the compiler would gather all the parts."""

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
    """Log-probabilities of student and teacher, of each token or of the `k` and the rest."""
    logits = logits / settings.temperature
    if teacher_copies is not None:
        known = (
            chunk_logits(teacher[0], teacher_copies, settings.teacher_cap) / settings.temperature
        )
        return jax.nn.log_softmax(logits), jax.nn.log_softmax(known)
    ids, log_probs = teacher
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if ids.shape[-1] < logits.shape[-1]:
        others = jnp.where(_among(ids, logits), -jnp.inf, logits)
        others = jax.nn.logsumexp(others, axis=-1, keepdims=True)
        chosen = jnp.concatenate([chosen, others], axis=-1)
        rest = 1.0 - jnp.sum(jnp.exp(log_probs), axis=-1, keepdims=True)
        rest = jnp.log(jnp.maximum(rest, np.finfo(np.float32).eps))
        log_probs = jnp.concatenate([log_probs, rest], axis=-1)
    return jax.nn.log_softmax(chosen), log_probs


def _among(ids: jax.Array, logits: jax.Array) -> jax.Array:
    """Which of the logits are of these tokens, bool; split as they are, by `vmap` for each axis."""

    def mark(marked: jax.Array, ids: jax.Array) -> jax.Array:
        return marked.at[ids].set(True)

    for _ in ids.shape[:-1]:
        mark = jax.vmap(mark)
    return mark(jnp.zeros_like(logits, bool), ids)


def _divergence(student: jax.Array, teacher: jax.Array, settings: _Settings) -> jax.Array:
    """Divergence of log-probabilities over the last axis, in nats."""
    if settings.kind == "forward_kl":
        return _kl(teacher, student)
    if settings.kind == "reverse_kl":
        return _kl(student, teacher)
    beta = settings.beta
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
    """Weighted sum over a chunk, of logits `[parts, batch / parts, chunk, vocab]`; by `[parts]`."""
    soft = _divergence(*_outcomes(logits, teacher, teacher_copies, settings), settings)
    hard = jax.nn.logsumexp(logits, axis=-1) - pick(logits, targets)
    parts = Parts(*(jnp.sum(each * weights, axis=(1, 2)) for each in (soft, hard)))
    return _total(parts, settings), parts


def _total(parts: Parts, settings: _Settings) -> jax.Array:
    soft, hard = (jnp.sum(each) for each in parts)
    return (1.0 - settings.hard) * settings.temperature**2 * soft + settings.hard * hard


Found = tuple[jax.Array, Parts]
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
) -> Found:
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
) -> tuple[Found, Residuals]:
    """Return the loss with its parts, and its gradients for a cotangent of 1."""
    cap = settings.student_cap

    def body(carry: tuple[Parts, jax.Array], chunk: Any) -> tuple[tuple[Parts, jax.Array], Any]:
        sums, head_gradient = carry
        (hidden, teacher), targets, weights = chunk
        hidden, teacher = jax.tree.map(
            lambda array: jnp.where(weights[..., None] != 0, array, 0), (hidden, teacher)
        )
        logits = chunk_logits(hidden, copies, cap)
        gradient, found = jax.grad(_losses, has_aux=True)(
            logits, teacher, teacher_copies, targets, weights, settings
        )
        if cap is not None:
            gradient = gradient * (1.0 - jnp.square(logits / cap))
        gradient = gradient.astype(hidden.dtype)
        head_gradient += jnp.einsum(
            "pbcv,pbcd->pvd", gradient, hidden, preferred_element_type=jnp.float32
        )
        hidden_gradient = jnp.einsum("pbcv,pvd->pbcd", gradient, copies)
        return (jax.tree.map(jnp.add, sums, found), head_gradient), hidden_gradient

    zeros = jnp.zeros(copies.shape[0], jnp.float32)
    (sums, head_gradient), hidden_gradient = jax.lax.scan(
        body,
        (Parts(zeros, zeros), jnp.zeros_like(copies, dtype=jnp.float32)),
        ((hidden, teacher), targets, weights),
    )
    found = _total(sums, settings), jax.tree.map(jnp.sum, sums)
    return found, (hidden_gradient, head_gradient.astype(copies.dtype))


def _backward(
    settings: _Settings, residuals: Residuals, cotangents: Found
) -> tuple[jax.Array, jax.Array, None, None, None, None]:
    del settings
    hidden, head = ((gradient * cotangents[0]).astype(gradient.dtype) for gradient in residuals)
    return hidden, head, None, None, None, None


_chunked.defvjp(_forward, _backward)


def layer_map(
    student_layers: int, teacher_layers: int, given: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the teacher's layer, from 0, for each of the student's: the given, or uniform ones.

    Uniform: layer `i` of `n`, from 1, learns from `i N / n`, rounded up, of `N`; the last from the
    last (TinyBERT, arXiv:1909.10351, section 4.1). Raises `ValueError` where those given are not
    one for each layer of the student, or not among the teacher's.
    """
    if given is None:
        return tuple(
            -(-i * teacher_layers // student_layers) - 1 for i in range(1, student_layers + 1)
        )
    if len(given) != student_layers or not all(0 <= layer < teacher_layers for layer in given):
        raise ValueError(f"{given} for {student_layers} of {teacher_layers} layers")
    return tuple(given)


def attention_transfer(
    student_maps: jax.Array,
    teacher_maps: jax.Array,
    mask: jax.Array,
    *,
    distance: Literal["squared", "kl"],
) -> jax.Array:
    """Distance between maps of attention that are averaged over their heads, a scalar sum.

    Maps `[layers, batch, heads, queries, keys]` of probabilities, each model with its heads; the
    mask `[batch, queries, keys]` is true where a query may see a key. `squared` is summed over
    layers and pairs of the mask; `kl`, KL(teacher || student) in nats, over layers and queries.
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
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    projection: jax.Array,
    mask: jax.Array,
    *,
    pooling: Literal["token", "mean", "last"],
    distance: Literal["squared", "cosine"],
) -> jax.Array:
    """Distance between the student's features, projected, and the teacher's, a scalar sum.

    Features `[batch, length, width]`, `projection` `[student_width, teacher_width]`, `mask`
    `[batch, length]` bool. The distance is the mean over the width of squared differences, or 1
    less the cosine. It is summed over the tokens of the mask; or over sequences that have any,
    after their `mean` or `last` feature was taken.
    """
    student, teacher = (
        jnp.where(mask[..., None], hidden, 0)
        for hidden in (student_hidden, jax.lax.stop_gradient(teacher_hidden))
    )
    if pooling != "token":
        share = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        if pooling == "last":
            last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1, keepdims=True)
            share = mask & (jnp.arange(mask.shape[1]) == last)
        student, teacher = (
            jnp.einsum("bl,bld->bd", share.astype(jnp.float32), hidden.astype(jnp.float32))
            for hidden in (student, teacher)
        )
        mask = jnp.any(mask, axis=1)
    student = jnp.einsum(
        "...s,st->...t", student, projection.astype(student.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if distance == "squared":
        each = jnp.mean(jnp.square(student - teacher), axis=-1)
    else:
        each = 1.0 - jnp.sum(_unit(student) * _unit(teacher.astype(jnp.float32)), axis=-1)
    return jnp.sum(jnp.where(mask, each, 0.0))


def _unit(vectors: jax.Array) -> jax.Array:
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-16))
