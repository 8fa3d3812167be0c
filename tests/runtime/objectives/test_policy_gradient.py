"""Every row of choices against the papers' equations, written out token by token in float64."""

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


def policy(**choices) -> Policy:
    return Policy.model_construct(rollout=Sampling(max_tokens=MAX_TOKENS), **choices)


def row(name: str, **choices) -> Policy:
    return policy(**{**POLICIES[name][1], **choices})


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    shape = (SEQUENCES, LENGTH)
    mask = np.zeros(shape, bool)
    for at, (start, end) in enumerate([(1, 7), (2, 5), (0, 1), (3, 7), (1, 4), (2, 7)]):
        mask[at, start:end] = True
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


def batch(arrays: dict[str, np.ndarray], rows: slice = slice(None)) -> Completions:
    kinds = {name: bool if name == "mask" else np.float32 for name in arrays}
    return Completions(**{n: jnp.asarray(a[rows], kinds[n]) for n, a in arrays.items()})


def loss_and_gradient(chosen: Policy, completions: Completions):
    def loss(now):
        return objective(chosen, completions._replace(now=now))

    (total, totals), gradient = jax.value_and_grad(loss, has_aux=True)(completions.now)
    return float(total / totals.denominator), np.asarray(gradient / totals.denominator), totals


# The papers, one sequence at a time: `lp`, `old` are the tokens' log-probabilities, `adv` their
# advantages. Each gives what is to be maximised for each token. `frozen` is the policy at which
# the gradient is taken: what the paper puts in a stop-gradient is computed from it.


def ppo_clip(ratio, adv, low, high):
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
    """The loss of all sequences, from the values of `paper` for each token."""
    total = tokens = 0.0
    for at in range(SEQUENCES):
        on = arrays["mask"][at]
        of = [each[at][on] for each in (now, arrays["old"], arrays["advantages"], frozen)]
        values = paper(*of)
        total += sum(values) / (len(values) if aggregate == "sequence_mean" else 1)
        tokens += len(values)
    over = {
        "token_mean": tokens,
        "sequence_mean": SEQUENCES,
        "fixed_length": SEQUENCES * MAX_TOKENS,
    }
    return -total / over[aggregate]


def finite_differences(function, at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["far", "near"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_row_is_its_paper(name, scale, arrays):
    # Near the old policy GSPO's narrow clip leaves sequences in, far from it cuts most.
    arrays = {**arrays, "now": arrays["old"] + scale * (arrays["now"] - arrays["old"])}
    chosen = row(name)

    def reference(now):
        return by_paper(PAPERS[name], chosen.aggregate, arrays, now, arrays["now"])

    loss, gradient, _ = loss_and_gradient(chosen, batch(arrays))
    assert loss == pytest.approx(reference(arrays["now"]), rel=2e-5, abs=1e-6)
    np.testing.assert_allclose(
        gradient, finite_differences(reference, arrays["now"]), rtol=1e-3, atol=2e-6
    )
    assert np.abs(gradient).max() > 0
    assert not gradient[~arrays["mask"]].any()


def test_every_row_is_tested():
    assert set(PAPERS) == set(POLICIES)


def test_rloo_paper_sums_over_tokens(arrays):
    # The paper's action is the whole completion: its log-probability is a sum, not a mean.
    loss, gradient, _ = loss_and_gradient(row("rloo", aggregate="fixed_length"), batch(arrays))

    def reference(now):
        return by_paper(rloo, "fixed_length", arrays, now, now)

    assert loss == pytest.approx(reference(arrays["now"]), rel=1e-5)
    np.testing.assert_allclose(
        gradient, finite_differences(reference, arrays["now"]), rtol=1e-3, atol=2e-6
    )


def test_cispo_lower_bound(arrays):
    arrays = {**arrays, "now": arrays["old"] - 2.0}
    chosen = policy(clip=ClipWeights(low=0.1, high=5.0))
    _, gradient, totals = loss_and_gradient(chosen, batch(arrays))
    expected = -0.9 * arrays["advantages"] * arrays["mask"] / arrays["mask"].sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    assert float(totals.sums["clip_low"]) == arrays["mask"].sum()


# Divergence.


def estimate(word, log_ratio):
    r = np.exp(-log_ratio)  # pi_ref / pi
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": r - 1 - np.log(r)}[word]


@pytest.mark.parametrize("kl", [K1(coefficient=0.3), K2(coefficient=0.3), K3(coefficient=0.3)])
@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "fixed_length"])
def test_divergence_in_the_loss(kl, aggregate, arrays):
    # Its value is the estimator weighted by pi / pi_old; its gradient is, for each of the three,
    # pi / pi_old * log(pi / pi_ref), that of the reverse divergence (2512.02556, equation 7).
    chosen = policy(kl=kl, aggregate=aggregate)
    still = {**arrays, "advantages": np.zeros_like(arrays["advantages"])}
    loss, gradient, totals = loss_and_gradient(chosen, batch(still))
    on, now = arrays["mask"], arrays["now"]
    weight, log_ratio = np.exp(now - arrays["old"]), now - arrays["reference"]
    each = 1 / on.sum(1, keepdims=True) if aggregate == "sequence_mean" else 1
    over = {"token_mean": on.sum(), "sequence_mean": SEQUENCES, "fixed_length": SEQUENCES * 10}
    value = 0.3 * weight * estimate(kl.word, log_ratio) * on * each / over[aggregate]
    assert loss == pytest.approx(value.sum(), rel=1e-5)
    np.testing.assert_allclose(
        gradient, 0.3 * weight * log_ratio * on * each / over[aggregate], rtol=1e-4, atol=1e-7
    )
    kl_metric = float(policy_gradient.metrics(jnp.float32(0), totals)["kl"])
    assert kl_metric == pytest.approx(estimate(kl.word, log_ratio)[on].mean(), rel=1e-5)


@pytest.mark.parametrize("kl", [K1(coefficient=1.0), K2(coefficient=1.0), K3(coefficient=1.0)])
def test_gradient_in_the_mean_is_the_divergence_own(kl):
    # Over all tokens of a small vocabulary, weighted by the probability of drawing each.
    random = np.random.default_rng(5)
    theta, old, reference = (jnp.asarray(random.normal(0, 1, 5)) for _ in range(3))
    drawn = jax.nn.softmax(old)

    def expected(theta):
        log_probs = [jax.nn.log_softmax(each)[:, None] for each in (theta, old, reference)]
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
        return objective(policy(kl=kl), Completions(now, zeros == 0, zeros, reference=reference))

    (total, totals), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    assert float(total) == 0
    assert float(totals.sums["kl"]) == 0
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("kl", [K1(coefficient=0.1, at="reward"), K3(coefficient=0.1, at="reward")])
def test_divergence_off_the_reward(kl, arrays):
    rewards = np.arange(SEQUENCES, dtype=np.float32)
    given = [jnp.asarray(arrays[n], jnp.float32) for n in ("old", "reference")]
    found = policy_gradient.penalised(jnp.asarray(rewards), kl, *given, jnp.asarray(arrays["mask"]))
    log_ratio = arrays["old"] - arrays["reference"]
    taken = (estimate(kl.word, log_ratio) * arrays["mask"]).sum(1)
    np.testing.assert_allclose(found, rewards - 0.1 * taken, rtol=1e-5)
    with_kl = loss_and_gradient(policy(kl=kl), batch(arrays))
    without = loss_and_gradient(policy(), batch(arrays))
    np.testing.assert_array_equal(with_kl[1], without[1])


# Correction, entropy, aggregation.


@pytest.mark.parametrize("correction", [Truncated(limit=1.4), Masked(limit=1.4)])
def test_correction_for_the_sampler(correction, arrays):
    chosen = policy(correction=correction)
    loss, gradient, totals = loss_and_gradient(chosen, batch(arrays))
    weight = np.exp(arrays["old"] - arrays["sampler"])
    held = np.minimum(weight, 1.4)
    if correction.word == "masked":
        held = np.where((weight > 1.4) | (weight < 1 / 1.4), 0, weight)
    on = arrays["mask"]
    bare = policy()
    _, plain, _ = loss_and_gradient(bare, batch(arrays))
    np.testing.assert_allclose(gradient, plain * held, rtol=1e-4, atol=1e-7)
    found = policy_gradient.metrics(jnp.float32(loss), totals)
    assert float(found["correction"]) == pytest.approx(held[on].mean(), rel=1e-5)
    assert float(found["correction_max"]) == pytest.approx(held[on].max(), rel=1e-5)
    assert 0 < float(found["correction_cut"]) < 1


def test_mismatch_is_measured_with_and_without_correction(arrays):
    _, _, totals = loss_and_gradient(policy(), batch(arrays))
    found = policy_gradient.metrics(jnp.float32(0), totals)
    gap = (arrays["old"] - arrays["sampler"])[arrays["mask"]]
    assert float(found["mismatch_error"]) == pytest.approx(np.exp(np.abs(gap)).mean(), rel=1e-5)
    assert float(found["mismatch_kl"]) == pytest.approx((np.exp(gap) - 1 - gap).mean(), rel=1e-5)
    assert float(found["mismatch_max"]) == pytest.approx(np.abs(gap).max(), rel=1e-5)
    # These two models are far apart: the bounds say so, and hold for one and the same.
    for name, bound in policy_gradient.MISMATCH_BOUNDS.items():
        assert float(found[name]) > bound
    same = batch({**arrays, "sampler": arrays["old"]})
    found = policy_gradient.metrics(jnp.float32(0), loss_and_gradient(policy(), same)[2])
    for name, bound in policy_gradient.MISMATCH_BOUNDS.items():
        assert float(found[name]) < bound


def test_entropy_bonus(arrays):
    base, _, _ = loss_and_gradient(policy(), batch(arrays))
    loss, _, totals = loss_and_gradient(policy(entropy=0.01), batch(arrays))
    mean = arrays["entropy"][arrays["mask"]].mean()
    assert loss == pytest.approx(base - 0.01 * mean, rel=1e-5)
    assert float(policy_gradient.metrics(jnp.float32(0), totals)["entropy"]) == pytest.approx(mean)

    def by_entropy(entropy):
        return objective(policy(entropy=0.01), batch(arrays)._replace(entropy=entropy))[0]

    slope = jax.grad(by_entropy)(batch(arrays).entropy)
    np.testing.assert_allclose(slope, -0.01 * arrays["mask"])


EVERYTHING = {
    "kl": K3(coefficient=0.1), "correction": Truncated(limit=2.0), "entropy": 0.01,
    "clip": Clip(low=0.1, high=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["bare", "everything"])
def test_micro_batches_add_up_to_the_whole(name, more, arrays):
    chosen = row(name, **more)
    whole, gradient, totals = loss_and_gradient(chosen, batch(arrays))
    sums, parts, gradients = 0.0, None, []
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6)):  # 6, 3 and 13 tokens
        piece = batch(arrays, rows)
        loss, own, totals_of_piece = loss_and_gradient(chosen, piece)
        sums += loss * float(totals_of_piece.denominator)
        gradients.append(own * float(totals_of_piece.denominator))
        parts = totals_of_piece if parts is None else policy_gradient.add(parts, totals_of_piece)
    assert sums / float(parts.denominator) == pytest.approx(whole, rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(
        np.concatenate(gradients) / float(parts.denominator), gradient, rtol=1e-5, atol=1e-8
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, totals)


def test_a_scan_over_micro_batches_starts_from_zeros(arrays):
    chosen = policy(**EVERYTHING)
    pieces = jax.tree.map(lambda a: a.reshape(3, 2, LENGTH), batch(arrays))

    @jax.jit
    def step(pieces):
        def body(carry, piece):
            loss, totals = objective(chosen, piece)
            return (carry[0] + loss, policy_gradient.add(carry[1], totals)), None

        first = jax.tree.map(lambda a: a[0], pieces)
        shapes = jax.eval_shape(lambda piece: objective(chosen, piece), first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return policy_gradient.metrics(*jax.lax.scan(body, zeros, pieces)[0])

    found, whole = step(pieces), policy_gradient.metrics(*objective(chosen, batch(arrays)))
    assert set(found) == {
        "loss", "ratio", "ratio_max", "clip_low", "clip_high", "kl", "entropy", "correction",
        "correction_cut", "correction_max", "mismatch_kl", "mismatch_error", "mismatch_max",
    }  # fmt: skip
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", POLICIES)
def test_prompt_and_padding_never_count(name, arrays):
    chosen = row(name, **EVERYTHING)
    spoilt = {
        key: array if key == "mask" else np.where(arrays["mask"], array, np.nan)
        for key, array in arrays.items()
    }
    clean, dirty = (loss_and_gradient(chosen, batch(each)) for each in (arrays, spoilt))
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[1], dirty[1])
    jax.tree.map(np.testing.assert_array_equal, clean[2], dirty[2])
    # Neither do rows without any token, such as those that fill up a last micro-batch.
    padded = {k: np.concatenate([a, np.zeros((2, LENGTH), a.dtype)]) for k, a in arrays.items()}
    longer = loss_and_gradient(chosen, batch(padded))
    assert longer[0] == pytest.approx(clean[0], rel=1e-5, abs=1e-7)
    assert float(longer[2].denominator) == float(clean[2].denominator)
    empty = {**arrays, "mask": np.zeros_like(arrays["mask"])}
    loss, totals = objective(chosen, batch(empty))
    assert all(float(value) == 0 for value in policy_gradient.metrics(loss, totals).values())


def test_without_old_the_policy_is_the_one_that_sampled(arrays):
    same = batch({**arrays, "old": arrays["now"]})
    for name in POLICIES:
        given = loss_and_gradient(row(name), same)
        left_out = loss_and_gradient(row(name), same._replace(old=None))
        np.testing.assert_array_equal(given[1], left_out[1])


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_absurd_ratios_stay_finite(ratio, gap, arrays):
    far = {**arrays, "now": arrays["old"] + gap}
    chosen = policy(ratio=ratio, clip=None, kl=K3(coefficient=1.0), correction=Truncated(limit=2.0))
    loss, gradient, totals = loss_and_gradient(chosen, batch(far))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert all(
        np.isfinite(each) for each in policy_gradient.metrics(jnp.float32(loss), totals).values()
    )


@pytest.mark.parametrize(
    ("choices", "lacking"),
    [
        ({"kl": K2(coefficient=0.1)}, "reference"),
        ({"correction": Masked(limit=2.0)}, "sampler"),
        ({"entropy": 0.1}, "entropy"),
    ],
)
def test_a_choice_without_its_input_is_an_error(choices, lacking, arrays):
    with pytest.raises(ValueError, match=f"`{lacking}`"):
        objective(policy(**choices), batch(arrays)._replace(**{lacking: None}))
