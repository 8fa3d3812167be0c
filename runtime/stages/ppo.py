"""The critic of a PPO stage: values of tokens, and the advantages that are estimated from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tunelang.compiler.layout.sweep_fusion import at_unit_rate
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import forward_flops, train_flops
from tunelang.dsl.vocabulary.policy_stages import Ppo
from tunelang.dsl.vocabulary.training import Critic as Settings
from tunelang.runtime.loading.initial_weights import scoring
from tunelang.runtime.models.parameters import merge_params
from tunelang.runtime.objectives import gae, policy_gradient
from tunelang.runtime.rewards.reward_functions import Scores
from tunelang.runtime.stages.policy_step import Learner, PolicyBatch, ScoreProgram
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, initial_state


@dataclass
class Critic:
    """Estimates advantages in place of the groups of a policy stage."""

    stage: Ppo
    architecture: Architecture
    """With `scores`."""
    score: ScoreProgram
    coefficient: float = field(init=False)
    """Of the divergence that is taken off the rewards."""
    divergence: float = 0.0
    """Of a completion from the reference, in nats: the mean of what was sampled last."""

    def __post_init__(self) -> None:
        self.coefficient = 0.0 if self.stage.kl is None else self.stage.kl.coefficient

    def weights(self, state: TrainState) -> Any:
        """Return what `score` reads."""
        assert state.critic is not None
        if self.stage.critic.trunk == "separate":
            return merge_params(state.critic.params, state.aux_params)
        return scoring(self.architecture, state.decoder_params, state.critic.params)[1]

    def estimated(self, batch: PolicyBatch, found: Any, scores: Scores) -> PolicyBatch:
        """Add values, returns and advantages to a batch of numpy arrays.

        `found` are the values `[prompts, group, length]`.
        """
        stage, mask = self.stage, batch.mask
        rewards, own = scores.values.copy(), np.zeros(mask.shape)
        if scores.credit is not None:
            rewards -= scores.credit.sum(1)
            own[..., : scores.credit.shape[1]] = scores.credit.reshape(*mask.shape[:2], -1)
        if self._penalised:
            assert stage.kl is not None
            given = (jnp.asarray(each) for each in (batch.old, batch.reference, batch.mask))
            divergences = np.asarray(policy_gradient.divergences(stage.kl, *given))
            self.divergence = float(divergences.sum(-1).mean())
            own -= self.coefficient * divergences
        each = gae.token_rewards(rewards.reshape(mask.shape[:-1]), own, mask)
        advantages, returns = gae.gae(each, found, mask, stage.discount, stage.trace)
        return replace(
            batch,
            values=found,
            advantages=advantages.astype(np.float32),
            returns=returns.astype(np.float32),
        )

    def whitened(self, batch: PolicyBatch) -> tuple[PolicyBatch, dict[str, float]]:
        """Return the batch of a step as it is trained on, and metrics; the coefficient of the
        divergence then is the next step's.
        """
        mask, stage = batch.mask, self.stage
        count = max(1, int(mask.sum()))
        row = {
            "value": float(np.sum(batch.values, where=mask)) / count,
            "return": float(np.sum(batch.returns, where=mask)) / count,
            "explained_variance": gae.explained_variance(batch.values, batch.returns, mask),
        }
        if stage.whiten:
            white = gae.whiten(batch.advantages, mask).astype(np.float32)
            batch = replace(batch, advantages=white)
        if self._penalised:
            row["kl_coefficient"] = self.coefficient
            if stage.kl_target is not None:
                share = stage.batch * stage.group / stage.kl_horizon
                self.coefficient = gae.adapted(
                    self.coefficient, self.divergence, stage.kl_target, share
                )
        return batch, row

    def flops(self, tokens: float, length: int) -> float:
        """Count what a step has to compute for so many tokens that are trained on."""
        found = tokens * forward_flops(self.architecture, length)
        if self.stage.critic.trunk == "separate":
            found += self.stage.passes * tokens * train_flops(self.architecture, length)
        return found

    @property
    def _penalised(self) -> bool:
        return self.stage.kl is not None and self.stage.kl.at == "reward"


def learner_of(
    settings: Settings, architecture: Architecture, updates: int, *, offloaded: bool = False
) -> Learner:
    """Return what updates a critic over a stage, at a peak rate of 1; the moments of more than a
    head may be `offloaded`.
    """
    optimizer = at_unit_rate(settings.optimizer)
    return Learner(
        settings.model_copy(update={"optimizer": optimizer}),
        architecture if settings.trunk == "separate" else None,
        build_optimizer(optimizer, updates, offloaded=offloaded and settings.trunk == "separate"),
        learning_rate(optimizer, updates),
    )


def with_critic(
    state: TrainState, critic: tuple[Architecture, Any], learner: Learner,
    config: StepConfig, rate: float,
) -> TrainState:  # fmt: skip
    """Put a critic, its architecture and parameters, beside the state of a policy."""
    config = replace(config, offloaded=config.offloaded and learner.architecture is not None)
    made = initial_state(*critic, learner.optimizer, config, rate)
    return replace(state, critic=replace(made, frozen=nnx.State({})), aux_params=made.frozen)
