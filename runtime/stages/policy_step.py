"""The training program of policy optimisation: completions and their advantages to an update.

A prompt is run once for its whole group, in training as in sampling, and logits are computed of
completions only. As in supervised training, the loss of an update is a sum over a denominator of
all its tokens or sequences, so that neither micro-batches nor devices change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.training import Critic
from tunelang.runtime.generation.episodes import Episodes
from tunelang.runtime.models.decoder import RESIDUAL, Decoder, score_hidden
from tunelang.runtime.models.parameters import abstract_decoder, merge_params
from tunelang.runtime.objectives import gae, policy_gradient
from tunelang.runtime.objectives.policy_gradient import Completions, PolicySettings, Totals
from tunelang.runtime.sharding import constrain, jit
from tunelang.runtime.training.accumulate import accumulate, micro_batches
from tunelang.runtime.training.cross_entropy import token_logprobs, token_scores
from tunelang.runtime.training.objective import AnyArray
from tunelang.runtime.training.optimizers import Schedule
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import ReadOnlyState, TrainState
from tunelang.runtime.training.train_step import StateProgram, apply_gradient


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Completions by the prompt that they share; log-probabilities are in nats, at the temperature
    of the rollout.

    A prompt is run once for the completions beside it. Where a group is larger than what a device
    takes at once, it lies in several parts, each with the prompt.
    """

    prompts: AnyArray
    """`[prompts, prompt_length]` int32, padded at the right."""
    prompt_lengths: AnyArray
    """`[prompts]` int32, at least 1."""
    tokens: AnyArray
    """`[prompts, group, length]` int32: the completions, padded at the right."""
    mask: AnyArray
    """`[prompts, group, length]` bool: true on tokens that count."""
    sampler: AnyArray
    """`[prompts, group, length]`: as the sampler reported them."""
    advantages: AnyArray = None
    """`[prompts, group]` float32; from values `[prompts, group, length]`."""
    old: AnyArray = None
    """`[prompts, group, length]`: by this program before the step's first update; needed where a
    step makes several."""
    reference: AnyArray = None
    """`[prompts, group, length]`: by the reference model."""
    values: AnyArray = None
    """`[prompts, group, length]` float32: by the critic before the step's first update."""
    returns: AnyArray = None
    """`[prompts, group, length]` float32: what values are to be."""


@dataclass(frozen=True)
class Learner:
    """The architecture and the optimizer of the critic of a policy."""

    settings: Critic
    architecture: Architecture | None
    """With `scores`; None where one more head on the policy gives the values."""
    optimizer: optax.GradientTransformation
    schedule: Schedule


def batch_of(episodes: Episodes, prompt_length: int, length: int) -> PolicyBatch:
    """Lay out what was sampled: numpy, with groups as they are and without advantages.

    `ValueError` where a prompt is longer than `prompt_length` or a completion than `length`.
    """
    lengths = np.array([len(prompt) for prompt in episodes.prompts], np.int32)
    for name, longest, limit in (
        ("prompt", lengths.max(initial=0), prompt_length),
        ("completion", episodes.lengths.max(initial=0), length),
    ):
        if longest > limit:
            raise ValueError(f"a {name} of {longest} tokens for a length of {limit}")
    prompts = np.full((len(lengths), prompt_length), episodes.pad, np.int32)
    for row, prompt in enumerate(episodes.prompts):
        prompts[row, : len(prompt)] = prompt

    def grouped(array: NDArray[Any]) -> NDArray[Any]:
        return _to_length(array, length).reshape(len(lengths), episodes.group, length)

    return PolicyBatch(
        prompts=prompts,
        prompt_lengths=lengths,
        tokens=grouped(episodes.tokens),
        mask=grouped(episodes.mask),
        sampler=grouped(episodes.log_probs),
    )


def joined(batches: Sequence[PolicyBatch]) -> PolicyBatch:
    """Put batches of numpy arrays one behind the other, completions as long as the longest."""
    length = max(batch.tokens.shape[2] for batch in batches)

    def one(name: str) -> Any:
        arrays = [getattr(batch, name) for batch in batches]
        if arrays[0] is None:
            return None
        by_token = arrays[0].ndim == 3
        return np.concatenate([_to_length(a, length) if by_token else a for a in arrays])

    return PolicyBatch(**{field.name: one(field.name) for field in fields(PolicyBatch)})


def chosen(batch: PolicyBatch, prompts: NDArray[np.intp]) -> PolicyBatch:
    """Take some prompts of a batch, with their groups."""
    return replace(batch, **{n: a[prompts] for n, a in vars(batch).items() if a is not None})


def in_parts(batch: PolicyBatch, group: int) -> PolicyBatch:
    """Cut the groups of a batch of numpy arrays into parts of `group` completions."""
    times = batch.tokens.shape[1] // group

    def part(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if name in ("prompts", "prompt_lengths"):
            return np.repeat(array, times, 0)
        return array.reshape(-1, group, *array.shape[2:])

    return replace(batch, **{n: part(n, a) for n, a in vars(batch).items() if a is not None})


def _to_length(array: NDArray[Any], length: int) -> NDArray[Any]:
    """Cut or pad the last axis; the padding, token 0 or whatever, does not count."""
    missing = max(0, length - array.shape[-1])
    return np.pad(array[..., :length], (*((0, 0),) * (array.ndim - 1), (0, missing)))


ScoreProgram = Callable[[Any, AnyArray, AnyArray, AnyArray], jax.Array]


@dataclass(frozen=True)
class _Update:
    """One update of a policy, and of its critic: what it closes over."""

    architecture: Architecture
    optimizer: optax.GradientTransformation
    schedule: Schedule
    settings: PolicySettings
    config: StepConfig
    critic: Learner | None

    def __call__(
        self, read_only: ReadOnlyState, state: TrainState, batch: PolicyBatch
    ) -> tuple[TrainState, Any]:
        """Return the next state, and the loss, totals, gradient norms and learning rate."""
        denominator = policy_gradient.denominator(
            self.settings, batch.mask.reshape(-1, batch.mask.shape[-1])
        )
        critic_state, learner = state.critic, self.critic
        has_head = critic_state is not None and not _has_own_trunk(learner)
        head = critic_state.params if critic_state is not None and has_head else None
        value, totals, (gradient, critic_gradient) = self._accumulate(
            partial(self.policy_loss, read_only.frozen), (state.params, head), batch, denominator
        )
        new, norm, rate = apply_gradient(state, gradient, self.optimizer, self.schedule)
        norms = {"grad_norm": norm}
        if learner is not None:
            assert critic_state is not None
            if _has_own_trunk(learner):
                _, critic_totals, critic_gradient = self._accumulate(
                    partial(self.critic_loss, read_only.aux_params), critic_state.params, batch,
                    denominator,
                )  # fmt: skip
                totals = _merge_metrics(totals, critic_totals)
            critic_state, norms["critic_grad_norm"], _ = apply_gradient(
                critic_state, critic_gradient, learner.optimizer, learner.schedule
            )
        return replace(new, critic=critic_state), (value * denominator, totals, norms, rate)

    def _accumulate(
        self, loss: Callable[..., Any], params: Any, batch: PolicyBatch, denominator: jax.Array
    ) -> Any:
        # One denominator for each prompt, so that micro-batches are cut out of it as of all else.
        rows = jnp.broadcast_to(denominator, batch.prompt_lengths.shape)
        return accumulate(
            loss, params, (batch, rows), self.config, policy_gradient.add,
            lambda part: jnp.any(part[0].mask),
        )  # fmt: skip

    def policy_loss(
        self, frozen: Any, params: tuple[Any, Any], part: tuple[PolicyBatch, jax.Array]
    ) -> tuple[jax.Array, Totals]:
        """Return the loss of the policy, and of the values that a head on its trunk gives."""
        settings, config = self.settings, self.config
        batch, denominator = part[0], part[1][0]
        trained, head = params
        graph, _ = abstract_decoder(self.architecture, config.dtype)
        decoder = nnx.merge(graph, merge_params(trained, frozen))
        hidden, tokens = _run_completions(
            decoder, config, batch.prompts, batch.prompt_lengths, batch.tokens
        )
        log_probs, entropy = token_scores(
            hidden,
            decoder.head_weight(),
            tokens,
            chunk=config.chunk,
            cap=self.architecture.logit_cap,
            temperature=settings.rollout.temperature or 1.0,
            layout=config.layout,
            flows=settings.entropy > 0,
        )

        def by_completion(array: Any) -> Any:
            return None if array is None else array.reshape(log_probs.shape)

        advantages = batch.advantages.reshape(len(log_probs), -1)
        completions = Completions(
            now=log_probs,
            mask=by_completion(batch.mask),
            advantages=jnp.broadcast_to(advantages, log_probs.shape),
            old=by_completion(batch.old),
            sampler=by_completion(batch.sampler),
            reference=by_completion(batch.reference),
            entropy=entropy,
        )
        total, totals = policy_gradient.objective(settings, completions)
        if head is not None:
            assert self.critic is not None
            values = score_hidden(hidden, head["score"][...])
            value_total, value_totals = _value_loss(settings, self.critic, values, batch)
            total += self.critic.settings.weight * value_total
            totals = _merge_metrics(totals, value_totals)
        return total / jnp.maximum(denominator, 1.0), totals

    def critic_loss(
        self, frozen: Any, params: Any, part: tuple[PolicyBatch, jax.Array]
    ) -> tuple[jax.Array, Totals]:
        """Return the loss of a critic with a trunk of its own."""
        assert self.critic is not None
        assert self.critic.architecture is not None
        batch, denominator = part[0], part[1][0]
        graph, _ = abstract_decoder(self.critic.architecture, self.config.dtype)
        decoder = nnx.merge(graph, merge_params(params, frozen))
        hidden, _ = _run_completions(
            decoder, self.config, batch.prompts, batch.prompt_lengths, batch.tokens
        )
        values = decoder.scores(hidden)
        total, totals = _value_loss(self.settings, self.critic, values, batch)
        return total / jnp.maximum(denominator, 1.0), totals


def policy_step(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    settings: PolicySettings,
    config: StepConfig,
    critic: Learner | None = None,
) -> StateProgram:
    """Return the program `(state, batch) -> (state, metrics)`.

    Makes `passes * minibatches` updates, of the critic too. Metrics are scalars: those of
    `policy_gradient.metrics` over all updates, the mean `grad_norm` and the `learning_rate` of the
    last.
    """
    update = _Update(architecture, optimizer, schedule, settings, config, critic)

    def step(
        state: TrainState, read_only: ReadOnlyState, batch: PolicyBatch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if settings.updates_per_step == 1:
            state, (value, totals, norms, rate) = update(read_only, state, batch)
            metrics = policy_gradient.metrics(value, totals)
            return state, {**metrics, **norms, "learning_rate": rate}

        def one_pass(state: TrainState, _: None) -> tuple[TrainState, Any]:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            order = _minibatch_order(key, batch, settings.minibatches, config.micro_batches)
            minibatches = jax.tree.map(lambda array: array[order], batch)
            return jax.lax.scan(partial(update, read_only), state, minibatches)

        state, updates = jax.lax.scan(one_pass, state, length=settings.passes)
        value, totals, norms, rate = updates
        summed = jax.tree.map(jnp.sum, totals)
        summed = Totals(
            summed.denominator, summed.tokens, summed.sums, jax.tree.map(jnp.max, totals.maxima)
        )
        metrics = policy_gradient.metrics(jnp.sum(value), summed)
        return state, {**metrics, **jax.tree.map(jnp.mean, norms), "learning_rate": rate[-1, -1]}

    return StateProgram(jit(step, config.layout, donate_argnums=0))


def _has_own_trunk(critic: Learner | None) -> bool:
    return critic is not None and critic.architecture is not None


def _minibatch_order(
    key: jax.Array, batch: PolicyBatch, minibatches: int, micro_batches: int
) -> jax.Array:
    """Draw the prompts of each minibatch, `[minibatches, prompts]`; within one, as `useful_first`
    orders them.
    """
    order = jax.random.permutation(key, batch.prompts.shape[0]).reshape(minibatches, -1)
    counts = jnp.any(batch.mask, (1, 2))[order]
    useful = jnp.take_along_axis(order, jnp.argsort(~counts, stable=True), 1)
    useful = useful.reshape(minibatches, micro_batches, -1)
    return useful.swapaxes(1, 2).reshape(minibatches, -1)


def _value_loss(
    policy: PolicySettings, critic: Learner, predicted: jax.Array, batch: PolicyBatch
) -> tuple[jax.Array, Totals]:
    """Sum the losses of predicted values `[completions, length]`, weighted as the policy's are."""
    old, returns, mask = (
        array.reshape(predicted.shape) for array in (batch.values, batch.returns, batch.mask)
    )
    losses, clipped = gae.value_losses(predicted, old, returns, critic.settings.clip)
    return policy_gradient.summed(
        policy, mask, losses, {"value_loss": losses, "value_clip": clipped}, {}
    )


def _merge_metrics(one: Totals, other: Totals) -> Totals:
    """Put the metrics of the same tokens together."""
    return one._replace(sums=one.sums | other.sums)


def score_program(
    architecture: Architecture, config: StepConfig, temperature: float
) -> ScoreProgram:
    """Return the jitted `(params, prompts, prompt_lengths, tokens) -> scores`.

    Scores are `[prompts, group, length]`: the log-probability of each token of the completions at a
    temperature, in nats; with `architecture.scores`, the value before each token.
    """
    graph, _ = abstract_decoder(architecture, config.dtype)

    def score_part(params: Any, batch: tuple[jax.Array, ...]) -> jax.Array:
        decoder: Decoder = nnx.merge(graph, params)
        hidden, tokens = _run_completions(decoder, config, *batch)
        shape = batch[2].shape
        if architecture.scores:
            return decoder.scores(hidden).reshape(shape)
        log_probs = token_logprobs(
            hidden,
            decoder.head_weight(),
            tokens,
            chunk=config.chunk,
            cap=architecture.logit_cap,
            temperature=temperature or 1.0,
            layout=config.layout,
        )
        return log_probs.reshape(shape)

    def score(params: Any, *batch: jax.Array) -> jax.Array:
        if config.micro_batches == 1:
            return score_part(params, batch)
        parts = jax.tree.map(lambda array: micro_batches(array, config), batch)
        by_part: jax.Array = jax.lax.map(lambda part: score_part(params, part), parts)
        scores: jax.Array = by_part.swapaxes(0, 1).reshape(batch[2].shape)
        return scores

    return jit(score, config.layout)


def _run_completions(
    decoder: Decoder, config: StepConfig, prompts: jax.Array, lengths: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return hidden states `[completions, length, width]`, and the tokens that they predict."""
    hidden = decoder.continuations(
        prompts,
        lengths,
        tokens,
        layout=config.layout,
        remat=config.remat,
        kernel=config.kernel,
    )
    hidden = hidden.reshape(-1, *hidden.shape[2:])
    return constrain(config.layout, hidden, RESIDUAL), tokens.reshape(-1, tokens.shape[2])


def useful_first(batch: PolicyBatch, config: StepConfig) -> PolicyBatch:
    """Order the prompts of a batch of numpy arrays so that those of which no token counts share
    micro-batches, which the step then skips. Micro-batch `m` of `n` is prompts `m`, `m + n`, ...
    """
    order = np.argsort(~batch.mask.any((1, 2)), kind="stable")
    return chosen(batch, order.reshape(config.micro_batches, -1).T.reshape(-1))


def placed(batch: PolicyBatch, config: StepConfig) -> PolicyBatch:
    """Put a batch of numpy arrays where the program reads it: rows over the mesh."""

    def put(array: Any) -> jax.Array:
        spec = config.layout.spec(("batch", *(None,) * (array.ndim - 1)), array.shape)
        place = NamedSharding(config.layout.mesh, PartitionSpec(*spec))
        there: jax.Array = jax.device_put(array, place)
        return there

    return replace(batch, **{name: put(a) for name, a in vars(batch).items() if a is not None})
