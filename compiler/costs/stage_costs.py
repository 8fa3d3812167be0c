"""Costs of the kinds of stages: the one place in the compiler that tells kinds apart.

A kind of stage is a subclass of `StageCost`, entered in `STAGE_COSTS` under its class of the
vocabulary; a stage without an entry of its own has that of its nearest base.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from tunelang.compiler.layout.stage_layout import Kernel
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.policy_stages import Policy, Ppo
from tunelang.dsl.vocabulary.preference_stages import Compared, Kto, Preference
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Distill, Supervised

FLAT_GROUPS = 0.25
"""Share of the groups assumed to have no advantage: their micro-batches are skipped."""


@dataclass(frozen=True)
class ForwardPasses:
    """Forward passes over the sequences of a step, beside those of its updates."""

    policy: int = 0
    reference: int = 0
    values: int = 0


@dataclass(frozen=True)
class RolloutRequest:
    """Completions that a step samples, and the mesh and slots that the spec pins for it."""

    completions: int
    max_tokens: int
    decode_mesh: tuple[int, int] | None
    """Sizes of the axes `data` and `tensor`; None leaves them to the plan."""
    slots: int | None


@dataclass(frozen=True)
class SeparateCritic:
    """A second decoder, as large as the policy, that a step trains beside it."""

    moments: int
    """Numbers that its optimizer keeps for each parameter."""
    has_frozen_base: bool
    """Whether an adapter of its own lies on weights that are not the policy's."""


@dataclass(frozen=True)
class StageCost(ABC):
    """The parts of a training stage's step; the defaults are those of supervised tuning."""

    stage: Training

    @abstractmethod
    def batch(self, context: int, roles: frozenset[str]) -> tuple[int, int]:
        """Return the sequences of an update, and the tokens of one. `roles` are those that the
        stage's data has.
        """

    @abstractmethod
    def smaller_batch(self, divisor: int) -> tuple[str, Training] | None:
        """Return the batch divided, as the spec writes it, and the stage with it; None where it
        does not divide.
        """

    @property
    def updates(self) -> int:
        """Updates of the weights in a step."""
        return 1

    @property
    def minibatches(self) -> int:
        """Updates that the sequences of a step are divided over."""
        return 1

    @property
    def forward_passes(self) -> ForwardPasses:
        """Return the passes that only score the sequences of a step."""
        return ForwardPasses()

    @property
    def rollout(self) -> RolloutRequest | None:
        """Return the completions that a step samples; None where its sequences are given."""
        return None

    @property
    def critic(self) -> SeparateCritic | None:
        """Return the critic, where it has weights of its own."""
        return None

    @property
    def group(self) -> int:
        """Sequences that a micro-batch takes as one, or in equal parts."""
        return 1

    @property
    def attention(self) -> Kernel | None:
        """Return the only kernel of attention that the stage's programs can use; None allows
        all.
        """
        return None

    @property
    def splits_sequences(self) -> bool:
        """Return whether sequences can be split over the axis `context`."""
        return True

    @property
    def context_is_adjustable(self) -> bool:
        """Return whether a shorter context of the model makes the stage's sequences shorter."""
        return True

    @property
    def why_in_turn(self) -> str:
        """Why one program cannot train several branches; empty where it can."""
        return ""

    def can_offload_reference(self, a: Architecture) -> bool:
        """Return whether the reference may wait in the memory of the host while weights are
        updated: it scores completions before the first update.
        """
        return self.rollout is not None and self.holds_reference(a)

    @abstractmethod
    def holds_reference(self, a: Architecture) -> bool:
        """Return whether parameters of a reference are in the devices during a step. Without its
        adapter a model is its own reference.
        """

    @abstractmethod
    def computed_share(self, micro_batches: int) -> float:
        """Return the share of an update's micro-batches that are computed, and not skipped."""

    @abstractmethod
    def micro_batch_tokens(self, sequences: int, length: int) -> tuple[int, int]:
        """Return the tokens of a micro-batch, and the positions of a sequence that have logits."""


@dataclass(frozen=True)
class SupervisedCost(StageCost):
    """Given sequences, each with one answer or with both answers of a pair."""

    stage: Supervised

    def answers(self, roles: frozenset[str]) -> int:
        """Return how many answers of an example share a sequence, by the first set of roles that
        the stage can learn from and its data has.
        """
        needs = self.stage.needs
        read = next((need for need in needs if roles.issuperset(need)), needs[-1])
        return 2 if {"chosen", "rejected"}.issubset(read) else 1

    @override
    def batch(self, context: int, roles: frozenset[str]) -> tuple[int, int]:
        length = context * self.answers(roles)
        if self.stage.batch.unit == "tokens":
            return max(1, int(self.stage.batch.value) // length), length
        return int(self.stage.batch.value), length

    @override
    def holds_reference(self, a: Architecture) -> bool:
        return False

    @override
    def computed_share(self, micro_batches: int) -> float:
        return 1.0

    @override
    def micro_batch_tokens(self, sequences: int, length: int) -> tuple[int, int]:
        return sequences * length, length

    @override
    def smaller_batch(self, divisor: int) -> tuple[str, Training] | None:
        batch = self.stage.batch
        count, remainder = divmod(int(batch.value), divisor)
        if remainder:
            return None
        smaller = batch.model_copy(update={"value": count})
        stage = self.stage.model_copy(update={"batch": smaller})
        return f"`batch = {count} {batch.unit}`", stage


@dataclass(frozen=True)
class ComparedCost(SupervisedCost):
    """Answers whose probabilities are compared with a reference's."""

    stage: Compared

    @property
    @override
    def forward_passes(self) -> ForwardPasses:
        return ForwardPasses(reference=int(self.stage.needs_reference))

    @override
    def holds_reference(self, a: Architecture) -> bool:
        return self.stage.needs_reference and (not a.adapters or self.stage.reference is not None)


@dataclass(frozen=True)
class PreferenceCost(ComparedCost):
    """Pairs of answers, which the reference may have scored before the first step."""

    stage: Preference

    @override
    def holds_reference(self, a: Architecture) -> bool:
        return self.stage.reference_log_probs == "live" and super().holds_reference(a)


@dataclass(frozen=True)
class KtoCost(ComparedCost):
    """Good and bad answers. Policy and reference score each batch once more, with answers to other
    prompts: the reference point of the loss (`KtoObjective`).
    """

    stage: Kto

    @property
    @override
    def forward_passes(self) -> ForwardPasses:
        return ForwardPasses(policy=1, reference=2)


@dataclass(frozen=True)
class DistillCost(SupervisedCost):
    """A student; the passes and the memory of its teacher follow from the teacher's architecture
    (`LayoutQuery.teacher`).
    """

    stage: Distill

    @property
    @override
    def why_in_turn(self) -> str:
        return "each learns from answers of its own (`on_policy`)" if self.stage.on_policy else ""


@dataclass(frozen=True)
class PolicyCost(StageCost):
    """Sampled completions, scored, and trained on in one or more updates."""

    stage: Policy

    @override
    def batch(self, context: int, roles: frozenset[str]) -> tuple[int, int]:
        stage, length = self.stage, context
        if stage.rollout.max_prompt is not None:
            length = min(stage.rollout.max_prompt + stage.rollout.max_tokens, context)
        return stage.batch * stage.group // stage.minibatches, length

    @override
    def smaller_batch(self, divisor: int) -> tuple[str, Training] | None:
        count, remainder = divmod(self.stage.batch, divisor)
        if remainder:
            return None
        return f"`batch = {count} prompts`", self.stage.model_copy(update={"batch": count})

    @property
    @override
    def updates(self) -> int:
        return self.stage.minibatches * self.stage.passes

    @property
    @override
    def minibatches(self) -> int:
        return self.stage.minibatches

    @property
    @override
    def forward_passes(self) -> ForwardPasses:
        # With several updates the policy's log-probabilities are computed before the first one.
        return ForwardPasses(int(self.updates > 1), int(self.stage.kl is not None))

    @property
    @override
    def rollout(self) -> RolloutRequest | None:
        stage, mesh = self.stage, self.stage.decode_mesh
        return RolloutRequest(
            completions=stage.batch * stage.group,
            max_tokens=stage.rollout.max_tokens,
            decode_mesh=None if mesh is None else (mesh.data, mesh.tensor),
            slots=stage.slots,
        )

    @property
    @override
    def group(self) -> int:
        return self.stage.group

    @property
    @override
    def attention(self) -> Kernel | None:
        return "xla"  # completions attend to a prompt of any length that they share

    @property
    @override
    def splits_sequences(self) -> bool:
        return False

    @property
    @override
    def context_is_adjustable(self) -> bool:
        return False

    @property
    @override
    def why_in_turn(self) -> str:
        return "each has rollouts of its own"

    @override
    def holds_reference(self, a: Architecture) -> bool:
        own_weights = not a.adapters or self.stage.reference is not None
        return self.stage.kl is not None and own_weights

    @property
    def skips_flat_groups(self) -> bool:
        """Return whether micro-batches of groups without advantage are skipped (`useful_first`)."""
        return not self.stage.refill and self.stage.minibatches == 1

    @override
    def computed_share(self, micro_batches: int) -> float:
        if not self.skips_flat_groups:
            return 1.0
        return math.ceil((1 - FLAT_GROUPS) * micro_batches) / micro_batches

    @override
    def micro_batch_tokens(self, sequences: int, length: int) -> tuple[int, int]:
        """Completions of a prompt that are trained on together share it."""
        completion = min(self.stage.rollout.max_tokens, length)
        prompts = sequences // math.gcd(self.stage.group, sequences)
        return prompts * (length - completion) + sequences * completion, completion


@dataclass(frozen=True)
class PpoCost(PolicyCost):
    """A policy with a critic."""

    stage: Ppo

    @property
    @override
    def forward_passes(self) -> ForwardPasses:
        passes = super().forward_passes
        return ForwardPasses(passes.policy, passes.reference, values=1)

    @property
    @override
    def critic(self) -> SeparateCritic | None:
        critic = self.stage.critic
        if critic.trunk != "separate":
            return None
        return SeparateCritic(critic.optimizer.moments, self.stage.value_model is not None)

    @property
    @override
    def skips_flat_groups(self) -> bool:
        return False  # every token has an advantage of its own


STAGE_COSTS: dict[type[Training], type[StageCost]] = {
    Supervised: SupervisedCost,
    Preference: PreferenceCost,
    Kto: KtoCost,
    Distill: DistillCost,
    Policy: PolicyCost,
    Ppo: PpoCost,
}
"""Class of the vocabulary -> its cost."""


def cost_of(stage: Training) -> StageCost:
    """Return the cost of a stage's kind."""
    kind = next(kind for kind in type(stage).__mro__ if kind in STAGE_COSTS)
    return STAGE_COSTS[kind](stage)
