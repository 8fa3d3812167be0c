"""Stages that learn which answers are better, and the presets of preference optimisation."""

from typing import Annotated

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Flag,
    Function,
    Measure,
    NonNegative,
    Positive,
    Reference,
    placement,
    result,
)
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer
from tunelang.dsl.vocabulary.supervised_stages import Supervised

PAIRS = (("prompt", "chosen", "rejected"), ("messages", "chosen", "rejected"))


class Compared(Supervised):
    """Base of the stages that learn which answers are better, by how their probabilities move from
    a reference.
    """

    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.",
        "optimizer = adamw(lr = 5e-7)",
        AdamW.unvalidated(lr=1e-6, warmup=Measure.unvalidated(value=0.1, unit="%"), decay="linear"),
    )
    beta: Positive = result(
        "Scale of the rewards. Larger values keep the policy closer to the reference.",
        "beta = 0.1",
        0.1,
    )
    reference: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "Model that the policy is compared with. Default: the model that the stage starts from.",
        "reference = baseline",
        None,
    )

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss reads the reference."""
        return True


class Preference(Compared):
    """Base of learning from pairs of answers, one better than the other."""

    semantics = ("preference", 1)
    needs = PAIRS
    metrics = {
        "loss": "mean loss of a pair",
        "accuracy": "share of pairs whose chosen answer has the higher reward",
        "margin": "mean reward of chosen answers minus that of rejected ones",
        "chosen_reward": "mean reward of chosen answers",
        "rejected_reward": "mean reward of rejected answers",
        "chosen_log_prob": "mean log-probability of a chosen answer, in nats",
        "rejected_log_prob": "mean log-probability of a rejected answer, in nats",
        "drift": "mean log-probability of an answer minus the reference's, in nats",
    }

    loss: Annotated[
        str | SerializeAsAny[Function],
        types.Code(
            ("sigmoid", "hinge", "ipo", "robust", "odds_ratio"),
            {
                "chosen": "float32 `[...]`, the reward of each better answer: `beta` times its"
                " log-ratio to the reference",
                "rejected": "the same of the worse answer",
                "chosen_tokens": "`[...]`, its number of tokens",
                "rejected_tokens": "the same of the worse answer",
                "beta": "the attribute",
            },
            "the loss of each pair, `[...]`, by differentiable JAX operations.",
        ),
    ] = result(
        "The loss of the margin `m` between the two rewards: `-log sigmoid(m)`;"
        " `max(0, 1 - m)`; the squared distance of `m / beta`, of answers' means over their"
        " tokens, from `1 / (2 beta)` (IPO, arXiv:2310.12036); the sigmoid loss, unbiased"
        " where a share `label_smoothing` of the labels is wrong (arXiv:2403.00409); or, with"
        " log-odds for rewards, `-beta log sigmoid(m)` (ORPO, arXiv:2403.07691).",
        "loss = hinge",
        "sigmoid",
    )
    label_smoothing: Annotated[float, types.Share()] = result(
        "Share of the labels that are assumed to be wrong, below 50%.",
        "label_smoothing = 10%",
        0.0,
    )
    length_normalised: Flag = result(
        "Whether the reward of an answer is a mean over its tokens instead of a sum.",
        "length_normalised = true",
        False,
    )
    target_margin: NonNegative = result(
        "Margin that the loss demands, in units of the reward (SimPO's gamma).",
        "target_margin = 0.5",
        0.0,
    )
    supervised: NonNegative = result(
        "Weight of the supervised loss on the chosen answers, a mean over their tokens.",
        "supervised = 1.0",
        0.0,
    )
    reference_free: Flag = result(
        "Whether rewards use the log-probabilities themselves, without a reference.",
        "reference_free = true",
        False,
    )

    reference_log_probs: Annotated[str, types.Choice(("ahead", "live"))] = placement(
        "Whether the reference scores all answers once before the first step and is then freed"
        " (`ahead`), or scores the answers of each step in the step (`live`).",
        "reference_log_probs = live",
        "ahead",
    )

    @property
    def needs_reference(self) -> bool:
        """Return whether the loss reads the reference."""
        return not self.reference_free and self.loss != "odds_ratio"


class Kto(Compared):
    """Learning from answers that are each good or bad (Kahneman-Tversky optimisation,
    arXiv:2402.01306). The reference runs beside the policy, since each step matches prompts with
    answers to others.
    """

    semantics = ("kto", 1)
    needs = (("prompt", "response", "label"), ("messages", "response", "label"), *PAIRS)
    metrics = {
        "loss": "mean loss of an answer",
        "chosen_reward": "mean reward of desirable answers",
        "rejected_reward": "mean reward of undesirable answers",
        "margin": "`chosen_reward` minus `rejected_reward`",
        "kl": "the reference point: divergence from the reference over mismatched answers",
    }

    desirable: NonNegative = result("Weight of desirable answers.", "desirable = 1.33", 1.0)
    undesirable: NonNegative = result("Weight of undesirable answers.", "undesirable = 1.33", 1.0)


class RewardModel(Supervised):
    """A model that scores answers, from pairs of them (Bradley-Terry, arXiv:2203.02155): the
    decoder with one number for a head, read at an answer's last token.
    """

    semantics = ("reward_model", 1)
    needs = PAIRS
    yields = "scores"
    reads = {"from": ("model", "scores")}
    metrics = {
        "loss": "mean loss of a pair, in nats",
        "accuracy": "share of pairs whose chosen answer scores higher",
        "margin": "mean score of chosen answers minus that of rejected ones",
        "chosen_reward": "mean score of chosen answers",
        "rejected_reward": "mean score of rejected answers",
    }

    centring: NonNegative = result(
        "Weight of the squared sum of a pair's scores, which keeps their mean at 0"
        " (arXiv:2312.09244).",
        "centring = 0.01",
        0.0,
    )


PREFERENCES: dict[str, tuple[str, dict[str, object]]] = {
    "dpo": (
        "Direct preference optimisation (arXiv:2305.18290): the log-ratio to the reference is the"
        " reward.",
        {},
    ),
    "simpo": (
        "DPO without a reference, by the mean log-probability of a token and with a margin"
        " (arXiv:2405.14734).",
        {
            "reference_free": True,
            "length_normalised": True,
            "beta": 2.0,
            "target_margin": 1.0,
        },
    ),
    "orpo": (
        "Supervised tuning on the chosen answers with a penalty on the odds of the rejected ones;"
        " no reference (arXiv:2403.07691).",
        {
            "loss": "odds_ratio",
            "reference_free": True,
            "length_normalised": True,
            "supervised": 1.0,
        },
    ),
}
"""Kind -> documentation, and the attributes in which it differs from `Preference`'s defaults."""
