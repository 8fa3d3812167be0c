"""Losses and their gradients against TRL 1.16, on the same random log-probabilities and masks.

The methods of TRL's trainers that compute a loss run as they are. The constructors do not, which
want data, a tokenizer and the network: a stub of a model gives the log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.dsl.vocabulary.policy_stages import POLICIES, Policy
from tunelang.dsl.vocabulary.preference_stages import PREFERENCES, Kto, Preference
from tunelang.dsl.vocabulary.training import K1, K3, Masked, Sampling, Truncated
from tunelang.runtime.objectives import policy_gradient
from tunelang.runtime.objectives.advantages import group_advantages
from tunelang.runtime.objectives.policy_gradient import Completions, objective
from tunelang.runtime.objectives.preference_losses import (
    Pairs,
    bradley_terry,
    log_odds,
    pair_losses,
)
from tunelang.runtime.stages.kto import kto_losses

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", minversion="1.16")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ANSWERS, WIDTH, VOCAB = 12, 9, 13
HALF = ANSWERS // 2
TIGHT = {"rtol": 1e-5, "atol": 1e-6}

ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True,
    autocast=nullcontext, gather=lambda x: x, gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x, sync_gradients=True,
)  # fmt: skip


class TokenScores:
    """A model by which token `i` has log-probability `log_probs[i]`, wherever it stands."""

    training, is_gradient_checkpointing = True, False

    def __init__(self, log_probs):
        self.log_probs = torch.tensor(log_probs, requires_grad=True)

    def __call__(self, input_ids, labels, **_):
        counts = labels[:, 1:] != -100
        log_probs = torch.where(counts, self.log_probs[input_ids[:, 1:]], 0.0)
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(
            log_probs=log_probs, entropy=log_probs**2, mean_logits=zeros, is_top1=zeros.bool()
        )


def trl_trainer(kind, **attributes):
    """Make a trainer without its constructor, which wants data, a tokenizer and the network."""
    trainer = object.__new__(kind)
    common = {
        "model": SimpleNamespace(training=True), "accelerator": ACCELERATOR,
        "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
    }  # fmt: skip
    vars(trainer).update({**common, **attributes})
    return trainer


def preference_stage(kind="dpo", **choices) -> Preference:
    """Make a preference stage of a preset, with changes."""
    return Preference.unvalidated(**{**PREFERENCES[kind][1], **choices})


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Chosen answers, then as many rejected ones; each token has an id of its own."""
    random = np.random.default_rng(7)
    starts = random.integers(1, 5, ANSWERS)
    ends = starts + random.integers(1, WIDTH - starts + 1)
    place = np.arange(WIDTH)
    shape = (ANSWERS, WIDTH)
    reference = -random.gamma(1.0, 1.0, shape).astype(np.float32)
    return {
        "ids": np.arange(ANSWERS * WIDTH).reshape(shape),
        "mask": (place >= starts[:, None]) & (place < ends[:, None]),
        "now": reference + random.normal(0, 1.0, shape).astype(np.float32),
        "reference": reference,
    }


def pairs(log_probs, mask, reference=None) -> Pairs:
    """Sum log-probabilities `[answers, width]` of chosen, then rejected answers into pairs."""

    def halves(array):
        return (None, None) if array is None else jnp.split(jnp.where(mask, array, 0).sum(1), 2)

    return Pairs(*halves(log_probs), *halves(jnp.ones(mask.shape)), *halves(reference))


def assert_close(actual, expected, **tolerance) -> None:
    """Assert that our array agrees with one of numpy or torch."""
    wanted = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    np.testing.assert_allclose(actual, wanted, **{**TIGHT, **tolerance})


# Pairs.

DPO: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("sigmoid", {}),
    "sigmoid, means": ("sigmoid_norm", {"length_normalised": True}),
    "hinge": ("hinge", {"loss": "hinge"}),
    "ipo": ("ipo", {"loss": "ipo"}),
    "robust": ("robust", {"loss": "robust", "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", DPO)
def test_pair_losses_with_a_reference_equal_trl(name, beta, answers):
    theirs, choices = DPO[name]
    stage = preference_stage(beta=beta, **choices)
    mask, reference = answers["mask"], answers["reference"]
    model = TokenScores(answers["now"].ravel())
    dpo = trl_trainer(
        trl.DPOTrainer, beta=beta, loss_types=[theirs], loss_weights=[1.0], ld_alpha=None,
        f_divergence_type="reverse_kl", label_smoothing=stage.label_smoothing,
        use_weighting=False, precompute_ref_logps=True,
    )  # fmt: skip
    chosen, rejected = torch.tensor((reference * mask).sum(1)).chunk(2)
    ids = torch.tensor(answers["ids"])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.tensor(mask).long(),
        "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
    }  # fmt: skip
    expected = dpo._compute_loss(model, inputs, return_outputs=False)
    expected.backward()

    def loss(now):
        losses, metrics = pair_losses(stage, pairs(now, mask, reference))
        return losses.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(answers["now"])
    assert_close(value, expected)
    assert_close(gradient.ravel(), model.log_probs.grad)
    assert np.abs(gradient).max() > 0
    drift = ((answers["now"] - reference) * mask).sum(1).mean()
    assert float(metrics["drift"].mean()) == pytest.approx(drift, rel=1e-5)
    if name not in ("sigmoid, means", "ipo"):  # TRL reports rewards of sums there too
        logged = {key: values[0] for key, values in dpo._metrics["train"].items()}
        assert_close(metrics["chosen_reward"].mean(), logged["rewards/chosen"])
        assert_close(metrics["rejected_reward"].mean(), logged["rewards/rejected"])
        assert_close(metrics["margin"].mean(), logged["rewards/margins"])
        assert_close(metrics["accuracy"].mean(), logged["rewards/accuracies"])


def loss_from_logits(stage, logits, tokens, mask):
    """Compute the mean loss and metrics from logits `[answers, width, vocab]` of the next token."""
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    taken = jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1)[..., 0]
    losses, metrics = pair_losses(stage, pairs(taken, mask[:, 1:]))
    return losses.mean(), metrics


@pytest.fixture(scope="module")
def logits_of_answers(answers) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    """Logits, tokens, mask, and labels as torch has them."""
    random = np.random.default_rng(8)
    logits = random.normal(0, 2.0, (ANSWERS, WIDTH, VOCAB)).astype(np.float32)
    tokens = random.integers(0, VOCAB, (ANSWERS, WIDTH))
    mask = answers["mask"]
    return logits, tokens, mask, torch.tensor(np.where(mask, tokens, -100))


CPO: dict[str, tuple[str, Preference]] = {
    "simpo": ("simpo", preference_stage("simpo")),
    "simpo, other": ("simpo", preference_stage("simpo", beta=0.7, target_margin=0.4)),
    "simpo, smooth": ("simpo", preference_stage("simpo", label_smoothing=0.1)),
    "conservative": ("sigmoid", preference_stage(reference_free=True, label_smoothing=0.1)),
    "hinge": ("hinge", preference_stage(reference_free=True, loss="hinge")),
    "ipo": ("ipo", preference_stage(reference_free=True, loss="ipo")),
}


@pytest.mark.parametrize("name", CPO)
def test_pair_losses_without_a_reference_equal_trl(name, logits_of_answers):
    from trl.experimental.cpo import CPOTrainer

    theirs, stage = CPO[name]
    logits, tokens, mask, labels = logits_of_answers
    torch_logits = torch.tensor(logits, requires_grad=True)
    means = theirs in ("simpo", "ipo")  # as `concatenated_forward` has it
    log_probs = CPOTrainer.get_batch_logps(torch_logits, labels, average_log_prob=means)
    cpo = trl_trainer(
        CPOTrainer, alpha=0.0, beta=stage.beta, loss_type=theirs, simpo_gamma=stage.target_margin,
        label_smoothing=stage.label_smoothing,
    )  # fmt: skip
    expected, chosen, rejected = cpo.cpo_loss(*log_probs.chunk(2))
    expected.mean().backward()

    compute = jax.value_and_grad(loss_from_logits, 1, has_aux=True)
    (value, metrics), gradient = compute(stage, logits, tokens, mask)
    assert_close(value, expected.mean())
    assert_close(gradient, torch_logits.grad)
    assert_close(metrics["chosen_reward"], chosen)
    assert_close(metrics["rejected_reward"], rejected)
    assert "drift" not in metrics


def test_odds_ratio_loss_equals_trl(logits_of_answers):
    from trl.experimental.orpo import ORPOTrainer

    stage = preference_stage("orpo", beta=0.3)
    logits, tokens, mask, labels = logits_of_answers
    torch_logits = torch.tensor(logits, requires_grad=True)
    log_probs = ORPOTrainer.get_batch_logps(torch_logits, labels, average_log_prob=True)
    orpo = trl_trainer(ORPOTrainer, beta=stage.beta)
    gains, chosen, rejected, _, ratio = orpo.odds_ratio_loss(*log_probs.chunk(2))
    (-gains.mean()).backward()  # `get_batch_loss_metrics` subtracts them

    compute = jax.value_and_grad(loss_from_logits, 1, has_aux=True)
    (value, metrics), gradient = compute(stage, logits, tokens, mask)
    assert_close(value, -gains.mean())
    assert_close(gradient, torch_logits.grad)
    assert_close(metrics["margin"].mean(), ratio)
    assert_close(metrics["accuracy"], (chosen > rejected).float())


def test_log_odds_near_certainty_are_exact():
    log_prob = -np.geomspace(1e-7, 300.0, 200)
    expected = log_prob - np.log(-np.expm1(log_prob))
    in_float32 = jnp.asarray(log_prob, jnp.float32)
    assert_close(log_odds(in_float32), expected, rtol=1e-6)
    assert_close(jax.vmap(jax.grad(log_odds))(in_float32), -1 / np.expm1(log_prob), rtol=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "robust"])
def test_label_smoothing_equals_the_papers(loss, answers):
    mask = answers["mask"]
    moved = ((answers["now"].astype(float) - answers["reference"]) * mask).sum(1)
    margin = 0.3 * (moved[:HALF] - moved[HALF:])
    right, wrong = np.logaddexp(0, -margin), np.logaddexp(0, margin)
    by_paper = {
        "sigmoid": 0.85 * right + 0.15 * wrong,  # Mitchell 2023, conservative DPO
        "robust": (0.85 * right - 0.15 * wrong) / 0.7,  # 2403.00409
    }
    stage = preference_stage(loss=loss, beta=0.3, label_smoothing=0.15)
    losses, _ = pair_losses(stage, pairs(answers["now"], mask, answers["reference"]))
    assert_close(losses, by_paper[loss])


STAGES = {
    **{name: preference_stage(name) for name in PREFERENCES},
    **{name: preference_stage(**choices) for name, (_, choices) in DPO.items()},
    "odds of sums": preference_stage("orpo", length_normalised=False),
}


@pytest.mark.parametrize("name", STAGES)
def test_empty_pair_has_finite_gradients(name):
    zeros = jnp.zeros(3)

    def loss(chosen, rejected):
        losses, metrics = pair_losses(STAGES[name], Pairs(chosen, rejected, *[zeros] * 4))
        return losses.sum(), (losses, metrics)

    gradients, metrics = jax.grad(loss, (0, 1), has_aux=True)(zeros, zeros)
    for array in jax.tree.leaves((gradients, metrics)):
        assert np.isfinite(array).all()
    np.testing.assert_array_equal(metrics[1]["accuracy"], 0.5)


def test_missing_reference_is_an_error(answers):
    with pytest.raises(ValueError, match="reference"):
        pair_losses(preference_stage(), pairs(answers["now"], answers["mask"]))


# Answers that are good or bad, and scores.

LABELS = {"both": [True, False] * HALF, "good": [True] * ANSWERS, "bad": [False] * ANSWERS}


@pytest.mark.parametrize("shift", [0.5, -0.5], ids=["kl", "kl held at 0"])
@pytest.mark.parametrize("labels", LABELS)
def test_kto_losses_equal_trl(labels, shift, answers):
    stage = Kto.unvalidated(beta=0.4, desirable=1.33, undesirable=0.7)
    mask, reference = answers["mask"], answers["reference"]
    mismatched = answers["now"] + np.float32(shift)  # of the answers, as if of other prompts
    model = TokenScores(np.concatenate([answers["now"].ravel(), mismatched.ravel()]))
    kto = trl_trainer(
        trl.KTOTrainer, beta=stage.beta, desirable_weight=stage.desirable, loss_type="kto",
        undesirable_weight=stage.undesirable, calculate_KL=True, precompute_ref_logps=True,
    )  # fmt: skip
    ids, marked = torch.tensor(answers["ids"]), torch.tensor(mask).long()
    summed = torch.tensor((reference * mask).sum(1))
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": marked,
        "KL_input_ids": ids + ids.numel(), "KL_attention_mask": torch.ones_like(ids),
        "KL_completion_mask": marked, "label": torch.tensor(LABELS[labels]),
        "ref_logps": summed, "ref_KL_logps": summed,
    }  # fmt: skip
    expected = kto._compute_loss(model, inputs, return_outputs=False)
    expected.backward()
    kl = max(0.0, float(((mismatched - reference) * mask).sum(1).mean()))
    assert (kl > 0) == (shift > 0)

    def loss(now):
        log_prob, reference_log_prob = (
            jnp.where(mask, array, 0).sum(1) for array in (now, reference)
        )
        desirable = jnp.asarray(LABELS[labels])
        losses, metrics = kto_losses(
            stage, log_prob, reference_log_prob, desirable, jnp.float32(kl)
        )
        return losses.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(answers["now"])
    assert_close(value, expected)
    assert_close(gradient.ravel(), model.log_probs.grad[: ids.numel()])
    for name, count in (
        ("chosen", sum(LABELS[labels])),
        ("rejected", ANSWERS - sum(LABELS[labels])),
    ):
        if count:
            logged = kto._metrics["train"][f"rewards/{name}"][0]
            assert_close(metrics[f"{name}_reward"].sum() / count, logged)


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.05])
def test_bradley_terry_equals_trl(margin, centring):
    random = np.random.default_rng(9)
    scores = random.normal(0, 2.0, (ANSWERS, 1)).astype(np.float32)
    margins = random.uniform(0, 2, HALF).astype(np.float32) if margin else None
    torch_scores = torch.tensor(scores, requires_grad=True)
    rewards = trl_trainer(
        trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centring or None)
    )
    inputs = {"attention_mask": torch.ones(ANSWERS, 1)}
    if margins is not None:
        inputs["margin"] = torch.tensor(margins)
    expected = rewards.compute_loss(lambda **_: SimpleNamespace(logits=torch_scores), inputs)
    expected.backward()

    our_margins = None if margins is None else jnp.asarray(margins)

    def loss(scores):
        losses, metrics = bradley_terry(*jnp.split(scores[:, 0], 2), our_margins, centring)
        return losses.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(scores)
    assert_close(value, expected)
    assert_close(gradient, torch_scores.grad)
    logged = rewards._metrics["train"]
    assert_close(metrics["accuracy"].mean(), logged["accuracy"][0])
    assert_close(metrics["margin"].mean(), logged["margin"][0])


# Policies.

GROUPS, GROUP, LONGEST, LIMIT = 3, 4, 7, 10
ROWS = GROUPS * GROUP
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
SAMPLER = {"use_vllm": True, "vllm_importance_sampling_correction": True}
# Without it TRL differentiates k3 itself, which `divergence_term` says is wrong.
RIGHT_KL = {"beta": 0.3, "args": {"use_bias_correction_kl": True}}


def policy_stage(kind, **choices) -> Policy:
    """Make a policy stage of a preset, with changes."""
    choices = {**POLICIES[kind][1], **choices}
    return Policy.model_construct(rollout=Sampling(max_tokens=LIMIT), **choices)


GRPO: dict[str, tuple[Policy, dict[str, Any]]] = {
    "grpo": (policy_stage("grpo"), {"loss_type": "dapo"}),
    "grpo, micro-batch": (policy_stage("grpo"), {"loss_type": "bnpo"}),
    "grpo, of sequences": (policy_stage("grpo", aggregate="sequence_mean"), {"loss_type": "grpo"}),
    "dr_grpo": (policy_stage("dr_grpo"), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (policy_stage("dapo"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (policy_stage("gspo"), {**GSPO, "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "cispo": (policy_stage("cispo"), {"loss_type": "cispo", "epsilon_high": 6.0}),
    "kl": (policy_stage("grpo", kl=K3(coefficient=0.3)), {"loss_type": "dapo", **RIGHT_KL}),
    "kl, of sequences": (
        policy_stage("grpo", kl=K3(coefficient=0.3), aggregate="sequence_mean"),
        {"loss_type": "grpo", **RIGHT_KL},
    ),
    "truncated": (
        policy_stage("grpo", correction=Truncated(limit=1.2)),
        {
            "loss_type": "dapo", **SAMPLER, "vllm_importance_sampling_mode": "token_truncate",
            "vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": 1.2,
        },
    ),
    "masked": (
        policy_stage("dr_grpo", correction=Masked(limit=1.25)),
        {
            "loss_type": "dr_grpo", "scale_rewards": "none", **SAMPLER,
            "vllm_importance_sampling_mode": "token_mask",
            "vllm_importance_sampling_clip_min": 0.8, "vllm_importance_sampling_clip_max": 1.25,
        },
    ),
    "entropy": (
        policy_stage("grpo", entropy=0.05),
        {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.05},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rollouts() -> dict[str, Any]:
    """Log-probabilities of random completions by several policies, mask and rewards."""
    random = np.random.default_rng(11)
    shape = (ROWS, LONGEST)
    lengths = np.append(LONGEST, random.integers(1, LONGEST + 1, ROWS - 1))
    old = -random.gamma(1.0, 1.0, shape)
    log_probs = {
        "old": old,
        "now": old + random.normal(0, 0.3, shape),
        "sampler": old + random.normal(0, 0.3, shape),
        "reference": old + random.normal(0, 0.4, shape),
    }
    return {
        **{name: array.astype(np.float32) for name, array in log_probs.items()},
        "mask": np.arange(LONGEST) < lengths[:, None],
        # TRL adds 1e-4 to a group's deviation, which is nothing beside these.
        "rewards": random.normal(0, 100.0, (GROUPS, GROUP)).astype(np.float32),
    }


def token_scores(log_probs) -> TokenScores:
    """Make a model from log-probabilities of every token."""
    return TokenScores(np.append(np.float32(0), log_probs.ravel()))  # the first is padding's


def run_trl(kind, rollouts, attributes):
    """Run a step of TRL from the rewards on; returns loss, gradient by token and the trainer."""
    lengths = rollouts["mask"].sum(1)
    ids = 1 + np.arange(ROWS * LONGEST).reshape(ROWS, LONGEST)
    completions = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    sampled = [r[:n].tolist() for r, n in zip(rollouts["sampler"], lengths, strict=True)]
    prompts, texts = [[0, 0]] * ROWS, [""] * ROWS
    generated = (prompts, completions, None, texts, sampled, {}, None, None)
    if kind is trl.RLOOTrainer:
        generated = (prompts, completions, texts)
    args = {
        "delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1,
        "gradient_accumulation_steps": 1, "gradient_checkpointing_kwargs": None,
        "per_device_train_batch_size": ROWS, **attributes.get("args", {}),
    }  # fmt: skip
    trainer = trl_trainer(kind, **{
        "model": token_scores(rollouts["old"]),
        "ref_model": token_scores(rollouts["reference"]),
        "environment_factories": None, "environments": None, "tools": None,
        "pad_to_multiple_of": None, "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_generate": lambda _: generated,
        "_calculate_rewards": lambda *_: torch.tensor(rollouts["rewards"]).view(-1, 1),
        "mask_truncated_completions": False, "num_iterations": 2, "num_generations": GROUP,
        "reward_weights": torch.ones(1), "reward_func_names": ["reward"],
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group",
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {}, "_pending_metrics": {}, "use_vllm": False, "beta": 0.0,
        "vllm_importance_sampling_correction": False, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "epsilon_low": 0.2, "epsilon_high": 0.2, "max_completion_length": LIMIT,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False, **attributes,
        "args": SimpleNamespace(**args),
    })  # fmt: skip
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * ROWS)
    model = token_scores(rollouts["now"])
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    return loss, model.log_probs.grad[1:].view(ROWS, LONGEST), trainer


def run_ours(stage, rollouts, rewards):
    """Run the same step by `objective`; returns loss, gradient by token and metrics."""
    advantages = group_advantages(rewards, stage.advantage).values.reshape(-1, 1)
    log_probs = {name: jnp.asarray(rollouts[name]) for name in ("old", "sampler", "reference")}
    mask = jnp.asarray(rollouts["mask"])

    def loss(now):
        token_advantages = jnp.broadcast_to(advantages, now.shape)
        batch = Completions(now, mask, token_advantages, entropy=now**2, **log_probs)
        return objective(stage, batch)

    (value, totals), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(rollouts["now"]))
    count = totals.denominator
    return value / count, gradient / count, policy_gradient.metrics(value, totals)


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["far", "near"])
@pytest.mark.parametrize("name", GRPO)
def test_policy_losses_equal_trl(name, scale, rollouts):
    # Near the old policy GSPO's narrow clip leaves sequences in, far from it cuts most.
    stage, attributes = GRPO[name]
    moved = rollouts["old"] + np.float32(scale) * (rollouts["now"] - rollouts["old"])
    rollouts = {**rollouts, "now": moved}
    expected, slope, grpo = run_trl(trl.GRPOTrainer, rollouts, attributes)
    value, gradient, metrics = run_ours(stage, rollouts, jnp.asarray(rollouts["rewards"]))
    assert_close(value, expected, rtol=3e-5)
    assert_close(gradient, slope, rtol=3e-5)
    assert np.abs(gradient).max() > 0
    logged = {key: values[0] for key, values in grpo._metrics["train"].items()}
    assert_close(metrics["entropy"], logged["entropy"])
    if name in ("grpo", "dr_grpo", "dapo"):
        assert_close(metrics["clip_low"], logged["clip_ratio/low_mean"])
        assert_close(metrics["clip_high"], logged["clip_ratio/high_mean"])


@pytest.mark.parametrize("beta", [0.0, 0.4], ids=["bare", "kl"])
def test_rloo_gradients_on_policy_equal_trl(beta, rollouts):
    # TRL's ratio is the whole sequence's, ours each token's: at 1 they have the same gradient.
    rollouts = {**rollouts, "now": rollouts["old"]}
    attributes = {"beta": beta, "normalize_advantages": False, "reward_clip_range": None}
    _, slope, _ = run_trl(trl.RLOOTrainer, rollouts, attributes)
    stage = policy_stage("rloo")
    arrays = [jnp.asarray(rollouts[name]) for name in ("old", "reference", "mask")]
    kl = K1(coefficient=beta, at="reward")
    rewards = policy_gradient.penalised(jnp.asarray(rollouts["rewards"]).ravel(), kl, *arrays)
    _, gradient, _ = run_ours(stage, rollouts, rewards.reshape(GROUPS, GROUP))
    assert_close(gradient * LIMIT, slope)
