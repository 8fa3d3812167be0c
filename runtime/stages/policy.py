"""Policy optimisation: GRPO and its relatives, from sampled groups of completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import ShapeDtypeStruct
from typing_extensions import override

from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Stage
from tunelang.runtime.data.feistel import derive
from tunelang.runtime.data.sample_order import steps_of
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.objectives.policy_gradient import PolicySettings
from tunelang.runtime.rewards.reward_functions import CompiledReward
from tunelang.runtime.sharding import HOST, Layout, remesh_for_decoding, shardings
from tunelang.runtime.stages.abstract_programs import (
    SCHEDULE_STEPS,
    AbstractProgram,
    RolloutSizes,
    abstract_params,
    device_bytes,
    host_bytes,
    judge_programs,
    rollout_programs,
    step_config,
    train_program,
)
from tunelang.runtime.stages.policy_step import (
    Learner,
    PolicyBatch,
    ScoreProgram,
    policy_step,
    score_program,
)
from tunelang.runtime.stages.policy_trainer import AdvantageEstimator, PolicyTrainer
from tunelang.runtime.stages.stage_kinds import TrainingInputs, TrainingKind, register
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, abstract_state, initial_state
from tunelang.runtime.training.train_step import StateProgram


@dataclass
class CriticSetup:
    """The critic of a policy, ready to train."""

    learner: Learner
    architecture: Architecture
    params: Params
    learning_rate: float
    estimator: Callable[[ScoreProgram], AdvantageEstimator]
    """Makes the estimator of advantages from the program that values tokens."""


PolicyStage = TypeVar("PolicyStage", bound=Policy)


@register
class PolicyKind(TrainingKind[PolicyStage]):
    """Trains on the rewards of sampled completions. A kind with a critic overrides what differs."""

    stages: tuple[type[Stage], ...] = (Policy,)

    # What kinds override.

    def open_critic(
        self, stage: PolicyStage, inputs: TrainingInputs, updates: int, config: StepConfig
    ) -> CriticSetup | None:
        """Load what estimates advantages in place of the groups."""
        del stage, inputs, updates, config
        return None

    def abstract_critic(
        self, stage: PolicyStage, architecture: Architecture, state: TrainState, config: StepConfig
    ) -> tuple[Learner | None, TrainState]:
        """Return what updates the critic, and the abstract state with the critic's."""
        del stage, architecture, config
        return None, state

    # What they share.

    @override
    def open(self, stage: PolicyStage, inputs: TrainingInputs) -> PolicyTrainer:
        model, layout, planned = inputs.model, inputs.layout, inputs.planned
        a, resources = model.architecture, inputs.resources
        stream, longest = resources.prompts(
            stage.data, model, stage.rollout, seed=derive(inputs.seed, "data")
        )
        steps = steps_of(stage.length, epoch=len(stream), batch=stage.batch)
        rows = stage.batch * stage.group // stage.minibatches
        config = StepConfig(
            layout=layout,
            dtype=model.dtype,
            micro_batches=math.gcd(planned.micro_batches, rows // layout.batch_shards),
            remat=planned.remat,
            kernel="xla",  # prompts are short, and of any length
            chunk=CHUNK,
            seed=derive(inputs.seed, "minibatches") % 2**31 if stage.minibatches > 1 else 0,
            offloaded="optimizer" in planned.offload,
        )
        updates = steps * stage.minibatches * stage.passes
        critic = self.open_critic(stage, inputs, updates, config)
        settings = PolicySettings.of(stage)
        learner = None if critic is None else critic.learner
        optimizer, step_program = resources.cached(
            ("policy", a, config, updates, repr(settings), repr(learner and learner.settings),
             critic and critic.architecture),
            lambda: _compile(a, settings, updates, config, learner),
        )  # fmt: skip

        def score_with(architecture: Architecture) -> ScoreProgram:
            temperature = stage.rollout.temperature
            return resources.cached(
                ("score", architecture, config, temperature),
                lambda: score_program(architecture, config, temperature),
            )

        reference = _open_reference(stage, inputs, score_with) if stage.kl is not None else None
        state = inputs.first_state(optimizer, config, stage.optimizer.lr)
        estimator: AdvantageEstimator | None = None
        if critic is not None:
            state = with_critic(state, critic, config)
            estimator = critic.estimator(score_with(critic.architecture))
        assert planned.slots is not None
        return PolicyTrainer(
            stage=stage,
            model=model,
            layout=layout,
            seed=derive(inputs.seed, "rollout"),
            state=state,
            steps=steps,
            marks=inputs.marks,
            stream=stream,
            sampler=Sampler.open(
                model, decode_layout(planned, layout) or layout, stage.rollout,
                slots=planned.slots, longest=longest,
            ),
            reward=CompiledReward(stage.reward, resources.reward_context(stage.rollout.max_tokens)),
            config=config,
            step_program=step_program,
            score=score_with(a),
            reference=reference,
            prompt_length=longest,
            completions_per_prompt=_completions_per_prompt(stage, rows, layout, config),
            critic=estimator,
        )  # fmt: skip

    @override
    def abstract_programs(
        self, stage: PolicyStage, shapes: Shapes, planned: StageLayout, layout: Layout
    ) -> Iterator[AbstractProgram]:
        a = shapes.architecture
        config = replace(step_config(shapes, planned, layout), kernel="xla")
        settings = PolicySettings.of(stage)
        optimizer = build_optimizer(settings.optimizer, SCHEDULE_STEPS, offloaded=config.offloaded)
        learner, state = self.abstract_critic(
            stage, a, abstract_state(a, optimizer, config), config
        )
        schedule = learning_rate(settings.optimizer, SCHEDULE_STEPS)
        step = policy_step(a, optimizer, schedule, settings, config, learner)
        batch = _abstract_batch(stage, planned, config, has_values=learner is not None)
        reference_bytes = 0
        if cost_of(stage).holds_reference(a):
            reference_bytes = device_bytes(abstract_params(plain(a), config))
        judge_bytes = planned.memory.get("judges", 0)
        in_device = 0 if "reference" in planned.offload else reference_bytes
        train = train_program(step, state, batch, config, a, judge_bytes + in_device)
        yield train

        params = state.decoder_params
        params_bytes = device_bytes(params)
        others = device_bytes(state) - host_bytes(state, config) - params_bytes + judge_bytes
        if settings.updates_per_step > 1 or stage.kl is not None:
            score: Any = score_program(a, config, stage.rollout.temperature)
            rows = batch.prompts, batch.prompt_lengths, batch.tokens
            yield AbstractProgram(
                "score", lambda: score.lower(params, *rows), others + reference_bytes
            )
        completions = stage.batch * stage.group
        for number, judge in enumerate(shapes.judges, 1):
            name = "judge" if len(shapes.judges) == 1 else f"judge {number}"
            yield from judge_programs(
                judge, completions, planned.length, layout, train.stage_bytes, name
            )

        decode = decode_layout(planned, layout)
        decode_params, resident_bytes = params, others + in_device
        if decode is not None:  # then the weights are on the devices twice
            decode_params = abstract_params(a, replace(config, layout=decode))
            resident_bytes += params_bytes
        completion = batch.tokens.shape[2]
        sizes = RolloutSizes(
            slots=planned.slots or 1,
            capacity=planned.length,
            prompt=batch.prompts.shape[1],
            completion=completion,
            completions=completions,
        )
        yield from rollout_programs(
            a, DTYPES[shapes.dtype], decode_params, decode or layout, sizes, stage.rollout,
            resident_bytes,
        )  # fmt: skip


def decode_layout(planned: StageLayout, layout: Layout) -> Layout | None:
    """Return the layout of the rollout; None on one device, where there is nothing to choose."""
    if planned.decode is None or layout.mesh.size == 1:
        return None
    return remesh_for_decoding(layout, **planned.decode)


def _compile(
    a: Architecture,
    settings: PolicySettings,
    updates: int,
    config: StepConfig,
    learner: Learner | None,
) -> tuple[optax.GradientTransformation, StateProgram]:
    optimizer = build_optimizer(settings.optimizer, updates, offloaded=config.offloaded)
    schedule = learning_rate(settings.optimizer, updates)
    return optimizer, policy_step(a, optimizer, schedule, settings, config, learner)


def _open_reference(
    stage: Policy, inputs: TrainingInputs, score_with: Callable[[Architecture], ScoreProgram]
) -> tuple[ScoreProgram, Params]:
    """Return the program and the parameters of the reference model."""
    architecture = inputs.model.architecture
    if stage.reference is None:
        params = inputs.initial_weights()
    else:
        architecture, params = plain(architecture), inputs.load(stage.reference)
    if "reference" in inputs.planned.offload:
        params = jax.device_put(params, shardings(params, inputs.layout, HOST))
    return score_with(architecture), params


def _completions_per_prompt(stage: Policy, rows: int, layout: Layout, config: StepConfig) -> int:
    """Return how many completions of a group are trained on with one copy of its prompt, for
    `rows` completions of an update.
    """
    return math.gcd(stage.group, rows // layout.batch_shards // config.micro_batches)


def _abstract_batch(
    stage: Policy, planned: StageLayout, config: StepConfig, *, has_values: bool
) -> PolicyBatch:
    """Return the batch of a step as shapes and shardings."""
    layout = config.layout
    completion = min(stage.rollout.max_tokens, planned.length)
    prompt = max(1, planned.length - completion)
    part = _completions_per_prompt(stage, planned.rows, layout, config)
    rows = planned.rows * stage.minibatches // part

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        place = layout.sharding(("batch", *(None for _ in shape)), (rows, *shape))
        return ShapeDtypeStruct((rows, *shape), dtype, sharding=place)

    by_token = array(part, completion, dtype=jnp.float32)
    several = stage.passes * stage.minibatches > 1
    return PolicyBatch(
        prompts=array(prompt),
        prompt_lengths=array(),
        tokens=array(part, completion),
        mask=array(part, completion, dtype=bool),
        sampler=by_token,
        advantages=by_token if has_values else array(part, dtype=jnp.float32),
        old=by_token if several else None,
        reference=None if stage.kl is None else by_token,
        values=by_token if has_values else None,
        returns=by_token if has_values else None,
    )


def with_critic(state: TrainState, critic: CriticSetup, config: StepConfig) -> TrainState:
    """Put the state of a critic beside that of its policy."""
    learner = critic.learner
    config = replace(config, offloaded=config.offloaded and learner.architecture is not None)
    first = initial_state(
        critic.architecture, critic.params, learner.optimizer, config, critic.learning_rate
    )
    return replace(state, critic=replace(first, frozen=nnx.State({})), aux_params=first.frozen)
