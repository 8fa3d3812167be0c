"""The programs of a stage as shapes, to be lowered: what a run would compile, by the same builders
and in the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from tunelang.compiler.costs.judge_costs import VERDICT_SLOTS, VERDICT_TOKENS
from tunelang.compiler.costs.rollout_costs import MOST_SLOTS
from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.layout_query import Judge
from tunelang.compiler.layout.plan_layouts import Shapes
from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.layout.sweep_fusion import at_unit_rate
from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.dsl.vocabulary.policy_stages import Policy, Ppo
from tunelang.dsl.vocabulary.preference_stages import Compared, Kto, Preference, RewardModel
from tunelang.dsl.vocabulary.rewards import EvalKind, Generate, Perplexity
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Distill, Supervised
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.dsl.vocabulary.utility_stages import Evaluate, Merge, Sample
from tunelang.runtime.generation import beam_search
from tunelang.runtime.generation.engine import Request, abstract_slots, make_engine
from tunelang.runtime.generation.engine_sizes import sampling_layout, slot_count
from tunelang.runtime.generation.slot_queue import PREFILL
from tunelang.runtime.generation.token_sampling import slot_settings
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.objectives.answer_scores import segment_program
from tunelang.runtime.rewards.learned_scorer import SCORED_TOKENS
from tunelang.runtime.sharding import HOST, Layout, jit, shardings
from tunelang.runtime.stages.policy import decode_layout
from tunelang.runtime.stages.policy_step import PolicyBatch, policy_step, score_program
from tunelang.runtime.stages.ppo import learner_of
from tunelang.runtime.stages.sample import CHUNK as CHUNK_OF_SAMPLES
from tunelang.runtime.stages.supervised import compiled, objective_of
from tunelang.runtime.training.objective import Batch, loss_program
from tunelang.runtime.training.offload import moved_to
from tunelang.runtime.training.optimizers import (
    build_optimizer,
    learning_rate,
)
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import (
    ReadOnlyState,
    TrainState,
    abstract_state,
    split_state,
    stack_branches,
)
from tunelang.runtime.training.train_step import StateProgram

_STEPS = 1000
"""Of a schedule; the program is the same for any."""
_SEGMENT = 64
"""Tokens of an example, at least, where the data is not looked at."""


@dataclass(frozen=True)
class AbstractProgram:
    """One that a stage runs, to be lowered, and what the stage needs beside it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    resident_bytes: int = 0
    """Bytes on each device that the stage holds and the program does not read."""
    donated: int = 0
    """Bytes in each device that have to be reused."""
    held: int = 0
    """Bytes in each device that the stage holds from its first step to its last."""
    trained: Architecture | None = None
    """Whose weights it updates."""
    micro_batches: int = 1
    offloaded: int = 0
    """Bytes that a compiler takes for some in a device which lie in the memory of the host."""


def programs(
    stage: Training, shapes: Shapes, planned: StageLayout, layout: Layout
) -> Iterator[AbstractProgram]:
    """Give the programs of a stage, to be lowered."""
    if isinstance(stage, Policy):
        return _policy(stage, shapes, planned, layout)
    assert isinstance(stage, Supervised)
    return _supervised(stage, shapes, planned, layout)


def _program_of(shapes: Shapes, planned: StageLayout, layout: Layout) -> StepConfig:
    return StepConfig(
        layout=layout,
        dtype=DTYPES[shapes.dtype],
        micro_batches=planned.micro_batches,
        remat=planned.remat,
        kernel=planned.kernel,
        chunk=CHUNK,
        offloaded="optimizer" in planned.offload,
        branches=planned.branches,
    )


def parameters(architecture: Architecture, config: StepConfig) -> Any:
    """Return a model's parameters as shapes and shardings."""
    return abstract_state(architecture, optax.identity(), config).decoder_params


def _supervised(
    stage: Supervised, shapes: Shapes, planned: StageLayout, layout: Layout
) -> Iterator[AbstractProgram]:
    a = replace(shapes.architecture, scores=stage.yields == "scores")
    config = _program_of(shapes, planned, layout)
    pieces = 2 if isinstance(stage, Preference | RewardModel | Kto) else 1
    count = pieces
    if stage.packing:
        count *= max(1, planned.length // (pieces * _SEGMENT))
    ahead = isinstance(stage, Preference) and stage.reference_log_probs == "ahead"
    live: Architecture | None = None
    if isinstance(stage, Distill):
        live = shapes.teacher
    elif isinstance(stage, Compared) and stage.needs_reference and not ahead:
        live = a if stage.reference is None else plain(a)
    aux_params = None if live is None else parameters(live, config)
    if isinstance(stage, Distill) and stage.teacher_log_probs == "ahead":
        aux_params = None
    objective = objective_of(stage, count, a, live, isinstance(stage, RewardModel))
    optimizer, step = compiled(a, at_unit_rate(stage.optimizer), _STEPS, config, objective)
    state = abstract_state(a, optimizer, config, objective.extra)
    if config.branches > 1:
        changing, kept = split_state(state)
        state = replace(stack_branches(changing, config.branches), frozen=kept.frozen)
    batch = _batch(stage, planned, count, layout)
    yield AbstractProgram(
        "train",
        lambda: _lowered(step, replace(state, aux_params=aux_params), batch, config),
        donated=_bytes(replace(state, frozen=nnx.State({}))),
        held=_bytes(replace(state, aux_params=aux_params)) - _at_host(state, config),
        trained=a,
        micro_batches=config.micro_batches,
        offloaded=0 if _knows_hosts(config) else _at_host(state, config),
    )
    if isinstance(stage, Compared) and stage.needs_reference and ahead:
        score = segment_program(plain(a), config, count)
        params = parameters(plain(a), config)
        yield AbstractProgram("reference", lambda: score.lower(params, batch))  # type: ignore[attr-defined]


def _offloaded(state: TrainState, config: StepConfig) -> list[TrainState]:
    """Return the states whose moments lie in the memory of the host."""
    if not config.offloaded:
        return []
    critic = state.critic
    apart = critic is not None and len(jax.tree.leaves(critic.params)) > 1  # not a head alone
    return [state, critic] if apart and critic is not None else [state]


def _at_host(state: TrainState, config: StepConfig) -> int:
    """Count the bytes in the memory of the host for each device."""
    return sum(_bytes(each.optimizer) for each in _offloaded(state, config))


def _knows_hosts(config: StepConfig) -> bool:
    """Whether the compiler knows of the memory of hosts; for GPUs that are not here it does not."""
    place = NamedSharding(config.layout.mesh, PartitionSpec(), memory_kind=HOST)
    return place.memory_kind == HOST


def _lowered(
    step: StateProgram,
    state: TrainState,
    batch: Any,
    config: StepConfig,
) -> jax.stages.Lowered:
    """Lower a program that updates a state."""
    if not config.offloaded or _knows_hosts(config):
        return step.lower(state, batch)
    # Moments go to the host first, and come back at last.
    changing, kept = split_state(state)
    apart = len(_offloaded(state, config)) > 1

    def moved(state: TrainState, where: Literal["Host", "Device"]) -> TrainState:
        def one(leaf: Any) -> Any:
            return moved_to(leaf, where) if leaf.shape else leaf

        critic = moved(state.critic, where) if apart and state.critic else state.critic
        return replace(state, optimizer=jax.tree.map(one, state.optimizer), critic=critic)

    def around(changing: TrainState, kept: ReadOnlyState, batch: Any) -> Any:
        plain: Any = step.jitted
        changed, metrics = plain.__wrapped__(moved(changing, "Host"), kept, batch)
        return moved(changed, "Device"), metrics

    places = jax.tree.map(lambda leaf: leaf.sharding, changing)
    jitted = jit(around, config.layout, donate_argnums=0, out_shardings=(places, None))
    return jitted.lower(changing, kept, batch)


def _rows(layout: Layout, rows: int, *shape: int, dtype: Any = jnp.int32) -> Any:
    spec = PartitionSpec(None, *layout.spec(("batch",), (rows,)))
    return ShapeDtypeStruct((1, rows, *shape), dtype, sharding=NamedSharding(layout.mesh, spec))


def _tokens(layout: Layout, rows: int, length: int) -> dict[str, Any]:
    whole = _rows(layout, rows, length)
    trained = _rows(layout, rows, length, dtype=bool)
    return {"tokens": whole, "trained": trained, "segments": whole, "positions": whole}


def _batch(stage: Supervised, planned: StageLayout, count: int, layout: Layout) -> Batch:
    rows, length = planned.rows, planned.length

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return _rows(layout, rows, *shape, dtype=dtype)

    batch = Batch(**_tokens(layout, rows, length))
    numbers = array(count, dtype=jnp.float32)
    if isinstance(stage, Kto | RewardModel):
        batch = replace(batch, values=numbers)
    if isinstance(stage, Kto):
        batch = replace(batch, mismatched=Batch(**_tokens(layout, rows, length)))
    if isinstance(stage, Preference) and stage.needs_reference:
        if stage.reference_log_probs == "ahead":
            batch = replace(batch, reference=numbers)
    if isinstance(stage, Distill) and stage.teacher_log_probs == "ahead":
        k = stage.top_k or 1
        batch = replace(batch, teacher=(array(length, k), array(length, k, dtype=jnp.float32)))
    return batch


def _policy(
    stage: Policy, shapes: Shapes, planned: StageLayout, layout: Layout
) -> Iterator[AbstractProgram]:
    a, sampling = shapes.architecture, stage.rollout
    config = replace(_program_of(shapes, planned, layout), kernel="xla")
    unit = at_unit_rate(stage.optimizer)
    optimizer = build_optimizer(unit, _STEPS, offloaded=config.offloaded)
    schedule = learning_rate(unit, _STEPS)
    state = abstract_state(a, optimizer, config)
    learner = None
    if isinstance(stage, Ppo):
        scores = replace(a, scores=True)
        learner = learner_of(stage.critic, scores, _STEPS, offloaded=config.offloaded)
        held = abstract_state(scores, learner.optimizer, config)
        if stage.critic.trunk == "shared":
            held = _head_alone(held, learner.optimizer, layout)
        state = replace(state, critic=replace(held, frozen=nnx.State({})), aux_params=held.frozen)
    step = policy_step(a, optimizer, schedule, stage, config, learner)
    completion = min(sampling.max_tokens, planned.length)
    prompt = max(1, planned.length - completion)
    part = math.gcd(stage.group, planned.rows // layout.batch_shards // config.micro_batches)
    rows = planned.rows * stage.minibatches // part

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        where = layout.sharding(("batch", *(None for _ in shape)), (rows, *shape))
        return ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    each = array(part, completion, dtype=jnp.float32)
    several = stage.passes * stage.minibatches > 1
    valued = isinstance(stage, Ppo)
    batch = PolicyBatch(
        prompts=array(prompt), prompt_lengths=array(), tokens=array(part, completion),
        mask=array(part, completion, dtype=bool), sampler=each,
        advantages=each if valued else array(part, dtype=jnp.float32),
        old=each if several else None, reference=None if stage.kl is None else each,
        values=each if valued else None, returns=each if valued else None,
    )  # fmt: skip
    reference = 0
    if cost_of(stage).holds_reference(a):
        reference = _bytes(parameters(plain(a), config))
    changing = _bytes(replace(state, frozen=nnx.State({}), aux_params=None))
    at_host = _at_host(state, config)
    judges = planned.memory.get("judges", 0)
    stays = judges if "reference" in planned.offload else judges + reference
    yield AbstractProgram(
        "train",
        lambda: _lowered(step, state, batch, config),
        resident_bytes=stays,
        donated=changing,
        held=_bytes(state) - at_host + stays,
        trained=a,
        micro_batches=config.micro_batches,
        offloaded=0 if _knows_hosts(config) else at_host,
    )

    params = state.decoder_params
    beside = _bytes(state) - at_host - _bytes(params) + judges
    given = params, batch.prompts, batch.prompt_lengths, batch.tokens
    if several or stage.kl is not None:
        score = score_program(a, config, sampling.temperature)
        yield AbstractProgram("score", lambda: score.lower(*given), beside + reference)  # type: ignore[attr-defined]

    count = stage.batch * stage.group
    everything = _bytes(state) - at_host + stays
    for at, judge in enumerate(shapes.judges, 1):
        name = "judge" if len(shapes.judges) == 1 else f"judge {at}"
        yield from _judging(judge, count, planned.length, layout, everything, name)

    beside += stays - judges
    slots, capacity = planned.slots or 1, planned.length
    apart = decode_layout(planned, layout)
    if apart is not None:  # then the weights are there twice
        params = parameters(a, replace(config, layout=apart))
        beside += _bytes(state.decoder_params)
        layout = apart
    sizes = _Sizes(slots, capacity, prompt, completion, count)
    dtype = DTYPES[shapes.dtype]
    yield from _sampler(a, dtype, params, layout, sizes, sampling, beside)


def _judging(
    judge: Judge, count: int, length: int, layout: Layout, held: int, name: str
) -> Iterator[AbstractProgram]:
    """Give the programs of a model that judges `count` completions of so many tokens, prompts and
    all; with it, the stage holds `held` bytes in each device.
    """
    a, dtype = judge.architecture, DTYPES["bf16" if judge.dtype_bytes == 2 else "f32"]
    there = sampling_layout(a, dtype, layout)
    config = StepConfig(layout=there, dtype=dtype, chunk=CHUNK)
    params = parameters(a, config)
    beside = held - _bytes(params)
    if judge.speaks:
        said = min(VERDICT_TOKENS, a.context - 1)
        asked = _Asked(count, min(length, a.context - said), said)
        sampling = Sampling.unvalidated(max_tokens=said, temperature=0.0)
        most = VERDICT_SLOTS * there.batch_shards
        yield from _sampled(a, dtype, params, there, asked, sampling, beside, f"{name} ", most)
        return
    length = min(length, a.context)
    rows = max(1, SCORED_TOKENS // length // there.batch_shards) * there.batch_shards
    score: Any = segment_program(a, config, 1)
    batch = Batch(**_tokens(there, rows, length))
    yield AbstractProgram(name, lambda: score.lower(params, batch), beside)


@dataclass(frozen=True)
class _Sizes:
    """Of a rollout: slots and their tokens, those of prompts and of completions, completions."""

    slots: int
    capacity: int
    prompt: int
    completion: int
    count: int


def _sampler(
    a: Architecture,
    dtype: Any,
    params: Any,
    layout: Layout,
    sizes: _Sizes,
    sampling: Sampling,
    beside: int,
    name: str = "",
) -> Iterator[AbstractProgram]:
    """Give the programs of a rollout."""
    slots, capacity = sizes.slots, sizes.capacity
    engine: Any = make_engine(a, slots=slots, capacity=capacity, dtype=dtype, layout=layout)
    filled = abstract_slots(a, slots, capacity, dtype, sizes.count, sizes.completion, layout)
    whole = NamedSharding(layout.mesh, PartitionSpec())

    def ints(*shape: int, dtype: Any = jnp.int32) -> Any:
        return ShapeDtypeStruct(shape, dtype, sharding=whole)

    prompts = ints(PREFILL, sizes.prompt), ints(PREFILL)
    kept = _bytes(filled)
    yield AbstractProgram(
        name + "prefill", lambda: engine.prefill.lower(params, *prompts), beside + kept
    )

    def request() -> Request:
        settings = jax.tree.map(
            lambda array: ints(*jnp.shape(array), dtype=jnp.asarray(array).dtype),
            slot_settings(sampling, slots),
        )
        return Request(settings, ints(4), ints(dtype=jnp.uint32), ints(), ints(), ints())

    yield AbstractProgram(
        name + "decode",
        lambda: engine.decode.lower(params, filled, ints(slots, dtype=bool), request()),
        beside,
        kept,
    )


def evaluating(
    stage: Training,
    evals: Mapping[str, EvalKind],
    shapes: Shapes,
    planned: StageLayout,
    layout: Layout,
    held: int,
) -> Iterator[AbstractProgram]:
    """Give the programs of the evals of a stage that holds so many bytes in each device."""
    a = replace(shapes.architecture, scores=stage.yields == "scores")
    params = parameters(a, _program_of(shapes, planned, layout))
    dtype = DTYPES[shapes.dtype]
    yield from _evaluations(evals, a, dtype, params, layout, held - _bytes(params))


def _evaluations(
    evals: Mapping[str, EvalKind],
    a: Architecture,
    dtype: Any,
    params: Any,
    layout: Layout,
    beside: int,
) -> Iterator[AbstractProgram]:
    """Give the programs of evals: prompts and rows as long as the context, since no data is read;
    those of equal sizes once. `beside` is what a stage holds beside the parameters.
    """
    seen: set[Any] = set()
    for name, kind in evals.items():
        if isinstance(kind, Generate):
            count = kind.limit or MOST_SLOTS
            completion = min(kind.max_tokens, a.context - 1)
            asked = _Asked(kind.samples * count, a.context - completion, completion)
            if kind.beams is not None:
                asked = replace(asked, completions=count)
            sampling = Sampling.unvalidated(
                max_tokens=completion, temperature=kind.temperature, top_p=kind.top_p,
                top_k=kind.top_k,
            )  # fmt: skip
            if (asked, kind.beams) in seen:
                continue
            seen.add((asked, kind.beams))
            given = params, layout, asked
            if kind.beams is not None:
                yield _searched(a, dtype, *given, kind.beams, beside, f"{name} search")
            else:
                yield from _sampled(a, dtype, *given, sampling, beside, f"{name} ")
        elif type(kind) not in seen:
            seen.add(type(kind))
            config = StepConfig(layout=layout, dtype=dtype)
            rows = max(1, SCORED_TOKENS // a.context // layout.batch_shards) * layout.batch_shards
            batch = Batch(**_tokens(layout, rows, a.context))
            score: Any = (
                loss_program(a, config)
                if isinstance(kind, Perplexity)
                else segment_program(a, config, max(2, a.context // _SEGMENT))
            )
            yield AbstractProgram(name, partial(score.lower, params, batch), beside)


@dataclass(frozen=True)
class _Asked:
    """Of a rollout that is no part of a step: completions, the tokens of a prompt and of one."""

    completions: int
    prompt: int
    completion: int


def _sampled(
    a: Architecture, dtype: Any, params: Any, layout: Layout, asked: _Asked, sampling: Sampling,
    beside: int, name: str = "", most: int = MOST_SLOTS,
) -> Iterator[AbstractProgram]:  # fmt: skip
    """Give the programs of a rollout that is no part of a step, see `sampling_layout`."""
    params, layout, twice = _brought(a, dtype, params, layout)
    slots = slot_count(asked.completions, most)
    capacity = asked.prompt + asked.completion
    sizes = _Sizes(slots, capacity, asked.prompt, asked.completion, asked.completions)
    yield from _sampler(a, dtype, params, layout, sizes, sampling, beside + twice, name)


def _searched(
    a: Architecture, dtype: Any, params: Any, layout: Layout, asked: _Asked, beams: int,
    beside: int, name: str,
) -> AbstractProgram:  # fmt: skip
    """Return the program of a beam search."""
    params, layout, twice = _brought(a, dtype, params, layout)
    prompts = slot_count(asked.completions, max(1, MOST_SLOTS // beams))
    capacity = asked.prompt + asked.completion
    search: Any = beam_search.make_search(
        a, prompts=prompts, beams=beams, capacity=capacity, dtype=dtype, layout=layout
    )
    given: Any = partial(ShapeDtypeStruct, sharding=NamedSharding(layout.mesh, PartitionSpec()))
    of = given((prompts, asked.prompt), jnp.int32), given((prompts,), jnp.int32)
    request = beam_search.Request(
        given((4,), jnp.int32), given((), jnp.int32), given((), jnp.float32)
    )
    return AbstractProgram(name, lambda: search.run.lower(params, *of, request), beside + twice)


def _brought(a: Architecture, dtype: Any, params: Any, layout: Layout) -> tuple[Any, Layout, int]:
    """Return parameters where they are sampled from, and the bytes in each device of those that
    stay where they were.
    """
    there = sampling_layout(a, dtype, layout)
    if there == layout:
        return params, layout, 0
    return parameters(a, StepConfig(layout=there, dtype=dtype)), there, _bytes(params)


def measuring(
    stage: Sample | Merge | Evaluate, evals: Mapping[str, EvalKind], shapes: Shapes, layout: Layout
) -> Iterator[AbstractProgram]:
    """Give the programs of a stage that samples from a model or measures it."""
    a, dtype = shapes.architecture, DTYPES[shapes.dtype]
    params = parameters(a, StepConfig(layout=layout, dtype=dtype))
    # The models that are merged, and what they become.
    beside = len(stage.others) + 1 if isinstance(stage, Merge) else 0
    beside *= _bytes(params)
    if isinstance(stage, Sample):
        sampling = stage.rollout
        room = a.context - sampling.max_tokens
        prompt = max(1, min(room, sampling.max_prompt or room))
        count = max(1, CHUNK_OF_SAMPLES // stage.samples) * stage.samples
        asked = _Asked(count, prompt, sampling.max_tokens)
        yield from _sampled(a, dtype, params, layout, asked, sampling, 0)
    yield from _evaluations(evals, a, dtype, params, layout, beside)


def _head_alone(state: TrainState, optimizer: Any, layout: Layout) -> TrainState:
    """Return the state of a critic that is one more head on the policy."""
    head, _ = nnx.split_state(state.params, lambda path, _: path[0] == "score", ...)
    moments = jax.eval_shape(optimizer.init, head)
    places = shardings(moments, layout)
    moments = jax.tree.map(
        lambda leaf, place: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        moments,
        places,
    )
    return replace(state, params=head, optimizer=moments, frozen=nnx.State({}))


def _bytes(tree: Any) -> int:
    """Count the bytes of abstract arrays in each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
