"""Attributes of one declaration that exclude each other: a table for each kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import attribute_conflicts
from tunelang.dsl.program import Declared
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import (
    policy_stages,
    preference_stages,
    rewards,
    supervised_stages,
    training,
    utility_stages,
)
from tunelang.dsl.vocabulary.base import Kind

K = TypeVar("K", bound=Kind)


@dataclass(frozen=True, kw_only=True)
class Contradiction(Generic[K]):
    """A combination of values of one kind that makes no sense."""

    path: str
    """The attribute to report at."""
    applies: Callable[[K], bool]
    message: Callable[[Span, K], Diagnostic]


POLICY = (
    Contradiction[policy_stages.Policy](
        path="loss",
        applies=lambda stage: stage.loss is not None and stage.clip is not None,
        message=attribute_conflicts.custom_loss_with_clip,
    ),
)

DISTILL = (
    Contradiction[supervised_stages.Distill](
        path="teacher_log_probs",
        applies=lambda stage: stage.teacher_log_probs == "ahead" and stage.top_k is None,
        message=attribute_conflicts.every_log_prob_stored,
    ),
    Contradiction[supervised_stages.Distill](
        path="teacher_log_probs",
        applies=lambda stage: stage.teacher_log_probs == "ahead" and stage.on_policy > 0,
        message=attribute_conflicts.stored_before_sampling,
    ),
    Contradiction[supervised_stages.Distill](
        path="teacher_log_probs",
        applies=lambda stage: (
            stage.teacher_log_probs == "ahead"
            and (stage.attention is not None or stage.features is not None)
        ),
        message=attribute_conflicts.hidden_states_stored,
    ),
    Contradiction[supervised_stages.Distill](
        path="on_policy",
        applies=lambda stage: stage.packing and stage.on_policy > 0,
        message=attribute_conflicts.packed_examples,
    ),
    Contradiction[supervised_stages.Distill](
        path="features",
        applies=lambda stage: stage.packing and not stage.on_policy and _pools_features(stage),
        message=attribute_conflicts.packed_examples,
    ),
)


def _pools_features(stage: supervised_stages.Distill) -> bool:
    return stage.features is not None and stage.features.pooling != "token"


PREFERENCE = (
    Contradiction[preference_stages.Preference](
        path="label_smoothing",
        applies=lambda stage: stage.label_smoothing > 0 and stage.loss not in ("sigmoid", "robust"),
        message=attribute_conflicts.unread_label_smoothing,
    ),
    Contradiction[preference_stages.Preference](
        path="label_smoothing",
        applies=lambda stage: stage.label_smoothing >= 0.5,
        message=attribute_conflicts.mostly_wrong_labels,
    ),
)

PPO = (
    Contradiction[policy_stages.Ppo](
        path="kl_target",
        applies=lambda stage: (
            stage.kl_target is not None and (stage.kl is None or stage.kl.at != "reward")
        ),
        message=attribute_conflicts.kl_target_without_penalty,
    ),
    Contradiction[policy_stages.Ppo](
        path="value_model",
        applies=lambda stage: stage.value_model is not None and stage.critic.trunk == "shared",
        message=attribute_conflicts.value_model_with_shared_trunk,
    ),
)

MERGE = (
    Contradiction[utility_stages.Merge](
        path="method",
        applies=lambda stage: _weight_count(stage) not in (None, 1 + len(stage.others)),
        message=attribute_conflicts.weights_for_models,
    ),
    Contradiction[utility_stages.Merge](
        path="method",
        applies=lambda stage: isinstance(stage.method, training.Slerp) and len(stage.others) != 1,
        message=attribute_conflicts.slerp_of_models,
    ),
)


def _weight_count(stage: utility_stages.Merge) -> int | None:
    weights = getattr(stage.method, "weights", None)
    return len(weights) if weights is not None else None


GENERATE = (
    Contradiction[rewards.Generate](
        path="beams",
        applies=lambda value: (
            value.beams is not None and bool(value.temperature or value.top_k or value.top_p)
        ),
        message=attribute_conflicts.sampling_with_beams,
    ),
    Contradiction[rewards.Generate](
        path="samples",
        applies=lambda value: value.beams is not None and value.samples > value.beams,
        message=attribute_conflicts.more_samples_than_beams,
    ),
    Contradiction[rewards.Generate](
        path="rank",
        applies=lambda value: value.rank is not None and value.samples < 2,
        message=attribute_conflicts.ranking_of_one,
    ),
)

CONTRADICTIONS: dict[type[Kind], tuple[Contradiction[Any], ...]] = {
    policy_stages.Policy: POLICY,
    supervised_stages.Distill: DISTILL,
    preference_stages.Preference: PREFERENCE,
    policy_stages.Ppo: PPO,
    utility_stages.Merge: MERGE,
    rewards.Generate: GENERATE,
}
"""Kind, subclasses included -> its contradictions."""


def check_contradictions(context: RuleContext, declared: Declared, value: object) -> None:
    """Report each contradiction of a declaration's value."""
    for kind, table in CONTRADICTIONS.items():
        if isinstance(value, kind):
            for row in table:
                if row.applies(value):
                    context.report(row.message(context.span(declared, row.path), value))
