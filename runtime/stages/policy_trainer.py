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
class _Sampled:
    """Groups of completions that were sampled and scored together."""

    examples: list[Example]
    episodes: Episodes
    texts: list[str]
    scores: Scores
    batch: PolicyBatch
    """Without advantages; numpy."""
    rewards: NDArray[np.float64]
    """`[prompts, group]`, less the divergence where that belongs to the reward."""


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
    part: int
    """Completions of a group that are trained on with one copy of its prompt."""
    critic: AdvantageEstimator | None = None
    """None: a group is its own baseline."""
    cursor: int = 0
    """Prompts that were read."""
    overlaps: bool = False
    """The next call begins with sampling, which waits for the update."""
    _shown: list[SampleRecord] = field(default_factory=list)

    def call_end(self, step: int) -> int:
        """Return the step at which the call that begins at `step` ends: it makes one."""
        return step + 1

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """Make the step behind `step`; returns how to wait for its metrics."""
        del until
        begun = time.monotonic()
        rounds, kept = self._sample(step)
        sampled = time.monotonic() - begun
        batch, row = self._batch(kept)
        self.state, metrics = self.step_program(self.state, placed(batch, self.config))
        row |= {"rollout_seconds": sampled, "rounds": float(rounds)}

        def wait() -> Sequence[Row]:
            found = {name: float(value) for name, value in jax.device_get(metrics).items()}
            return [found | row]

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

    def _sample(self, step: int) -> tuple[int, list[tuple[_Sampled, NDArray[np.intp]]]]:
        """Sample the groups of a step; with `refill`, until all of them differ in their rewards.

        Returns the rounds, and what was sampled with the prompts of it that are trained on.
        """
        found: list[tuple[_Sampled, NDArray[np.intp]]] = []
        spare: list[tuple[_Sampled, NDArray[np.intp]]] = []
        missing = self.stage.batch
        while missing and len(found) < MOST_ROUNDS:
            sampled = self._round(step)
            flat = np.ptp(sampled.rewards, axis=1) <= 1e-6 * np.maximum(
                1.0, np.abs(sampled.rewards).max(1)
            )
            if not self.stage.refill:
                return 1, [(sampled, np.arange(self.stage.batch))]
            useful = np.flatnonzero(~flat)[:missing]
            found.append((sampled, useful))
            spare.append((sampled, np.flatnonzero(flat)))
            missing -= len(useful)
        rounds = len(found)
        for sampled, rest in spare:  # so that the step keeps its shape; they have no advantage
            if missing:
                found.append((sampled, rest[:missing]))
                missing -= len(rest[:missing])
        return rounds, [(sampled, prompts) for sampled, prompts in found if len(prompts)]

    def _round(self, step: int) -> _Sampled:
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
        batch = batch_of(episodes, self.prompt_length, self._padded(episodes))
        old = reference = None
        if self._needs_old:
            old = self._scored(self.score, self.state.decoder_params, batch)
        if self.reference is not None:
            score, params = self.reference
            reference = self._scored(score, on_devices(params), batch)
        values: NDArray[np.float32] | None = None
        if self.critic is not None:
            values = self._scored(self.critic.score, self.critic.params(self.state), batch)
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
        return _Sampled(examples, episodes, texts, scores, batch, rewards)

    def _scored(self, score: ScoreProgram, params: Any, batch: PolicyBatch) -> NDArray[np.float32]:
        parts = in_parts(batch, self.part)
        found = score(params, parts.prompts, parts.prompt_lengths, parts.tokens)
        return np.asarray(found).reshape(batch.tokens.shape)

    @property
    def _needs_old(self) -> bool:
        stage = self.stage
        in_reward = stage.kl is not None and stage.kl.at == "reward"
        return stage.passes * stage.minibatches > 1 or in_reward

    def _padded(self, episodes: Episodes) -> int:
        most = self.stage.rollout.max_tokens
        unit = -(-most // _LENGTHS)
        longest = max(1, int(episodes.lengths.max()))
        return min(-(-longest // unit) * unit, most)

    # The batch.

    def _batch(
        self, kept: list[tuple[_Sampled, NDArray[np.intp]]]
    ) -> tuple[PolicyBatch, dict[str, float]]:
        """Put the groups of a step together; returns also the metrics that the host has."""
        stage = self.stage
        rewards = np.concatenate([sampled.rewards[prompts] for sampled, prompts in kept])
        batch = joined([chosen(sampled.batch, prompts) for sampled, prompts in kept])
        mask, flat = batch.mask, np.zeros(len(rewards), bool)
        if self.critic is None:
            found = _advantages(jnp.asarray(rewards, jnp.float32), baseline=stage.advantage)
            batch = replace(batch, advantages=np.asarray(found.values))
            flat = np.asarray(found.flat)
            mask = mask & ~flat[:, None, None]
        if stage.overlong == "mask":
            # Their rewards still count in the baseline of their group (DAPO, arXiv:2503.14476,
            # section 3.4).
            truncated = np.concatenate(
                [s.episodes.truncated.reshape(-1, stage.group)[prompts] for s, prompts in kept]
            )
            mask = mask & ~truncated[..., None]
        batch = replace(batch, mask=mask)
        advantages = batch.advantages
        valued: dict[str, float] = {}
        if self.critic is not None:
            advantages = advantages[mask] if mask.any() else np.zeros(1)
            batch, valued = self.critic.finish_batch(batch)
        batch = in_parts(batch, self.part)
        if stage.minibatches == 1:
            batch = useful_first(batch, self.config)
        self._show(kept[0][0])
        counted = batch.mask.any(2)
        trained = float(batch.mask.sum() + batch.prompt_lengths[counted.any(1)].sum())
        row = self._metrics(kept, advantages, flat, trained) | valued
        if self.critic is not None:
            row["flops"] += self.critic.flops(trained, self.sampler.engine.capacity)
        return batch, row

    def _show(self, sampled: _Sampled) -> None:
        records = sample_records(sampled.examples, sampled.episodes, sampled.texts, sampled.scores)
        self._shown = list(records)[:: self.stage.group][: self.stage.show]

    def _metrics(
        self,
        kept: list[tuple[_Sampled, NDArray[np.intp]]],
        advantages: NDArray[np.float32],
        flat: NDArray[np.bool_],
        trained: float,
    ) -> dict[str, float]:
        """Return the metrics of a step that the host has; rewards are of all that was sampled.

        `trained` are the tokens of completions that are trained on, and of their prompts.
        """
        rounds = list({id(sampled): sampled for sampled, _ in kept}.values())
        weights = np.array([len(sampled.texts) for sampled in rounds], float)
        rows: dict[str, float] = {}
        found = [sampled.scores.metrics() for sampled in rounds]
        for name in found[0]:
            held = [
                (one[name], weight)
                for one, weight in zip(found, weights, strict=True)
                if name in one
            ]
            rows[name] = sum(v * w for v, w in held) / sum(w for _, w in held)
        rows["reward_events"] = float(sum(one["reward_events"] for one in found))
        for source in dict.fromkeys(e.source for sampled in rounds for e in sampled.examples):
            values = [
                sampled.scores.values.reshape(-1, self.stage.group)[at].mean()
                for sampled in rounds
                for at, example in enumerate(sampled.examples)
                if example.source == source
            ]
            rows[f"{source}.reward"] = float(np.mean(values))
        lengths = np.concatenate([sampled.episodes.lengths for sampled in rounds])
        truncated = np.concatenate([sampled.episodes.truncated for sampled in rounds])
        prompts = sum(
            len(prompt) * self.stage.group for s in rounds for prompt in s.episodes.prompts
        )
        read = sum(len(prompt) for s in rounds for prompt in s.episodes.prompts)
        a = self.model.architecture
        decode_steps = sum(sampled.episodes.work.decode_steps for sampled in rounds)
        return {
            **rows,
            "length": float(lengths.mean()),
            "length_max": float(lengths.max()),
            "truncated": float(truncated.mean()),
            "advantage": float(advantages.mean()),
            "advantage_std": float(advantages.std()),
            "flat_groups": float(flat.mean()),
            "slots_used": float(lengths.sum()) / max(1, decode_steps * self.sampler.engine.slots),
            "tokens": float(prompts + lengths.sum()),
            "flops": self.stage.passes * trained * train_flops(a, self.sampler.engine.capacity)
            + float(read + lengths.sum()) * forward_flops(a, self.sampler.engine.capacity),
        }
