"""Samples groups of completions, scores them and updates the policy. One step is one call.

Rewards are computed in other processes while the devices compute what else the update needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tunelang.compiler.models.parameter_counts import forward_flops, train_flops
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.runtime.data.examples import Example
from tunelang.runtime.data.stream import Stream
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Episodes, Prompt, completion_texts
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.objectives import policy_gradient
from tunelang.runtime.objectives.advantages import group_advantages
from tunelang.runtime.rewards.reward_functions import CompiledReward, Scores
from tunelang.runtime.rewards.reward_rows import reward_rows, sample_records
from tunelang.runtime.sharding import Layout, on_devices
from tunelang.runtime.stages.policy_step import (
    PolicyBatch,
    ScoreProgram,
    batch_of,
    chosen,
    in_parts,
    joined,
    placed,
    useful_first,
)
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState
from tunelang.runtime.training.train_step import StateProgram
from tunelang.runtime.training.training_loop import Row

MOST_ROUNDS = 10
"""Rounds of sampling for one step (`refill`), at most; then the step trains on what there is."""
_LENGTHS = 4
"""Completions are padded to the next of so many lengths: a compromise between compiled programs and
padding."""

_advantages = jax.jit(group_advantages, static_argnames="baseline")


@dataclass(frozen=True)
class _Round:
    """One round of sampling: a group of completions for each prompt, scored."""

    examples: list[Example]
    episodes: Episodes
    texts: list[str]
    scores: Scores
    batch: PolicyBatch
    """Without advantages; numpy."""
    rewards: NDArray[np.float64]
    """`[prompts, group]`, less the divergence where it is part of the reward."""


Selection = list[tuple[_Round, NDArray[np.intp]]]
"""Rounds, each with the indices of its prompts that are trained on."""


class AdvantageEstimator(Protocol):
    """Estimates advantages by token, in place of the groups of a policy."""

    @property
    def score(self) -> ScoreProgram:
        """The program that values the tokens of completions."""

    coefficient: float
    """The coefficient of the divergence that is taken off the rewards."""

    def params(self, state: TrainState) -> Params:
        """Return the parameters that `score` reads."""

    def estimate(
        self, batch: PolicyBatch, values: NDArray[np.float32], scores: Scores
    ) -> PolicyBatch:
        """Add `values` `[prompts, group, length]`, returns and advantages to a numpy batch."""

    def finish_batch(self, batch: PolicyBatch) -> tuple[PolicyBatch, dict[str, float]]:
        """Return the batch of a step as it is trained on, and metrics."""

    def flops(self, tokens: float, length: int) -> float:
        """Count the FLOPs of a step that trains on so many tokens of sequences of this length."""


@dataclass
class PolicyTrainer:
    """Trains a policy on the rewards of its own completions."""

    stage: Policy
    model: Model
    layout: Layout
    seed: int
    state: TrainState
    steps: int
    marks: frozenset[int]
    stream: Stream
    sampler: Sampler
    reward: CompiledReward
    config: StepConfig
    step_program: StateProgram
    score: ScoreProgram
    reference: tuple[ScoreProgram, Any] | None
    """The program and parameters of the reference model; None where nothing reads them."""
    prompt_length: int
    """The longest prompt, in tokens."""
    completions_per_prompt: int
    """Completions of a group that are trained on with one copy of its prompt."""
    critic: AdvantageEstimator | None = None
    """None: a group is its own baseline."""
    cursor: int = 0
    """Number of prompts read so far."""
    overlaps: bool = False
    """The next call begins with sampling, which waits for the update."""
    _shown: list[SampleRecord] = field(default_factory=list)

    def call_end(self, step: int) -> int:
        """Return the step at which the call that begins at `step` ends: it makes one."""
        return step + 1

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """Make the step that follows `step`; returns how to wait for its metrics."""
        del until
        start = time.monotonic()
        rounds, selection = self._sample(step)
        rollout_seconds = time.monotonic() - start
        batch, row = self._batch(selection)
        self.state, metrics = self.step_program(self.state, placed(batch, self.config))
        row |= {"rollout_seconds": rollout_seconds, "rounds": float(rounds)}

        def wait() -> Sequence[Row]:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            return [values | row]

        return wait

    def samples(self) -> Sequence[SampleRecord]:
        """Return completions of the last step, to read."""
        return self._shown

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold besides the state."""
        return {"cursor": self.cursor} | (
            {} if self.critic is None else {"coefficient": self.critic.coefficient}
        )

    def resume(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.state = state
        self.cursor = int(progress["cursor"])
        if self.critic is not None:
            self.critic.coefficient = float(progress["coefficient"])

    def updates(self, step: int) -> int:
        """Return the updates of the first `step` steps."""
        return step * self.stage.minibatches * self.stage.passes

    def close(self) -> None:
        """End the processes that compute rewards."""
        self.reward.close()

    # Sampling.

    def _sample(self, step: int) -> tuple[int, Selection]:
        """Sample the groups of a step; with `refill`, until all of them differ in their rewards.

        Returns the number of rounds, and what is trained on.
        """
        selection: Selection = []
        flat_prompts: Selection = []
        missing = self.stage.batch
        while missing and len(selection) < MOST_ROUNDS:
            sampled = self._round(step)
            if not self.stage.refill:
                return 1, [(sampled, np.arange(self.stage.batch))]
            spread = np.ptp(sampled.rewards, axis=1)
            is_flat = spread <= 1e-6 * np.maximum(1.0, np.abs(sampled.rewards).max(1))
            useful = np.flatnonzero(~is_flat)[:missing]
            selection.append((sampled, useful))
            flat_prompts.append((sampled, np.flatnonzero(is_flat)))
            missing -= len(useful)
        rounds = len(selection)
        # Flat groups fill the step up, so that it keeps its shape; they have no advantage.
        for sampled, prompts in flat_prompts:
            if missing:
                selection.append((sampled, prompts[:missing]))
                missing -= len(prompts[:missing])
        return rounds, [(sampled, prompts) for sampled, prompts in selection if len(prompts)]

    def _round(self, step: int) -> _Round:
        """Sample and score a group of completions for each of the next prompts.

        The devices score log-probabilities and values while other processes compute rewards.
        """
        stage, renderer = self.stage, self.model.renderer
        places = np.arange(self.cursor, self.cursor + stage.batch, dtype=np.int64)
        examples = self.stream.examples_at(places)
        self.cursor += stage.batch
        prompts = [
            Prompt(renderer.prompt(example), int(place) % 2**31)
            for example, place in zip(examples, places, strict=True)
        ]
        episodes = self.sampler.sample(
            self.state.decoder_params, prompts, group=stage.group, seed=self.seed, step=step
        )
        texts = completion_texts(renderer, episodes)
        scoring = self.reward.submit(reward_rows(renderer, examples, episodes, texts))
        batch = batch_of(episodes, self.prompt_length, self._padded_length(episodes))
        old = reference = None
        if self._needs_old_log_probs:
            old = self._score_tokens(self.score, self.state.decoder_params, batch)
        if self.reference is not None:
            score, params = self.reference
            reference = self._score_tokens(score, on_devices(params), batch)
        values: NDArray[np.float32] | None = None
        if self.critic is not None:
            values = self._score_tokens(self.critic.score, self.critic.params(self.state), batch)
        batch = replace(batch, old=old, reference=reference)
        scores = scoring.result()
        rewards = scores.values
        if self.critic is not None and values is not None:
            batch = self.critic.estimate(batch, values, scores)
        elif stage.kl is not None and stage.kl.at == "reward":
            length = batch.tokens.shape[2]
            rewards = np.asarray(
                policy_gradient.penalised(
                    jnp.asarray(rewards, jnp.float32),
                    stage.kl,
                    jnp.asarray(old).reshape(-1, length),
                    jnp.asarray(reference).reshape(-1, length),
                    jnp.asarray(batch.mask).reshape(-1, length),
                ),
                np.float64,
            )
        if stage.passes * stage.minibatches == 1:
            batch = replace(batch, old=None)
        rewards = rewards.reshape(-1, stage.group)
        return _Round(examples, episodes, texts, scores, batch, rewards)

    def _score_tokens(
        self, score: ScoreProgram, params: Any, batch: PolicyBatch
    ) -> NDArray[np.float32]:
        parts = in_parts(batch, self.completions_per_prompt)
        by_token = score(params, parts.prompts, parts.prompt_lengths, parts.tokens)
        return np.asarray(by_token).reshape(batch.tokens.shape)

    @property
    def _needs_old_log_probs(self) -> bool:
        stage = self.stage
        in_reward = stage.kl is not None and stage.kl.at == "reward"
        return stage.passes * stage.minibatches > 1 or in_reward

    def _padded_length(self, episodes: Episodes) -> int:
        most = self.stage.rollout.max_tokens
        unit = -(-most // _LENGTHS)
        longest = max(1, int(episodes.lengths.max()))
        return min(-(-longest // unit) * unit, most)

    # The batch.

    def _batch(self, selection: Selection) -> tuple[PolicyBatch, dict[str, float]]:
        """Put the groups of a step together; returns also the metrics that the host knows."""
        stage = self.stage
        rewards = np.concatenate([sampled.rewards[prompts] for sampled, prompts in selection])
        batch = joined([chosen(sampled.batch, prompts) for sampled, prompts in selection])
        mask, is_flat = batch.mask, np.zeros(len(rewards), bool)
        if self.critic is None:
            advantages = _advantages(jnp.asarray(rewards, jnp.float32), baseline=stage.advantage)
            batch = replace(batch, advantages=np.asarray(advantages.values))
            is_flat = np.asarray(advantages.flat)
            mask = mask & ~is_flat[:, None, None]
        if stage.overlong == "mask":
            # Their rewards still count in the baseline of their group (DAPO, arXiv:2503.14476,
            # section 3.4).
            truncated = np.concatenate(
                [
                    sampled.episodes.truncated.reshape(-1, stage.group)[prompts]
                    for sampled, prompts in selection
                ]
            )
            mask = mask & ~truncated[..., None]
        batch = replace(batch, mask=mask)
        shown_advantages = batch.advantages
        critic_metrics: dict[str, float] = {}
        if self.critic is not None:
            shown_advantages = shown_advantages[mask] if mask.any() else np.zeros(1)
            batch, critic_metrics = self.critic.finish_batch(batch)
        batch = in_parts(batch, self.completions_per_prompt)
        if stage.minibatches == 1:
            batch = useful_first(batch, self.config)
        self._show(selection[0][0])
        is_counted = batch.mask.any(2)
        trained = float(batch.mask.sum() + batch.prompt_lengths[is_counted.any(1)].sum())
        row = self._metrics(selection, shown_advantages, is_flat, trained) | critic_metrics
        if self.critic is not None:
            row["flops"] += self.critic.flops(trained, self.sampler.engine.capacity)
        return batch, row

    def _show(self, sampled: _Round) -> None:
        records = sample_records(sampled.examples, sampled.episodes, sampled.texts, sampled.scores)
        self._shown = list(records)[:: self.stage.group][: self.stage.show]

    def _metrics(
        self,
        selection: Selection,
        advantages: NDArray[np.float32],
        is_flat: NDArray[np.bool_],
        trained: float,
    ) -> dict[str, float]:
        """Return the metrics of a step that the host knows; rewards are of all that was sampled.

        `trained` counts the tokens of completions that are trained on, and of their prompts.
        """
        rounds = list({id(sampled): sampled for sampled, _ in selection}.values())
        episodes = [sampled.episodes for sampled in rounds]
        lengths = np.concatenate([one.lengths for one in episodes])
        truncated = np.concatenate([one.truncated for one in episodes])
        prompt_tokens = sum(len(prompt) for one in episodes for prompt in one.prompts)
        decode_steps = sum(one.work.decode_steps for one in episodes)
        a, engine = self.model.architecture, self.sampler.engine
        read = prompt_tokens + lengths.sum()
        return {
            **self._reward_metrics(rounds),
            "length": float(lengths.mean()),
            "length_max": float(lengths.max()),
            "truncated": float(truncated.mean()),
            "advantage": float(advantages.mean()),
            "advantage_std": float(advantages.std()),
            "flat_groups": float(is_flat.mean()),
            "slots_used": float(lengths.sum()) / max(1, decode_steps * engine.slots),
            "tokens": float(prompt_tokens * self.stage.group + lengths.sum()),
            "flops": self.stage.passes * trained * train_flops(a, engine.capacity)
            + float(read) * forward_flops(a, engine.capacity),
        }

    def _reward_metrics(self, rounds: Sequence[_Round]) -> dict[str, float]:
        """Average the rewards and their parts over completions, and the reward of each source."""
        weights = [float(len(sampled.texts)) for sampled in rounds]
        by_round = [sampled.scores.metrics() for sampled in rounds]
        metrics: dict[str, float] = {}
        for name in by_round[0]:
            values = [
                (row[name], weight)
                for row, weight in zip(by_round, weights, strict=True)
                if name in row
            ]
            metrics[name] = sum(v * w for v, w in values) / sum(w for _, w in values)
        metrics["reward_events"] = float(sum(row["reward_events"] for row in by_round))
        sources: dict[str, list[float]] = {}
        for sampled in rounds:
            means = sampled.scores.values.reshape(-1, self.stage.group).mean(1)
            for example, mean in zip(sampled.examples, means.tolist(), strict=True):
                sources.setdefault(example.source, []).append(mean)
        return metrics | {f"{name}.reward": float(np.mean(v)) for name, v in sources.items()}
