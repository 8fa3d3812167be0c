"""Policy losses of every preset against the papers' equations, token by token in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.dsl.vocabulary.policy_stages import POLICIES, Policy
from tunelang.dsl.vocabulary.training import (
    K1,
    K2,
    K3,
    Clip,
    ClipWeights,
    Masked,
    Sampling,
    Truncated,
)
from tunelang.runtime.generation.token_sampling import token_log_probs
from tunelang.runtime.objectives import policy_gradient
from tunelang.runtime.objectives.policy_gradient import Completions, objective

SEQUENCES, LENGTH, MAX_TOKENS = 6, 7, 10


def make_stage(**choices) -> Policy:
    """Make a policy stage with some choices of the loss."""
    return Policy.model_construct(rollout=Sampling(max_tokens=MAX_TOKENS), **choices)


def preset_stage(name: str, **choices) -> Policy:
    """Make a policy stage of a preset, with changes."""
    return make_stage(**{**POLICIES[name][1], **choices})


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Log-probabilities, mask, advantages and entropy of random completions, in float64."""
    random = np.random.default_rng(3)
    shape = (SEQUENCES, LENGTH)
    mask = np.zeros(shape, bool)
    for row, (start, end) in enumerate([(1, 7), (2, 5), (0, 1), (3, 7), (1, 4), (2, 7)]):
        mask[row, start:end] = True
    old = -random.gamma(1.0, 1.0, shape)
    return {
        "now": old + random.normal(0, 0.3, shape),
        "mask": mask,
        "advantages": random.normal(0, 1, (SEQUENCES, 1)) * np.ones(shape),
        "old": old,
        "sampler": old + random.normal(0, 0.5, shape),
        "reference": old + random.normal(0, 0.4, shape),
        "entropy": random.gamma(2.0, 1.0, shape),
    }


def make_batch(arrays: dict[str, np.ndarray], rows: slice = slice(None)) -> Completions:
    """Turn some rows of `arrays` into the input of `objective`."""
    kinds = {name: bool if name == "mask" else np.float32 for name in arrays}
    return Completions(**{n: jnp.asarray(a[rows], kinds[n]) for n, a in arrays.items()})


def loss_and_gradient(chosen: Policy, completions: Completions):
    """Compute the mean loss, its gradient by log-probability, and the totals."""

    def loss(now):
        return objective(chosen, completions._replace(now=now))

    (total, totals), gradient = jax.value_and_grad(loss, has_aux=True)(completions.now)
    return float(total / totals.denominator), np.asarray(gradient / totals.denominator), totals


# The papers, one sequence at a time: `lp`, `old` are the tokens' log-probabilities, `adv` their
# advantages. Each gives what is to be maximised for each token. `frozen` is the policy at which
# the gradient is taken: what the paper puts in a stop-gradient is computed from it.


def ppo_clip(ratio, adv, low, high):
    """Compute the clipped surrogate of a token."""
    return min(ratio * adv, min(max(ratio, 1 - low), 1 + high) * adv)


def grpo(lp, old, adv, frozen):  # 2402.03300, equation 3
    return [ppo_clip(np.exp(p - o), a, 0.2, 0.2) for p, o, a in zip(lp, old, adv, strict=True)]


def dapo(lp, old, adv, frozen):  # 2503.14476, equation 8
    return [ppo_clip(np.exp(p - o), a, 0.2, 0.28) for p, o, a in zip(lp, old, adv, strict=True)]


def gspo(lp, old, adv, frozen):  # 2507.18071, equations 5 and 7; |y| equal terms, averaged
    s = (np.exp(lp.sum()) / np.exp(old.sum())) ** (1 / len(lp))
    return [ppo_clip(s, a, 3e-4, 4e-4) for a in adv]


def gspo_token(lp, old, adv, frozen):  # 2507.18071, equations 13 and 14
    s = (np.exp(frozen.sum()) / np.exp(old.sum())) ** (1 / len(lp))
    ratios = s * np.exp(lp) / np.exp(frozen)
    return [ppo_clip(r, a, 3e-4, 4e-4) for r, a in zip(ratios, adv, strict=True)]


def cispo(lp, old, adv, frozen):  # 2506.13585, section 3.1
    weights = [min(np.exp(f - o), 1 + 5.0) for f, o in zip(frozen, old, strict=True)]
    return [w * a * p for w, a, p in zip(weights, adv, lp, strict=True)]


def rloo(lp, old, adv, frozen):  # 2402.14740, with importance weights
    return [np.exp(p - o) * a for p, o, a in zip(lp, old, adv, strict=True)]


PAPERS = {
    "grpo": grpo, "dr_grpo": grpo, "dapo": dapo, "gspo": gspo, "gspo_token": gspo_token,
    "cispo": cispo, "rloo": rloo,
}  # fmt: skip


def by_paper(paper, aggregate: str, arrays: dict[str, np.ndarray], now, frozen) -> float:
    """Compute the loss of all sequences from the values of `paper` for each token."""
    total = tokens = 0.0
    for row in range(SEQUENCES):
        mask = arrays["mask"][row]
        inputs = [array[row][mask] for array in (now, arrays["old"], arrays["advantages"], frozen)]
        values = paper(*inputs)
        total += sum(values) / (len(values) if aggregate == "sequence_mean" else 1)
        tokens += len(values)
    over = {
        "token_mean": tokens,
        "sequence_mean": SEQUENCES,
        "fixed_length": SEQUENCES * MAX_TOKENS,
    }
    return -total / over[aggregate]


def finite_differences(function, point: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Estimate a gradient by central differences."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["far", "near"])
@pytest.mark.parametrize("name", POLICIES)
def test_presets_equal_their_papers(name, scale, arrays):
    # Near the old policy GSPO's narrow clip leaves sequences in, far from it cuts most.
    arrays = {**arrays, "now": arrays["old"] + scale * (arrays["now"] - arrays["old"])}
    stage = preset_stage(name)

    def reference(now):
        return by_paper(PAPERS[name], stage.aggregate, arrays, now, arrays["now"])

    loss, gradient, _ = loss_and_gradient(stage, make_batch(arrays))
    assert loss == pytest.approx(reference(arrays["now"]), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(
        gradient, finite_differences(reference, arrays["now"]), rtol=1e-3, atol=2e-6
    )
    assert np.abs(gradient).max() > 0
    assert not gradient[~arrays["mask"]].any()


def test_every_preset_has_a_paper():
    assert set(PAPERS) == set(POLICIES)


def test_rloo_with_fixed_length_sums_over_tokens(arrays):
    # The paper's action is the whole completion: its log-probability is a sum, not a mean.
    loss, gradient, _ = loss_and_gradient(
        preset_stage("rloo", aggregate="fixed_length"), make_batch(arrays)
    )

    def reference(now):
        return by_paper(rloo, "fixed_length", arrays, now, now)

    assert loss == pytest.approx(reference(arrays["now"]), rel=1e-5)
    np.testing.assert_allclose(
        gradient, finite_differences(reference, arrays["now"]), rtol=1e-3, atol=2e-6
    )


def test_cispo_clips_weights_below(arrays):
    arrays = {**arrays, "now": arrays["old"] - 2.0}
    stage = make_stage(clip=ClipWeights(low=0.1, high=5.0))
    _, gradient, totals = loss_and_gradient(stage, make_batch(arrays))
    expected = -0.9 * arrays["advantages"] * arrays["mask"] / arrays["mask"].sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert float(totals.sums["clip_low"]) == arrays["mask"].sum()


# Divergence.


def estimate(word, log_ratio):
    """Estimate the divergence by k1, k2 or k3."""
    r = np.exp(-log_ratio)  # pi_ref / pi
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": r - 1 - np.log(r)}[word]


@pytest.mark.parametrize("kl", [K1(coefficient=0.3), K2(coefficient=0.3), K3(coefficient=0.3)])
@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "fixed_length"])
def test_divergence_in_the_loss_equals_its_estimator(kl, aggregate, arrays):
    # Its value is the estimator weighted by pi / pi_old; its gradient is, for each of the three,
    # pi / pi_old * log(pi / pi_ref), that of the reverse divergence (2512.02556, equation 7).
    stage = make_stage(kl=kl, aggregate=aggregate)
    still = {**arrays, "advantages": np.zeros_like(arrays["advantages"])}
    loss, gradient, totals = loss_and_gradient(stage, make_batch(still))
    mask, now = arrays["mask"], arrays["now"]
    weight, log_ratio = np.exp(now - arrays["old"]), now - arrays["reference"]
    share = 1 / mask.sum(1, keepdims=True) if aggregate == "sequence_mean" else 1
    count = {"token_mean": mask.sum(), "sequence_mean": SEQUENCES, "fixed_length": SEQUENCES * 10}
    value = 0.3 * weight * estimate(kl.word, log_ratio) * mask * share / count[aggregate]
    assert loss == pytest.approx(value.sum(), rel=1e-5)
    np.testing.assert_allclose(
        gradient, 0.3 * weight * log_ratio * mask * share / count[aggregate], rtol=1e-4, atol=1e-7
    )
    kl_metric = float(policy_gradient.metrics(jnp.float32(0), totals)["kl"])
    assert kl_metric == pytest.approx(estimate(kl.word, log_ratio)[mask].mean(), rel=1e-5)


@pytest.mark.parametrize("kl", [K1(coefficient=1.0), K2(coefficient=1.0), K3(coefficient=1.0)])
def test_expected_gradient_equals_that_of_the_divergence(kl):
    # Over all tokens of a small vocabulary, weighted by the probability of drawing each.
    random = np.random.default_rng(5)
    theta, old, reference = (jnp.asarray(random.normal(0, 1, 5)) for _ in range(3))
    drawn = jax.nn.softmax(old)

    def expected(theta):
        log_probs = [jax.nn.log_softmax(logits)[:, None] for logits in (theta, old, reference)]
        log_probs[0] = log_probs[0].astype(jnp.float32)
        ones = jnp.ones((5, 1))
        terms = policy_gradient.divergence_term(
            kl, log_probs[0] - log_probs[2], log_probs[0] - log_probs[1]
        )
        return (drawn[:, None] * terms * ones).sum()

    def exact(theta):
        p = jax.nn.softmax(theta)
        return (p * (jnp.log(p) - jax.nn.log_softmax(reference))).sum()

    np.testing.assert_allclose(jax.grad(expected)(theta), jax.grad(exact)(theta), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("kl", [K1(coefficient=0.5), K2(coefficient=0.5), K3(coefficient=0.5)])
def test_divergence_of_a_model_from_itself_is_0(kl, temperature):
    logits = 4 * jax.random.normal(jax.random.key(1), (2, 3, 11))
    tokens = jax.random.randint(jax.random.key(2), (2, 3), 0, 11)
    hot = jnp.full((2, 3), temperature)

    def loss(logits):
        now = token_log_probs(logits, tokens, hot)
        reference = jax.lax.stop_gradient(now)
        zeros = jnp.zeros((2, 3))
        return objective(
            make_stage(kl=kl), Completions(now, zeros == 0, zeros, reference=reference)
        )

    (total, totals), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    assert float(total) == 0
    assert float(totals.sums["kl"]) == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("kl", [K1(coefficient=0.1, at="reward"), K3(coefficient=0.1, at="reward")])
def test_divergence_at_the_reward_is_subtracted(kl, arrays):
    rewards = np.arange(SEQUENCES, dtype=np.float32)
    log_probs = [jnp.asarray(arrays[n], jnp.float32) for n in ("old", "reference")]
    penalised = policy_gradient.penalised(
        jnp.asarray(rewards), kl, *log_probs, jnp.asarray(arrays["mask"])
    )
    log_ratio = arrays["old"] - arrays["reference"]
    penalty = (estimate(kl.word, log_ratio) * arrays["mask"]).sum(1)
    np.testing.assert_allclose(penalised, rewards - 0.1 * penalty, rtol=1e-5)
    with_kl = loss_and_gradient(make_stage(kl=kl), make_batch(arrays))
    without = loss_and_gradient(make_stage(), make_batch(arrays))
    np.testing.assert_array_equal(with_kl[1], without[1])


# Correction, entropy, aggregation.


@pytest.mark.parametrize("correction", [Truncated(limit=1.4), Masked(limit=1.4)])
def test_correction_scales_the_gradient(correction, arrays):
    stage = make_stage(correction=correction)
    loss, gradient, totals = loss_and_gradient(stage, make_batch(arrays))
    weight = np.exp(arrays["old"] - arrays["sampler"])
    corrected = np.minimum(weight, 1.4)
    if correction.word == "masked":
        corrected = np.where((weight > 1.4) | (weight < 1 / 1.4), 0, weight)
    mask = arrays["mask"]
    uncorrected = make_stage()
    _, plain, _ = loss_and_gradient(uncorrected, make_batch(arrays))
    np.testing.assert_allclose(gradient, plain * corrected, rtol=1e-4, atol=1e-7)
    metrics = policy_gradient.metrics(jnp.float32(loss), totals)
    assert float(metrics["correction"]) == pytest.approx(corrected[mask].mean(), rel=1e-5)
    assert float(metrics["correction_max"]) == pytest.approx(corrected[mask].max(), rel=1e-5)
    assert 0 < float(metrics["correction_cut"]) < 1


def test_mismatch_metrics_equal_numpy(arrays):
    _, _, totals = loss_and_gradient(make_stage(), make_batch(arrays))
    metrics = policy_gradient.metrics(jnp.float32(0), totals)
    gap = (arrays["old"] - arrays["sampler"])[arrays["mask"]]
    assert float(metrics["mismatch_error"]) == pytest.approx(np.exp(np.abs(gap)).mean(), rel=1e-5)
    assert float(metrics["mismatch_kl"]) == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-5)
    assert float(metrics["mismatch_max"]) == pytest.approx(np.abs(gap).max(), rel=1e-5)
    # These two models are far apart and exceed the bounds; a model and itself do not.
    for name, bound in policy_gradient.MISMATCH_BOUNDS.items():
        assert float(metrics[name]) > bound
    same = make_batch({**arrays, "sampler": arrays["old"]})
    metrics = policy_gradient.metrics(jnp.float32(0), loss_and_gradient(make_stage(), same)[2])
    for name, bound in policy_gradient.MISMATCH_BOUNDS.items():
        assert float(metrics[name]) < bound


def test_entropy_bonus_lowers_the_loss(arrays):
    base, _, _ = loss_and_gradient(make_stage(), make_batch(arrays))
    loss, _, totals = loss_and_gradient(make_stage(entropy=0.01), make_batch(arrays))
    mean = arrays["entropy"][arrays["mask"]].mean()
    assert loss == pytest.approx(base - 0.01 * mean, rel=1e-5)
    assert float(policy_gradient.metrics(jnp.float32(0), totals)["entropy"]) == pytest.approx(mean)

    def by_entropy(entropy):
        return objective(make_stage(entropy=0.01), make_batch(arrays)._replace(entropy=entropy))[0]

    slope = jax.grad(by_entropy)(make_batch(arrays).entropy)
    np.testing.assert_allclose(slope, -0.01 * arrays["mask"])


EVERYTHING = {
    "kl": K3(coefficient=0.1), "correction": Truncated(limit=2.0), "entropy": 0.01,
    "clip": Clip(low=0.1, high=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("choices", [{}, EVERYTHING], ids=["bare", "everything"])
def test_micro_batches_add_up_to_the_full_batch(name, choices, arrays):
    stage = preset_stage(name, **choices)
    full_loss, gradient, totals = loss_and_gradient(stage, make_batch(arrays))
    sums, summed, gradients = 0.0, None, []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6)):  # 6, 3 and 13 tokens
        micro_batch = make_batch(arrays, rows)
        loss, own_gradient, part_totals = loss_and_gradient(stage, micro_batch)
        sums += loss * float(part_totals.denominator)
        gradients.append(own_gradient * float(part_totals.denominator))
        summed = part_totals if summed is None else policy_gradient.add(summed, part_totals)
    assert sums / float(summed.denominator) == pytest.approx(full_loss, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(
        np.concatenate(gradients) / float(summed.denominator), gradient, rtol=1e-5, atol=1e-8
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, totals)


def test_scan_over_micro_batches_starts_from_zeros(arrays):
    stage = make_stage(**EVERYTHING)
    micro_batches = jax.tree.map(lambda a: a.reshape(3, 2, LENGTH), make_batch(arrays))

    @jax.jit
    def step(micro_batches):
        def body(carry, micro_batch):
            loss, totals = objective(stage, micro_batch)
            return (carry[0] + loss, policy_gradient.add(carry[1], totals)), None

        first = jax.tree.map(lambda a: a[0], micro_batches)
        shapes = jax.eval_shape(lambda micro_batch: objective(stage, micro_batch), first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return policy_gradient.metrics(*jax.lax.scan(body, zeros, micro_batches)[0])

    scanned, expected = (
        step(micro_batches),
        policy_gradient.metrics(*objective(stage, make_batch(arrays))),
    )
    assert set(scanned) == {
        "loss", "ratio", "ratio_max", "clip_low", "clip_high", "kl", "entropy", "correction",
        "correction_cut", "correction_max", "mismatch_kl", "mismatch_error", "mismatch_max",
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(scanned[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", POLICIES)
def test_prompt_and_padding_do_not_count(name, arrays):
    stage = preset_stage(name, **EVERYTHING)
    spoilt = {
        key: array if key == "mask" else np.where(arrays["mask"], array, np.nan)
        for key, array in arrays.items()
    }
    clean, dirty = (loss_and_gradient(stage, make_batch(inputs)) for inputs in (arrays, spoilt))
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[1], dirty[1])
    jax.tree.map(np.testing.assert_array_equal, clean[2], dirty[2])
    # Neither do rows without any token, such as those that fill up a last micro-batch.
    padded = {k: np.concatenate([a, np.zeros((2, LENGTH), a.dtype)]) for k, a in arrays.items()}
    longer = loss_and_gradient(stage, make_batch(padded))
    assert longer[0] == pytest.approx(clean[0], rel=1e-5, abs=1e-7)
    assert float(longer[2].denominator) == float(clean[2].denominator)
    empty = {**arrays, "mask": np.zeros_like(arrays["mask"])}
    loss, totals = objective(stage, make_batch(empty))
    assert all(float(value) == 0 for value in policy_gradient.metrics(loss, totals).values())


def test_missing_old_log_probs_are_those_of_the_policy(arrays):
    same = make_batch({**arrays, "old": arrays["now"]})
    for name in POLICIES:
        with_old = loss_and_gradient(preset_stage(name), same)
        without_old = loss_and_gradient(preset_stage(name), same._replace(old=None))
        np.testing.assert_array_equal(with_old[1], without_old[1])


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_extreme_ratios_stay_finite(ratio, gap, arrays):
    far = {**arrays, "now": arrays["old"] + gap}
    stage = make_stage(
        ratio=ratio, clip=None, kl=K3(coefficient=1.0), correction=Truncated(limit=2.0)
    )
    loss, gradient, totals = loss_and_gradient(stage, make_batch(far))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert all(
        np.isfinite(value) for value in policy_gradient.metrics(jnp.float32(loss), totals).values()
    )


@pytest.mark.parametrize(
    ("choices", "missing"),
    [
        ({"kl": K2(coefficient=0.1)}, "reference"),
        ({"correction": Masked(limit=2.0)}, "sampler"),
        ({"entropy": 0.1}, "entropy"),
    ],
)
def test_choice_without_its_input_is_an_error(choices, missing, arrays):
    with pytest.raises(ValueError, match=f"`{missing}`"):
        objective(make_stage(**choices), make_batch(arrays)._replace(**{missing: None}))
