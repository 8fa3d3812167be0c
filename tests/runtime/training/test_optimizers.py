"""Optimizers against their formulas in numpy and float64, over a few steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Lion, Muon, Sgd
from tunelang.runtime.models.primitives import parameter
from tunelang.runtime.training.optimizers import (
    NEWTON_SCHULZ,
    build_optimizer,
    is_matrix,
    learning_rate,
    orthogonalise,
    sides,
)

STEPS = 5
AXES = {
    "q": ("layers", "embed", "heads", "head_dim"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "scale": ("layers", "embed"),
    "q_bias": ("layers", "heads", "head_dim"),
    "table": ("vocab", "embed"),
    "norm": ("embed",),
}
SIZES = {"layers": 2, "embed": 4, "heads": 2, "head_dim": 3, "mlp": 5, "vocab": 7}
MATRICES = {"q", "up", "down", "table"}


def random_arrays(seed):
    """Draw an array for each name of `AXES`."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=[SIZES[axis] for axis in axes]) for name, axes in AXES.items()}


def as_params(values):
    """Turn arrays into parameters in float32, with their axes."""
    return nnx.State(
        {name: parameter(jnp.asarray(value, jnp.float32), *AXES[name])
         for name, value in values.items()}
    )  # fmt: skip


def train(spec):
    """Take a few steps with random gradients; returns parameters."""
    optimizer = build_optimizer(spec, STEPS)
    params = as_params(random_arrays(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for index in range(STEPS):
        params, state = step(params, state, as_params(random_arrays(index + 1)))
    return {name: np.asarray(value.get_value()) for name, value in params.items()}


def train_in_numpy(spec, rule):
    """Do the same with `rule(moments, name, gradient, value, decay, step) -> update` in numpy.

    The update is multiplied by minus the learning rate.
    """
    values, memory = random_arrays(0), {}
    for index in range(STEPS):
        gradients = random_arrays(index + 1)
        if spec.clip_norm is not None:
            total = np.sqrt(sum((g**2).sum() for g in gradients.values()))
            gradients = {n: g * min(1, spec.clip_norm / total) for n, g in gradients.items()}
        rate = spec.lr * (1 - index / STEPS)
        for name in values:
            decay = spec.weight_decay if name in MATRICES else 0
            moments = memory.setdefault(name, {"m": 0.0, "v": 0.0})
            update = rule(moments, name, gradients[name], values[name], decay, index + 1)
            values[name] = values[name] - rate * update
    return values


def adam(b1, b2, eps):
    """Kingma and Ba 2015, algorithm 1, with decoupled weight decay."""

    def rule(moments, name, g, x, decay, t):
        moments["m"] = b1 * moments["m"] + (1 - b1) * g
        moments["v"] = b2 * moments["v"] + (1 - b2) * g**2
        m, v = moments["m"] / (1 - b1**t), moments["v"] / (1 - b2**t)
        return m / (np.sqrt(v) + eps) + decay * x

    return rule


def lion(b1, b2):
    """Chen et al. 2023 (2302.06675), algorithm 2."""

    def rule(moments, name, g, x, decay, t):
        update = np.sign(b1 * moments["m"] + (1 - b1) * g)
        moments["m"] = b2 * moments["m"] + (1 - b2) * g
        return update + decay * x

    return rule


def sgd(momentum, nesterov):
    """Stochastic gradient descent, with weight decay added to the gradient."""

    def rule(moments, name, g, x, decay, t):
        g = g + decay * x
        moments["m"] = momentum * moments["m"] + g
        return g + momentum * moments["m"] if nesterov else moments["m"]

    return rule


def newton_schulz(x, iterations):
    """Iterate towards the nearest orthogonal matrix."""
    a, b, c = NEWTON_SCHULZ
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon(momentum, iterations):
    """Jordan 2024: orthogonalised momentum for matrices of blocks, Adam for the others."""
    other = adam(0.9, 0.999, 1e-8)

    def rule(moments, name, g, x, decay, t):
        if name not in {"q", "up", "down"}:
            return other(moments, name, g, x, decay, t)
        moments["m"] = momentum * moments["m"] + (1 - momentum) * g
        ahead = momentum * moments["m"] + (1 - momentum) * g
        rows = SIZES["mlp"] if name == "down" else SIZES["embed"]
        matrices = ahead.reshape(SIZES["layers"], rows, -1)
        columns = matrices.shape[-1]
        orthogonal = np.stack([newton_schulz(matrix, iterations) for matrix in matrices])
        return max(1, columns / rows) ** 0.5 * orthogonal.reshape(g.shape) + decay * x

    return rule


SHARED = {"lr": 0.1, "decay": "linear", "weight_decay": 0.3}
CASES = {
    "adamw": (AdamW(**SHARED, b1=0.8, b2=0.9, eps=1e-6), adam(0.8, 0.9, 1e-6)),
    "adamw, no clipping": (AdamW(**SHARED, clip_norm=None), adam(0.9, 0.999, 1e-8)),
    "lion": (Lion(**SHARED, b1=0.7, b2=0.9), lion(0.7, 0.9)),
    "sgd": (Sgd(**SHARED), sgd(0.0, False)),
    "momentum": (Sgd(**SHARED, momentum=0.9), sgd(0.9, False)),
    "nesterov": (Sgd(**SHARED, momentum=0.9, nesterov=True), sgd(0.9, True)),
    "muon": (Muon(**SHARED, momentum=0.9, iterations=4), muon(0.9, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_optimizer_equals_numpy(case):
    spec, rule = CASES[case]
    actual, expected = train(spec), train_in_numpy(spec, rule)
    for name in AXES:
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_muon_trains_vectors_at_adams_rate():
    plain = train(Muon(lr=0.1))
    other = train(Muon(lr=0.1, adam_lr=0.05))
    start = random_arrays(0)
    np.testing.assert_allclose(other["up"], plain["up"])
    np.testing.assert_allclose(
        other["norm"] - start["norm"], (plain["norm"] - start["norm"]) / 2, rtol=1e-4, atol=1e-6
    )


def test_orthogonalise_gives_singular_values_near_one():
    matrix = jax.random.normal(jax.random.key(0), (3, 12, 8))
    values = np.linalg.svd(orthogonalise(matrix, 5), compute_uv=False)
    assert ((values > 0.6) & (values < 1.3)).all()


def test_is_matrix_depends_on_the_axes():
    assert {name for name, axes in AXES.items() if is_matrix(axes)} == MATRICES
    assert sides(AXES["q"]) == [1, 2]
    assert sides(("expert", "mlp", "embed")) == [1, 1]
    assert is_matrix(("rank", "heads", "head_dim"))
    assert not is_matrix(("layers", "head_dim"))


@pytest.mark.parametrize(
    ("decay", "final", "rates"),
    [
        ("constant", 0.0, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.2, [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", 0.0, [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rate_follows_the_schedule(decay, final, rates):
    for warmup in (Measure(value=2, unit="steps"), Measure(value=1 / 3, unit="%")):
        spec = AdamW(lr=3.0, warmup=warmup, decay=decay, final=final)
        actual = [float(learning_rate(spec, 6)(step)) / 3 for step in range(6)]
        np.testing.assert_allclose(actual, rates, rtol=1e-5)


def test_warmup_longer_than_the_run_only_rises():
    rate = learning_rate(AdamW(lr=1.0, warmup=Measure(value=10, unit="steps"), decay="linear"), 4)
    np.testing.assert_allclose([float(rate(step)) for step in range(4)], [0.1, 0.2, 0.3, 0.4])
