"""Policy optimisation: sample groups of completions, score them, update. One step is one call.

Rewards are computed in other processes while the devices compute what else the update needs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.layout.sweep_fusion import at_unit_rate
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import forward_flops, train_flops
from tunelang.dsl.vocabulary.policy_stages import Policy, Ppo
from tunelang.runtime.data.examples import Example
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.data.sample_order import steps_of
from tunelang.runtime.data.stream import Stream
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Episodes, Prompt, completion_texts
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.objectives import policy_gradient
from tunelang.runtime.rewards.reward_functions import Reward, Scores
from tunelang.runtime.rewards.reward_rows import reward_rows, sample_records
from tunelang.runtime.sharding import HOST, Layout, on_devices, sampling, shardings
from tunelang.runtime.stages.policy_step import (
    Learner,
    PolicyBatch,
    ScoreProgram,
    batch_of,
    chosen,
    in_parts,
    joined,
    placed,
    policy_step,
    score_program,
    useful_first,
)
from tunelang.runtime.stages.ppo import Critic, learner_of, with_critic
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState
from tunelang.runtime.training.train_step import StateProgram
from tunelang.runtime.training.training_loop import Row

MOST_ROUNDS = 10
"""How often prompts are sampled for one step (`refill`); what differs by then is trained on."""
_LENGTHS = 4
"""Completions are padded to one of so many lengths: few programs compile, few tokens are wasted."""

_advantages = jax.jit(policy_gradient.advantages, static_argnames="how")


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


@dataclass
class PolicyTrainer:
    """See `loop.Trainer`."""

    stage: Policy
    model: Model
    layout: Layout
    seed: int
    state: TrainState
    steps: int
    marks: frozenset[int]
    stream: Stream
    sampler: Sampler
    reward: Reward
    config: StepConfig
    step_program: StateProgram
    score: ScoreProgram
    reference: tuple[ScoreProgram, Any] | None
    """The program and parameters of the reference model; None where nothing reads them."""
    prompt_length: int
    """The longest prompt, in tokens."""
    part: int
    """Completions of a group that are trained on beside one copy of its prompt."""
    critic: Critic | None = None
    """Estimates advantages; without it, a group is its own baseline."""
    cursor: int = 0
    """Prompts that were read."""
    ahead: bool = False  # the next call begins with sampling, which waits for the update
    _shown: list[SampleRecord] = field(default_factory=list)

    def until(self, step: int) -> int:
        """See `loop.Trainer`."""
        return step + 1

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """See `loop.Trainer`."""
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
        """See `loop.Trainer`."""
        return self._shown

    def progress(self) -> dict[str, Any]:
        """See `loop.Trainer`."""
        return {"cursor": self.cursor} | (
            {} if self.critic is None else {"coefficient": self.critic.coefficient}
        )

    def resume(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """See `loop.Trainer`."""
        self.state = state
        self.cursor = int(progress["cursor"])
        if self.critic is not None:
            self.critic.coefficient = float(progress["coefficient"])

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
        examples = self.stream.at(places)
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
        old = reference = valued = None
        if self._needs_old:
            old = self._scored(self.score, self.state.decoder_params, batch)
        if self.reference is not None:
            score, params = self.reference
            reference = self._scored(score, on_devices(params), batch)
        if self.critic is not None:
            valued = self._scored(self.critic.score, self.critic.weights(self.state), batch)
        batch = replace(batch, old=old, reference=reference)
        scores = scoring.result()
        rewards = scores.values
        if self.critic is not None:
            batch = self.critic.estimated(batch, valued, scores)
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
            found = _advantages(jnp.asarray(rewards, jnp.float32), how=stage.advantage)
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
            batch, valued = self.critic.whitened(batch)
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


def decode_layout(planned: StageLayout, layout: Layout) -> Layout | None:
    """Return the layout of the rollout; None on one device, where there is nothing to choose."""
    if planned.decode is None or layout.mesh.size == 1:
        return None
    return sampling(layout, **planned.decode)


def policy_trainer(
    resources: Resources,
    stage: Policy,
    model: Model,
    planned: StageLayout,
    layout: Layout,
    seed: int,
    begin: Callable[[Any, StepConfig], TrainState],
    reference: Callable[[], tuple[Architecture, Any]],
    critic: Callable[[], tuple[Architecture, Any]],
    reward: Reward,
    marks: frozenset[int],
) -> PolicyTrainer:
    """Open the prompts and compile the programs of a stage.

    `begin` makes the first state from the optimizer and the program, `reference` the architecture
    and the parameters of the reference model, `critic` those of the values: with a shared trunk
    the head alone. Raises what opening data raises.
    """
    a, rollouts = model.architecture, stage.rollout
    stream, longest = resources.prompts(stage.data, model, rollouts, seed=derive(seed, "data"))
    assert planned.slots is not None
    steps = steps_of(stage.length, epoch=len(stream), batch=stage.batch)
    rows = stage.batch * stage.group // stage.minibatches
    config = StepConfig(
        layout=layout,
        dtype=model.dtype,
        micro_batches=math.gcd(planned.micro_batches, rows // layout.batch_shards),
        remat=planned.remat,
        kernel="xla",  # prompts are short, and of any length
        chunk=CHUNK,
        seed=derive(seed, "minibatches") % 2**31 if stage.minibatches > 1 else 0,
        offloaded="optimizer" in planned.offload,
    )
    updates = steps * stage.minibatches * stage.passes
    unit = at_unit_rate(stage.optimizer)
    plain = stage.model_copy(update={"optimizer": unit})
    key = tuple(
        getattr(plain, name)
        for name in (
            "ratio", "clip", "loss", "aggregate", "kl", "correction", "entropy", "minibatches",
            "passes", "rollout", "optimizer",
        )
    )  # fmt: skip
    learner: Learner | None = None
    if isinstance(stage, Ppo):
        valued = critic()
        learner = learner_of(stage.critic, valued[0], updates, offloaded=config.offloaded)
        key += learner.settings, valued[0]

    def compiled() -> Any:
        optimizer = build_optimizer(unit, updates, offloaded=config.offloaded)
        schedule = learning_rate(unit, updates)
        return optimizer, policy_step(a, optimizer, schedule, plain, config, learner)

    optimizer, step_program = resources.cached(("policy", a, config, updates, key), compiled)

    def score(architecture: Architecture) -> ScoreProgram:
        return resources.cached(
            ("score", architecture, config, rollouts.temperature),
            lambda: score_program(architecture, config, rollouts.temperature),
        )

    decode = decode_layout(planned, layout)
    measured = reference() if stage.kl is not None else None
    if measured is not None and "reference" in planned.offload:
        places = shardings(measured[1], layout, HOST)
        measured = measured[0], jax.device_put(measured[1], places)
    state = begin(optimizer, config)
    estimator: Critic | None = None
    if isinstance(stage, Ppo) and learner is not None:
        state = with_critic(state, valued, learner, config, stage.critic.optimizer.lr)
        estimator = Critic(stage, valued[0], score(valued[0]))
    return PolicyTrainer(
        stage=stage,
        model=model,
        layout=layout,
        seed=derive(seed, "rollout"),
        state=state,
        steps=steps,
        marks=marks,
        stream=stream,
        sampler=Sampler.open(
            model, decode or layout, rollouts, slots=planned.slots, longest=longest
        ),
        reward=reward,
        config=config,
        step_program=step_program,
        score=score(a),
        reference=None if measured is None else (score(measured[0]), measured[1]),
        prompt_length=longest,
        part=math.gcd(stage.group, rows // layout.batch_shards // config.micro_batches),
        critic=estimator,
    )
