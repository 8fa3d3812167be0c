"""Distillation losses against full logits in float64; memory and collectives of their programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.training_helpers import loop_bodies
from tunelang.runtime.objectives.distill_losses import (
    Divergence,
    TopK,
    attention_transfer,
    divergence,
    feature_transfer,
    layer_map,
    top_k,
)
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.cross_entropy import LogitInputs, cross_entropy

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCAB = 8, 10, 6, 4, 24
KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]
PAIRS = [("forward_kl", 5), ("reverse_kl", None), ("jensen_shannon", 5)]
PLAIN = {"beta": 0.3, "temperature": 1.0, "hard": 0.0, "chunk": 4}


def divergence_of(
    hidden,
    head,
    *arrays,
    stored=False,
    chunk,
    layout=None,
    student_cap=None,
    teacher_cap=None,
    **settings,
):
    """Call `divergence` on arrays: of the teacher or its `stored` tokens, targets and weights."""
    *teacher, targets, weights = arrays
    teacher = TopK(*teacher) if stored else LogitInputs(*teacher, teacher_cap)
    student = LogitInputs(hidden, head, student_cap)
    return divergence(
        student, teacher, targets, weights, Divergence(**settings), chunk=chunk, layout=layout
    )


@pytest.fixture(scope="module")
def logit_arrays():
    """Hidden states and head of student and teacher, targets and weights."""
    keys = jax.random.split(jax.random.key(0), 6)
    return (
        jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH)),
        jax.random.normal(keys[1], (VOCAB, WIDTH)),
        jax.random.normal(keys[2], (BATCH, LENGTH, TEACHER_WIDTH)),
        jax.random.normal(keys[3], (VOCAB, TEACHER_WIDTH)),
        jax.random.randint(keys[4], (BATCH, LENGTH), 0, VOCAB),
        jax.random.uniform(keys[5], (BATCH, LENGTH)),
    )


def full_logits(hidden, head, cap):
    """Compute logits of every token at once."""
    logits = hidden @ head.T
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def kl(p, q):
    """Compute the divergence of `q` from `p` over the last axis."""
    return jnp.sum(p * jnp.log(p / q), -1)


def full_divergence(
    logit_arrays, *, kind, beta, temperature, hard, k=None, student_cap=None, teacher_cap=None
):
    """Compute the loss, its parts, and the student's gradients in float64."""
    with jax.enable_x64(True):
        hidden, head, *teacher, targets, weights = (
            jnp.asarray(array, None if array.dtype == np.int32 else np.float64)
            for array in map(np.asarray, logit_arrays)
        )
        p = jax.nn.softmax(full_logits(*teacher, teacher_cap) / temperature)
        ids = jnp.argsort(-p)[..., :k]

        def outcomes(p):
            if k is None:
                return p
            chosen = jnp.take_along_axis(p, ids, -1)
            remainder = 1 - jnp.sum(chosen, -1, keepdims=True)
            return chosen if k == VOCAB else jnp.concatenate([chosen, remainder], -1)

        def loss(hidden, head):
            logits = full_logits(hidden, head, student_cap)
            t, s = outcomes(p), outcomes(jax.nn.softmax(logits / temperature))
            m = beta * t + (1 - beta) * s
            soft = {
                "forward_kl": kl(t, s),
                "reverse_kl": kl(s, t),
                "jensen_shannon": beta * kl(t, m) + (1 - beta) * kl(s, m),
            }[kind]
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
            parts = jnp.sum(weights * soft), -jnp.sum(weights * logp)
            return (1 - hard) * temperature**2 * parts[0] + hard * parts[1], parts

        result = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)
        return jax.tree.map(np.asarray, result)


def chunked_divergence(logit_arrays, *, k=None, layout=None, teacher_cap=None, **settings):
    """Compute the same by the functions under test; with `k`, the teacher is stored ahead."""
    *_, teacher_hidden, teacher_head, targets, weights = logit_arrays

    def loss(hidden, head):
        if k is None:
            return divergence_of(
                hidden, head, teacher_hidden, teacher_head, targets, weights,
                teacher_cap=teacher_cap, layout=layout, **settings,
            )  # fmt: skip
        teacher = LogitInputs(teacher_hidden, teacher_head, teacher_cap)
        stored = top_k(teacher, k=k, temperature=settings["temperature"], chunk=3, layout=layout)
        return divergence_of(
            hidden, head, *stored, targets, weights, stored=True, layout=layout, **settings
        )

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*logit_arrays[:2])


def assert_leaves_close(actual, expected, tolerance=2e-5):
    """Assert that the leaves of two trees agree, whatever their containers."""
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("k", "chunk", "mesh", "temperature", "hard", "caps"),
    [
        (None, 4, {}, 1.0, 0.0, (None, None)),
        (None, 3, {"fsdp": 8}, 0.7, 0.3, (3.0, 2.0)),
        (None, 1, {"data": 2, "tensor": 2}, 2.0, 0.3, (None, 2.0)),
        (5, 64, {}, 2.0, 0.3, (3.0, 2.0)),
        (5, 3, {"fsdp": 8}, 0.7, 0.3, (None, None)),
        (5, 4, {"data": 2, "tensor": 2}, 1.0, 0.3, (3.0, None)),
        (VOCAB, 4, {}, 2.0, 0.0, (None, 2.0)),
    ],
)
def test_divergence_equals_full_logits(logit_arrays, kind, k, chunk, mesh, temperature, hard, caps):
    settings = {
        "kind": kind, "beta": 0.3, "temperature": temperature, "hard": hard,
        "student_cap": caps[0], "teacher_cap": caps[1], "k": k,
    }  # fmt: skip
    layout = make_layout(**mesh) if mesh else None
    actual = chunked_divergence(logit_arrays, chunk=chunk, layout=layout, **settings)
    # The remaining mass is 1 less the stored masses, to the precision of 1.
    assert_leaves_close(actual, full_divergence(logit_arrays, **settings), 2e-4 if k == 5 else 2e-5)


@pytest.mark.parametrize("k", [None, 5])
def test_loss_without_gradients_is_the_same(logit_arrays, k):
    hidden, head, *teacher, targets, weights = logit_arrays
    settings = {**PLAIN, "kind": "jensen_shannon"}
    if k is None:
        actual = divergence_of(*logit_arrays, **settings)
    else:
        stored = top_k(LogitInputs(*teacher), k=k, temperature=1.0, chunk=4)
        actual = divergence_of(hidden, head, *stored, targets, weights, stored=True, **settings)
    assert_leaves_close(actual, chunked_divergence(logit_arrays, k=k, **settings)[0], 1e-6)


def test_hard_share_of_one_is_the_cross_entropy(logit_arrays):
    hidden, head, _, _, targets, weights = logit_arrays
    settings = {**PLAIN, "hard": 1.0, "temperature": 3.0}
    (total, parts), gradients = chunked_divergence(logit_arrays, kind="forward_kl", **settings)

    def loss(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=4)[0]

    expected = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert_leaves_close((total, gradients), expected)
    assert parts.cross_entropy == total


@pytest.mark.parametrize(("kind", "k"), PAIRS)
def test_divergence_of_a_teacher_from_itself_is_0(logit_arrays, kind, k):
    hidden, head, _, _, targets, weights = logit_arrays
    same = hidden, head, hidden, head, targets, weights
    (total, parts), gradients = chunked_divergence(same, kind=kind, k=k, **PLAIN)
    assert_leaves_close(
        (total, parts.divergence, gradients), (0.0, 0.0, (0.0 * hidden, 0.0 * head)), 5e-6
    )


@pytest.mark.parametrize(("kind", "k"), PAIRS)
def test_nan_without_weight_does_not_spread(logit_arrays, kind, k):
    hidden, head, teacher_hidden, teacher_head, targets, weights = logit_arrays
    weighted = jnp.arange(LENGTH) < jnp.arange(1, BATCH + 1)[:, None]
    weights = jnp.where(weighted, weights, 0.0)
    settings = {**PLAIN, "kind": kind, "hard": 0.3, "k": k}
    broken = (
        jnp.where(weighted[..., None], hidden, jnp.nan), head,
        jnp.where(weighted[..., None], teacher_hidden, jnp.nan), teacher_head,
        jnp.where(weighted, targets, -100), weights,
    )  # fmt: skip
    sums, (hidden_gradient, head_gradient) = chunked_divergence(broken, **settings)
    del settings["chunk"]
    expected = full_divergence(
        (hidden, head, teacher_hidden, teacher_head, targets, weights), **settings
    )
    assert_leaves_close((sums, (hidden_gradient, head_gradient)), expected)
    assert not jnp.any(hidden_gradient[~weighted])


@pytest.mark.parametrize(("kind", "k"), PAIRS)
def test_divergence_of_opposite_certainties_is_finite(logit_arrays, kind, k):
    """Masses that float32 rounds to 0 and 1 leave the loss and its gradients finite."""
    hidden, head, *_, targets, weights = logit_arrays
    opposite = 100 * hidden, head, -100 * hidden, head, targets, weights
    result = chunked_divergence(opposite, kind=kind, k=k, **PLAIN)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(result))


def test_bfloat16_inputs_get_bfloat16_gradients(logit_arrays):
    half = tuple(
        array if array.dtype == jnp.int32 else array.astype(jnp.bfloat16) for array in logit_arrays
    )
    result = chunked_divergence(half, kind="jensen_shannon", **PLAIN)
    assert [gradient.dtype for gradient in result[1]] == [jnp.bfloat16] * 2
    result = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), result)
    assert_leaves_close(
        result,
        full_divergence(half, kind="jensen_shannon", beta=0.3, temperature=1.0, hard=0.0),
        2e-2,
    )


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}])
def test_top_k_equals_full_logits(logit_arrays, mesh):
    hidden, head = logit_arrays[2:4]
    layout = make_layout(**mesh) if mesh else None
    stored = jax.jit(
        lambda hidden, head: top_k(
            LogitInputs(hidden, head, 2.0), k=5, temperature=0.7, chunk=4, layout=layout
        )
    )(hidden, head)
    logp = jax.nn.log_softmax(full_logits(hidden, head, 2.0) / 0.7)
    expected = jnp.argsort(-logp)[..., :5]
    assert stored[0].dtype == jnp.int32
    np.testing.assert_array_equal(stored[0], expected)
    assert_leaves_close(stored[1], jnp.take_along_axis(logp, expected, -1))


@pytest.mark.parametrize("stored", [False, True])
def test_programs_do_not_allocate_full_logits(stored):
    """Nor does the program of the loss alone compute gradients."""
    batch, length, vocab, k, chunk = 2, 256, 4096, 4, 4
    shapes = [(batch, length, 8), (vocab, 8)]
    teacher = [(batch, length, k)] * 2 if stored else [(batch, length, 16), (vocab, 16)]
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (*shapes, *teacher)]
    flat = [jax.ShapeDtypeStruct((batch, length), t) for t in (jnp.int32, jnp.float32)]
    if stored:
        shapes[2] = jax.ShapeDtypeStruct((batch, length, k), jnp.int32)

    def loss(*arrays):
        settings = {**PLAIN, "hard": 0.3, "chunk": chunk}
        return divergence_of(*arrays, kind="jensen_shannon", stored=stored, **settings)[0]

    logits = 4 * batch * length * vocab
    programs = [
        jax.jit(of).lower(*shapes, *flat).compile() for of in (loss, jax.grad(loss, argnums=(0, 1)))
    ]
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert max(memory) < logits / 4
    products = [len(re.findall(r" dot\(", program.as_text())) for program in programs]
    assert products == ([1, 3] if stored else [2, 4])


@pytest.mark.parametrize("function", ["divergence", "stored teacher", "top_k"])
def test_loop_over_chunks_has_no_collectives(logit_arrays, function):
    layout = make_layout(fsdp=8)
    settings = {
        **PLAIN,
        "kind": "forward_kl",
        "layout": layout,
        "stored": function == "stored teacher",
    }
    hidden, head, teacher_hidden, teacher_head, *flat = logit_arrays
    head, teacher_head = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8))) for a in (head, teacher_head))
    hidden, teacher_hidden = (
        jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % 8))) for a in (hidden, teacher_hidden)
    )
    if function == "top_k":
        logit_arrays, settings = (
            (hidden, head),
            {"k": 5, "temperature": 1.0, "chunk": 4, "layout": layout},
        )
    elif function == "divergence":
        logit_arrays = (hidden, head, teacher_hidden, teacher_head, *flat)
    else:
        stored = top_k(LogitInputs(teacher_hidden, teacher_head), k=5, temperature=1.0, chunk=4)
        logit_arrays = (hidden, head, *stored, *flat)

    def place(array):
        axes = ("vocab", "embed") if array.shape[0] == VOCAB else ("batch", None, None)
        return layout.sharding(axes[: array.ndim], array.shape)

    def loss(*arrays):
        if function == "top_k":
            return top_k(LogitInputs(*arrays), **settings)
        return divergence_of(*arrays, **settings)

    places = tuple(map(place, logit_arrays))
    program = jax.jit(
        loss if function == "top_k" else jax.grad(loss, argnums=(0, 1), has_aux=True),
        in_shardings=places, out_shardings=None if function == "top_k" else (places[:2], None),
    ).lower(*logit_arrays).compile().as_text()  # fmt: skip
    talk = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    assert re.search(talk, program)
    bodies = loop_bodies(program)
    assert bodies
    assert not any(re.search(talk, body) for body in bodies)


def test_layer_map_spreads_layers_evenly():
    assert layer_map(4, 12) == (2, 5, 8, 11)
    assert layer_map(3, 4) == (1, 2, 3)
    assert layer_map(3, 2) == (0, 1, 1)
    assert layer_map(2, 12, chosen=[0, 11]) == (0, 11)
    for wrong in ([0], [0, 12], [-1, 3]):
        with pytest.raises(ValueError, match="of 12 layers"):
            layer_map(2, 12, chosen=wrong)


@pytest.mark.parametrize("distance", ["squared", "kl"])
def test_attention_transfer_equals_numpy(distance):
    layers, batch, length = 2, 3, 5
    keys = jax.random.split(jax.random.key(1), 2)
    real = np.arange(length) < np.array([5, 3, 1])[:, None]
    mask = np.tril(np.ones((length, length), bool)) & real[:, None] & real[:, :, None]

    def maps(key, heads):
        logits = jax.random.normal(key, (layers, batch, heads, length, length))
        return jax.nn.softmax(jnp.where(mask[None, :, None], logits, -jnp.inf))

    student, teacher = maps(keys[0], 4), maps(keys[1], 2)
    s, t = (np.asarray(x, np.float64).mean(2) for x in (student, teacher))
    if distance == "squared":
        by_pair, slope = np.square(s - t), 2 * (s - t)
    else:
        ratio = np.where(mask, t, 1) / np.where(mask, s, 1)
        by_pair, slope = t * np.log(ratio), -ratio

    total, gradient = jax.value_and_grad(attention_transfer)(
        student,
        jnp.where(mask[None, :, None], teacher, jnp.nan),
        jnp.asarray(mask),
        distance=distance,
    )
    np.testing.assert_allclose(total, by_pair[:, mask].sum(), rtol=1e-5)
    expected = np.where(mask[None, :, None], slope[:, :, None] / 4, 0)
    assert_leaves_close(gradient, np.broadcast_to(expected, student.shape))


@pytest.mark.parametrize("pooling", ["token", "mean", "last"])
@pytest.mark.parametrize("distance", ["squared", "cosine"])
def test_feature_transfer_equals_a_loop(logit_arrays, pooling, distance):
    hidden, _, teacher_hidden, *_ = logit_arrays
    projection = jax.random.normal(jax.random.key(2), (WIDTH, TEACHER_WIDTH))
    lengths = np.array([0, 1, 4, LENGTH, 3, 2, 0, 7])
    mask = np.arange(LENGTH) < lengths[:, None]
    student, teacher = (
        jnp.where(mask[..., None], array, jnp.nan) for array in (hidden, teacher_hidden)
    )

    def expected(hidden, projection):
        total = 0.0
        for s, t, length in zip(hidden, teacher_hidden, lengths, strict=True):
            s, t = s[:length] @ projection, t[:length]
            if pooling == "mean" and length:
                s, t = s.mean(0, keepdims=True), t.mean(0, keepdims=True)
            if pooling == "last":
                s, t = s[length - 1 : length], t[length - 1 : length]
            if distance == "squared":
                total += jnp.sum(jnp.mean((s - t) ** 2, -1))
            else:
                sizes = jnp.linalg.norm(s, axis=-1) * jnp.linalg.norm(t, axis=-1)
                total += jnp.sum(1 - jnp.sum(s * t, -1) / sizes)
        return total

    def chunked(student, projection):
        return feature_transfer(
            student, teacher, projection, jnp.asarray(mask), pooling=pooling, distance=distance
        )

    options = {"argnums": (0, 1)}
    assert_leaves_close(
        jax.jit(jax.value_and_grad(chunked, **options))(student, projection),
        jax.jit(jax.value_and_grad(expected, **options))(hidden, projection),
    )
