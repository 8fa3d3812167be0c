"""Messages about attributes of one declaration that exclude each other."""

from __future__ import annotations

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages.wording import error
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import (
    policy_stages,
    preference_stages,
    rewards,
    supervised_stages,
    utility_stages,
)


def _contradiction(span: Span, title: str, label: str, help: str) -> Diagnostic:
    return error("contradiction", title, span, label, help=help)


# Policy optimisation.


def custom_loss_with_clip(span: Span, stage: policy_stages.Policy) -> Diagnostic:
    """Say that the user's `loss` replaces the clipped one."""
    assert stage.clip is not None
    return _contradiction(
        span,
        "a custom loss replaces the clipped one",
        f"`{stage.clip.word}` would have no effect",
        "write `clip = none`",
    )


def kl_target_without_penalty(span: Span, _: policy_stages.Ppo) -> Diagnostic:
    """Say that `kl_target` needs a divergence in the reward, whose coefficient it adapts."""
    return _contradiction(
        span,
        "`kl_target` needs a KL term in the reward",
        "has no effect",
        "subtract the KL term from the reward: `kl = k1(0.05, at = reward)`",
    )


def value_model_with_shared_trunk(span: Span, _: policy_stages.Ppo) -> Diagnostic:
    """Say that `value_model` has no effect on a critic that is a head on the policy."""
    return _contradiction(
        span,
        "a critic with a shared trunk starts from the policy",
        "has no effect",
        "write `critic = critic(trunk = separate)`, or remove this",
    )


# Distillation.


def every_log_prob_stored(span: Span, _: supervised_stages.Distill) -> Diagnostic:
    """Say that log-probabilities of the whole vocabulary cannot be stored."""
    return _contradiction(
        span,
        "log-probabilities of the whole vocabulary are too many to store",
        "needs `top_k`",
        "store those of the teacher's likeliest tokens: `top_k = 64`",
    )


def stored_before_sampling(span: Span, _: supervised_stages.Distill) -> Diagnostic:
    """Say that a teacher cannot score ahead answers that are sampled during training."""
    return _contradiction(
        span,
        "the teacher cannot score answers ahead that are sampled during training",
        "with `on_policy`",
        "run the teacher in each step: `teacher_log_probs = live`",
    )


def hidden_states_stored(span: Span, _: supervised_stages.Distill) -> Diagnostic:
    """Say that hidden states and attention are never stored ahead."""
    return _contradiction(
        span,
        "only log-probabilities can be stored ahead",
        "with `attention` or `features`",
        "run the teacher in each step: `teacher_log_probs = live`",
    )


def packed_examples(span: Span, _: supervised_stages.Distill) -> Diagnostic:
    """Say that a loss needs one example a sequence, without packing."""
    return _contradiction(
        span,
        "this needs one example in each sequence",
        "packing puts several into one",
        "write `packing = false`",
    )


# Preferences.


def unread_label_smoothing(span: Span, stage: preference_stages.Preference) -> Diagnostic:
    """Say that the loss does not read `label_smoothing`."""
    loss = stage.loss if isinstance(stage.loss, str) else stage.loss.word
    return _contradiction(
        span,
        f"the loss `{loss}` does not use `label_smoothing`",
        "has no effect",
        "write `loss = sigmoid` or `loss = robust`",
    )


def mostly_wrong_labels(span: Span, _: preference_stages.Preference) -> Diagnostic:
    """Say that a `label_smoothing` is a half or more."""
    return _contradiction(
        span,
        "this says that half of the labels or more are wrong",
        "must be below 50%",
        "swap `chosen` and `rejected`",
    )


# Merging.


def weights_for_models(span: Span, stage: utility_stages.Merge) -> Diagnostic:
    """Say that a merge has another number of weights than of models."""
    weights = len(getattr(stage.method, "weights", None) or ())
    return _contradiction(
        span,
        f"{weights} weights for {1 + len(stage.others)} models",
        "needs a weight for each model",
        "the first is for `from`, the next for `others` in their order",
    )


def slerp_of_models(span: Span, stage: utility_stages.Merge) -> Diagnostic:
    """Say that `slerp` merges two models only."""
    return _contradiction(
        span,
        f"`slerp` merges two models, and these are {1 + len(stage.others)}",
        "two models only",
        "use `linear()`, or one merge after another",
    )


# Evals.


def sampling_with_beams(span: Span, _: rewards.Generate) -> Diagnostic:
    """Say that a beam search ignores the attributes of sampling."""
    return _contradiction(
        span,
        "a beam search does not sample",
        "with `temperature`, `top_k` or `top_p`",
        "remove either",
    )


def more_samples_than_beams(span: Span, value: rewards.Generate) -> Diagnostic:
    """Say that a beam search has fewer beams than completions to return."""
    return _contradiction(
        span,
        f"{value.beams} beams cannot find {value.samples} completions",
        "more than there are beams",
        f"write `beams = {value.samples}`",
    )


def ranking_of_one(span: Span, _: rewards.Generate) -> Diagnostic:
    """Say that `rank` needs more than one completion for each prompt."""
    return _contradiction(
        span,
        "`rank` needs several completions to choose from",
        "one completion for each prompt",
        "write `samples = 4, temperature = 1.0`",
    )
