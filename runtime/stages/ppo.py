"""Proximal policy optimisation: a critic's values of tokens give the advantages (GAE).

Sources: Schulman et al. 2017, arXiv:1707.06347; generalised advantages, arXiv:1506.02438.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ShapeDtypeStruct
from numpy.typing import NDArray
from typing_extensions import override

from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import forward_flops, train_flops
from tunelang.compiler.search.sweep_fusion import at_unit_rate
from tunelang.dsl.vocabulary.policy_stages import Ppo
from tunelang.dsl.vocabulary.training import Continued
from tunelang.dsl.vocabulary.training import Critic as Settings
from tunelang.runtime.loading.initial_weights import initial_params, score_head, with_score_head
from tunelang.runtime.models.parameters import Params, merge_params
from tunelang.runtime.objectives import gae, policy_gradient
from tunelang.runtime.rewards.reward_functions import Scores
from tunelang.runtime.sharding import Layout, shardings
from tunelang.runtime.stages.abstract_programs import SCHEDULE_STEPS
from tunelang.runtime.stages.policy import CriticSetup, PolicyKind
from tunelang.runtime.stages.policy_step import Learner, PolicyBatch, ScoreProgram
from tunelang.runtime.stages.stage_kinds import TrainingInputs, register
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, abstract_state


@dataclass
class GaeEstimator:
    """Estimates the advantages of tokens from a critic's values."""

    stage: Ppo
    architecture: Architecture
    """The critic's, with `scores`."""
    score: ScoreProgram
    coefficient: float = field(init=False)
    """The coefficient of the divergence that is taken off the rewards."""
    divergence: float = 0.0
    """The mean divergence of the last completions from the reference, in nats."""

    def __post_init__(self) -> None:
        self.coefficient = 0.0 if self.stage.kl is None else self.stage.kl.coefficient

    def params(self, state: TrainState) -> Params:
        """Return the parameters that `score` reads."""
        assert state.critic is not None
        if self.stage.critic.trunk == "separate":
            return merge_params(state.critic.params, state.aux_params)
        params: Params = with_score_head(
            self.architecture, state.decoder_params, state.critic.params
        )[1]
        return params

    def estimate(
        self, batch: PolicyBatch, values: NDArray[np.float32], scores: Scores
    ) -> PolicyBatch:
        """Add `values` `[prompts, group, length]`, returns and advantages to a numpy batch."""
        stage, mask = self.stage, batch.mask
        rewards, credit = scores.values.copy(), np.zeros(mask.shape)
        if scores.credit is not None:
            rewards -= scores.credit.sum(1)
            credit[..., : scores.credit.shape[1]] = scores.credit.reshape(*mask.shape[:2], -1)
        if self._penalises_divergence:
            assert stage.kl is not None
            log_probs = (jnp.asarray(a) for a in (batch.old, batch.reference, batch.mask))
            divergences = np.asarray(policy_gradient.divergences(stage.kl, *log_probs))
            self.divergence = float(divergences.sum(-1).mean())
            credit -= self.coefficient * divergences
        token_rewards = gae.token_rewards(rewards.reshape(mask.shape[:-1]), credit, mask)
        advantages, returns = gae.gae(token_rewards, values, mask, stage.discount, stage.trace)
        return replace(
            batch,
            values=values,
            advantages=advantages.astype(np.float32),
            returns=returns.astype(np.float32),
        )

    def finish_batch(self, batch: PolicyBatch) -> tuple[PolicyBatch, dict[str, float]]:
        """Return the batch of a step as it is trained on, and metrics; the coefficient of the
        divergence then is the next step's.
        """
        mask, stage = batch.mask, self.stage
        count = max(1, int(mask.sum()))
        metrics = {
            "value": float(np.sum(batch.values, where=mask)) / count,
            "return": float(np.sum(batch.returns, where=mask)) / count,
            "explained_variance": gae.explained_variance(batch.values, batch.returns, mask),
        }
        if stage.whiten:
            white = gae.whiten(batch.advantages, mask).astype(np.float32)
            batch = replace(batch, advantages=white)
        if self._penalises_divergence:
            metrics["kl_coefficient"] = self.coefficient
            if stage.kl_target is not None:
                share = stage.batch * stage.group / stage.kl_horizon
                self.coefficient = gae.adapted(
                    self.coefficient, self.divergence, stage.kl_target, share
                )
        return batch, metrics

    def flops(self, tokens: float, length: int) -> float:
        """Count the FLOPs of a step that trains on so many tokens of sequences of this length."""
        flops = tokens * forward_flops(self.architecture, length)
        if self.stage.critic.trunk == "separate":
            flops += self.stage.passes * tokens * train_flops(self.architecture, length)
        return flops

    @property
    def _penalises_divergence(self) -> bool:
        return self.stage.kl is not None and self.stage.kl.at == "reward"


@register
class PpoKind(PolicyKind[Ppo]):
    """Trains a policy and its critic."""

    stages = (Ppo,)

    @override
    def open_critic(
        self, stage: Ppo, inputs: TrainingInputs, updates: int, config: StepConfig
    ) -> CriticSetup:
        architecture, params = _initial_critic(stage, inputs)
        return CriticSetup(
            learner=learner_of(stage.critic, architecture, updates, offloaded=config.offloaded),
            architecture=architecture,
            params=params,
            learning_rate=stage.critic.optimizer.lr,
            estimator=lambda score: GaeEstimator(stage, architecture, score),
        )

    @override
    def abstract_critic(
        self, stage: Ppo, architecture: Architecture, state: TrainState, config: StepConfig
    ) -> tuple[Learner, TrainState]:
        scores = replace(architecture, scores=True)
        learner = learner_of(stage.critic, scores, SCHEDULE_STEPS, offloaded=config.offloaded)
        critic = abstract_state(scores, learner.optimizer, config)
        if stage.critic.trunk == "shared":
            critic = _head_state(critic, learner, config.layout)
        state = replace(
            state, critic=replace(critic, frozen=nnx.State({})), aux_params=critic.frozen
        )
        return learner, state


def _initial_critic(stage: Ppo, inputs: TrainingInputs) -> tuple[Architecture, Params]:
    """Return the critic's architecture and initial parameters; of a shared trunk its head."""
    layout = inputs.layout
    architecture, params = inputs.model.architecture, Params({})
    if stage.critic.trunk == "separate" and stage.value_model is None:
        params = inputs.initial_weights()
    elif stage.critic.trunk == "separate" and stage.value_model is not None:
        model = inputs.same_tokenizer("value_model", stage.value_model)
        adapter = stage.adapter
        if isinstance(adapter, Continued):
            adapter = inputs.source.adapters[-1][0]
        origin = inputs.origin(stage.value_model)
        architecture, params = initial_params(origin, adapter, model, layout, inputs.weights_seed)
    if architecture.scores:
        return architecture, params
    # A head of zeros values all tokens alike, until it has learned something.
    head = score_head(architecture, jnp.zeros(architecture.width), layout)
    return with_score_head(architecture, params, head)


def learner_of(
    settings: Settings, architecture: Architecture, updates: int, *, offloaded: bool = False
) -> Learner:
    """Return what updates a critic, for a peak learning rate of 1.

    With `offloaded`, moments lie in host memory, except those of a head alone.
    """
    optimizer = at_unit_rate(settings.optimizer)
    return Learner(
        settings.model_copy(update={"optimizer": optimizer}),
        architecture if settings.trunk == "separate" else None,
        build_optimizer(optimizer, updates, offloaded=offloaded and settings.trunk == "separate"),
        learning_rate(optimizer, updates),
    )


def _head_state(state: TrainState, learner: Learner, layout: Layout) -> TrainState:
    """Return the abstract state of a critic that is one more head on the policy."""
    head, _ = nnx.split_state(state.params, lambda path, _: path[0] == "score", ...)
    moments = jax.eval_shape(learner.optimizer.init, head)
    moments = jax.tree.map(
        lambda leaf, place: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        moments,
        shardings(moments, layout),
    )
    return replace(state, params=head, optimizer=moments, frozen=nnx.State({}))
