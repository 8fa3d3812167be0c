"""Divergences and their gradients against TRL's generalised Jensen-Shannon loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.runtime.objectives.distill_losses import Divergence, divergence
from tunelang.runtime.training.cross_entropy import LogitInputs

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCAB = 3, 7, 6, 4, 29


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize(
    ("kind", "beta"),
    [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jensen_shannon", 0.5), ("jensen_shannon", 0.1)],
)
def test_divergence_and_gradients_equal_trl(kind, beta, temperature):
    """TRL's loss lacks the factor `T²` of ours."""
    from trl.experimental.gkd import GKDTrainer

    random = np.random.default_rng(0)
    sizes = (BATCH, LENGTH, WIDTH), (VOCAB, WIDTH), (BATCH, LENGTH, TEACHER_WIDTH)
    arrays = [random.normal(size=s) for s in (*sizes, (VOCAB, TEACHER_WIDTH))]
    labels = random.integers(0, VOCAB, (BATCH, LENGTH))
    labels[:, :2] = -100
    labels[0, 5:] = -100

    hidden, head, *teacher = (torch.tensor(array, dtype=torch.float64) for array in arrays)
    hidden.requires_grad_()
    head.requires_grad_()
    loss = GKDTrainer.generalized_jsd_loss(
        hidden @ head.T, teacher[0] @ teacher[1].T, torch.tensor(labels), beta, temperature,
        reduction="sum",
    )  # fmt: skip
    loss.backward()

    def ours(hidden, head):
        return divergence(
            LogitInputs(hidden, head), LogitInputs(*map(jnp.float32, arrays[2:])),
            jnp.int32(labels), jnp.float32(labels != -100), Divergence(kind, beta, temperature),
            chunk=3,
        )  # fmt: skip

    (total, parts), gradients = jax.jit(
        jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)
    )(*map(jnp.float32, arrays[:2]))  # fmt: skip
    np.testing.assert_allclose(parts.divergence, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(total, temperature**2 * loss.detach(), rtol=1e-5)
    for gradient, expected in zip(gradients, (hidden.grad, head.grad), strict=True):
        np.testing.assert_allclose(gradient, temperature**2 * expected, rtol=2e-5, atol=2e-5)
