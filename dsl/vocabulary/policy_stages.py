"""Stages of policy optimisation, and its presets."""

from typing import Annotated

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Flag,
    Function,
    Measure,
    NonNegative,
    Reference,
    Reward,
    observe,
    placement,
    result,
)
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.training import Axes, Clip, ClipWeights, Critic, KlTerm, Sampling


class Policy(Training):
    """Base of policy optimisation: each step samples groups of completions, scores them, and
    updates.
    """

    semantics = ("policy", 1)
    needs = (("prompt",),)
    metrics = {
        "loss": "policy loss",
        "reward": "mean reward of all completions",
        "kl": "divergence from the reference",
        "entropy": "mean entropy of a token, in nats",
        "length": "mean number of tokens of a completion",
    }

    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.",
        "optimizer = adamw(lr = 3e-6)",
        AdamW.unvalidated(lr=1e-6),
    )
    length: Annotated[Measure, types.count("steps", "epochs")] = result(
        "How long to train.", "length = 300 steps"
    )
    reward: Reward = result("The reward to maximise.", "reward = correct")
    batch: Annotated[int, types.count("prompts")] = result(
        "Prompts in one step.", "batch = 64 prompts"
    )
    group: Annotated[int, types.Whole(low=1)] = result(
        "Completions for each prompt.", "group = 8", 8
    )
    rollout: Annotated[Sampling, types.Of("sampling")] = result(
        "How completions are sampled.",
        "rollout = sampling(max_tokens = 512)",
        Sampling.unvalidated(),
    )
    advantage: Annotated[
        str | SerializeAsAny[Function],
        types.Code(
            ("group_mean_std", "group_mean", "leave_one_out"),
            {"rewards": "float32 `[prompts, group]`"},
            "the advantage of each completion, `[prompts, group]`, by JAX operations. A group whose"
            " advantages are all 0 is skipped.",
        ),
    ] = result(
        "The reward minus its group's mean, with or without division by the group's standard"
        " deviation; or minus the mean of the group's other rewards.",
        "advantage = group_mean",
        "group_mean_std",
    )
    ratio: Annotated[str, types.Choice(("token", "sequence", "sequence_token"))] = result(
        "The probability ratio of each token, or of the sequence (the geometric mean);"
        " `sequence_token` has the value of the sequence's and the gradient of each token's.",
        "ratio = sequence",
        "token",
    )
    clip: Annotated[SerializeAsAny[Function] | None, types.Of("clip")] = result(
        "How far the policy may move in one step: clipping of the ratio.",
        "clip = clip(low = 0.2, high = 0.28)",
        Clip.unvalidated(),
    )
    loss: Annotated[
        SerializeAsAny[Function] | None,
        types.Code(
            (),
            {
                "ratio": "float32 `[completions, length]`, the probability ratio of each token as"
                " `ratio` says",
                "advantages": "`[completions, length]`, of each token",
                "log_probs": "`[completions, length]`, by the policy, in nats",
                "mask": "bool `[completions, length]`, where there are tokens",
            },
            "the loss of each token, `[completions, length]`, by differentiable JAX operations.",
        ),
    ] = result(
        "A custom loss in place of the clipped ratio times the advantage; `clip` must be"
        " `none`. `kl`, `entropy`, `correction` and `aggregate` apply as usual.",
        'loss = python("losses.py:smooth")',
        None,
    )
    aggregate: Annotated[str, types.Choice(("token_mean", "sequence_mean", "fixed_length"))] = (
        result(
            "How the loss is averaged: over all tokens of the step; over sequences, of each"
            " one's mean over tokens; or the sum over"
            " tokens divided by the number of sequences times `max_tokens`.",
            "aggregate = sequence_mean",
            "token_mean",
        )
    )
    kl: Annotated[SerializeAsAny[KlTerm] | None, types.Of("kl")] = result(
        "A penalty on the divergence from the reference.", "kl = k3(0.04)", None
    )
    reference: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "Model that `kl` compares with. Default: the model that the stage starts from.",
        "reference = gemma",
        None,
    )
    correction: Annotated[SerializeAsAny[Function] | None, types.Of("correction")] = result(
        "Correct for the difference between the sampler's probabilities and the trainer's.",
        "correction = truncated(2.0)",
        None,
    )
    entropy: NonNegative = result("Weight of an entropy bonus.", "entropy = 1e-3", 0.0)
    minibatches: Count = result(
        "Updates that the completions of a step are divided into.", "minibatches = 4", 1
    )
    passes: Count = result("Passes over the completions of a step.", "passes = 2", 1)
    refill: Flag = result(
        "Whether to sample until the batch is full of groups whose rewards differ (dynamic"
        " sampling).",
        "refill = true",
        False,
    )
    decode_mesh: Annotated[Axes | None, types.Of("mesh")] = placement(
        "The mesh of the rollout, over the devices of the update:"
        " `data` groups of `tensor` devices, each with all weights. Default: chosen by the plan.",
        "decode_mesh = axes(data = 4, tensor = 2)",
        None,
    )
    slots: Annotated[int | None, types.Whole(low=1)] = placement(
        "Completions that are sampled at once, over all devices. Default: chosen by the plan,"
        " as many as fit with their keys and values, at most 256 in a group of devices.",
        "slots = 256",
        None,
    )
    overlong: Annotated[str, types.Choice(("keep", "mask"))] = result(
        "Whether completions cut off at `max_tokens` are trained on.", "overlong = mask", "keep"
    )
    show: Annotated[int, types.Whole(low=0)] = observe(
        "Completions of a step to store for reading.", "show = 4", 2
    )


class Ppo(Policy):
    """Proximal policy optimisation with a learned critic (arXiv:1707.06347): the advantage of each
    token is estimated from values (GAE, arXiv:1506.02438).
    """

    semantics = ("ppo", 1)
    metrics = {
        **Policy.metrics,
        "loss": "policy loss; with a shared trunk, plus the value loss",
        "value_loss": "mean squared error of the values, halved",
        "explained_variance": "share of the variance of the returns that the values explain",
    }

    group: Annotated[int, types.Whole(low=1)] = result(
        "Completions for each prompt.", "group = 4", 1
    )
    advantage: Annotated[str, types.Choice(("gae",))] = result(
        "Generalised advantage estimation: the discounted sum of temporal-difference errors.",
        "advantage = gae",
        "gae",
    )
    discount: Annotated[float, types.Number(above=0, high=1)] = result(
        "Discount of a reward that comes one token later (gamma).", "discount = 0.99", 1.0
    )
    trace: Annotated[float, types.Number(low=0, high=1)] = result(
        "Decay of the weight of later rewards in an advantage (lambda of GAE).",
        "trace = 0.95",
        0.95,
    )
    whiten: Flag = result(
        "Whether the advantages of a step are normalised to mean 0 and standard deviation 1.",
        "whiten = false",
        True,
    )
    kl_target: Annotated[float | None, types.Number(above=0)] = result(
        "Adapt the coefficient of `kl` so that the divergence of a completion, in nats, stays near"
        " this (arXiv:1909.08593).",
        "kl_target = 6.0",
        None,
    )
    kl_horizon: Annotated[int, types.Whole(low=1)] = result(
        "Number of completions over which the coefficient of `kl` changes by at most 20%.",
        "kl_horizon = 2000",
        10_000,
    )
    critic: Annotated[Critic, types.Of("critic")] = result(
        "The critic, which estimates values.",
        "critic = critic(optimizer = adamw(lr = 1e-5))",
        Critic.unvalidated(),
    )
    value_model: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "Model that a critic with a separate trunk starts from. Default: the model that the stage"
        " starts from.",
        "value_model = judge",
        None,
    )
    minibatches: Count = result(
        "Updates that the completions of a step are divided into.", "minibatches = 4", 1
    )
    passes: Count = result("Passes over the completions of a step.", "passes = 2", 4)

    reads = {"value_model": ("model", "scores")}


POLICIES: dict[str, tuple[str, dict[str, object]]] = {
    "grpo": (
        "Group relative policy optimisation (arXiv:2402.03300), with the"
        " loss averaged over all tokens"
        " and no KL term; the paper's own is `aggregate = sequence_mean, kl = k3(0.04)`.",
        {},
    ),
    "dr_grpo": (
        "GRPO without its biases: no division by the deviation or by"
        " the length (arXiv:2503.20783).",
        {"advantage": "group_mean", "aggregate": "fixed_length"},
    ),
    "dapo": (
        "GRPO with a higher upper clip, and groups without a difference"
        " sampled anew (arXiv:2503.14476).",
        {"clip": Clip.unvalidated(low=0.2, high=0.28), "refill": True},
    ),
    "gspo": (
        "GRPO with one ratio for the whole sequence (arXiv:2507.18071).",
        {
            "ratio": "sequence",
            "clip": Clip.unvalidated(low=3e-4, high=4e-4),
            "aggregate": "sequence_mean",
        },
    ),
    "gspo_token": (
        "GSPO whose advantages may differ between tokens (arXiv:2507.18071, section 4.3).",
        {
            "ratio": "sequence_token",
            "clip": Clip.unvalidated(low=3e-4, high=4e-4),
            "aggregate": "sequence_mean",
        },
    ),
    "cispo": (
        "Clipped importance weights, with a gradient from every token (arXiv:2506.13585).",
        {"clip": ClipWeights.unvalidated(high=5.0)},
    ),
    "rloo": (
        "REINFORCE with the mean of the other completions as the baseline (arXiv:2402.14740).",
        {"advantage": "leave_one_out", "clip": None, "aggregate": "fixed_length"},
    ),
}
"""Kind -> documentation, and the attributes in which it differs from `Policy`'s defaults."""
