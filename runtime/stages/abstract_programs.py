"""The programs of a stage with abstract arguments: what a run would compile, ready to lower.

Kinds of stages build theirs from the same functions as their trainers do; here stand the parts that
they share: rollouts, judges, evals, and the lowering of a training step.
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
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from tunelang.compiler.costs.judge_costs import VERDICT_SLOTS, VERDICT_TOKENS
from tunelang.compiler.costs.rollout_costs import MOST_SLOTS
from tunelang.compiler.layout.layout_query import Judge
from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.dsl.vocabulary.rewards import EvalKind, Generate, Perplexity
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation import beam_search
from tunelang.runtime.generation.engine import DecodeRequest, abstract_slots, make_engine
from tunelang.runtime.generation.engine_sizes import sampling_layout, slot_count
from tunelang.runtime.generation.slot_queue import PREFILL
from tunelang.runtime.generation.token_sampling import slot_settings
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.objectives.answer_scores import segment_program
from tunelang.runtime.rewards.learned_scorer import SCORED_TOKENS
from tunelang.runtime.sharding import HOST, Layout, jit
from tunelang.runtime.training.objective import Batch, loss_program
from tunelang.runtime.training.offload import moved_to
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import (
    ReadOnlyState,
    TrainState,
    abstract_state,
    split_state,
)
from tunelang.runtime.training.train_step import StateProgram

SCHEDULE_STEPS = 1000
"""Steps of an abstract learning-rate schedule; the program is the same for any number."""
SHORTEST_EXAMPLE = 64
"""Tokens that an example is taken to have at least, to bound the examples of a packed sequence."""


@dataclass(frozen=True)
class AbstractProgram:
    """A program of a stage, ready to lower with abstract arguments, and the device memory that the
    stage holds while it runs.
    """

    name: str
    """`train`, `score`, `prefill`, `decode`, `reference`; of an eval with its name in front."""
    lower: Callable[[], jax.stages.Lowered]
    resident_bytes: int = 0
    """Bytes on each device that the stage holds and the program does not read."""
    donated: int = 0
    """Bytes on each device that the program has to reuse."""
    stage_bytes: int = 0
    """Bytes on each device that the stage holds from its first step to its last."""
    trained: Architecture | None = None
    """The model whose weights the program updates."""
    micro_batches: int = 1
    offloaded: int = 0
    """Bytes in host memory that the compiler counts as device memory."""


def step_config(shapes: Shapes, planned: StageLayout, layout: Layout) -> StepConfig:
    """Return the settings of a training step in a planned layout."""
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


def abstract_params(architecture: Architecture, config: StepConfig) -> Any:
    """Return a model's parameters as shapes and shardings."""
    return abstract_state(architecture, optax.identity(), config).decoder_params


def device_bytes(tree: Any) -> int:
    """Count the bytes of abstract arrays on each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


# Batches.


@dataclass(frozen=True)
class AbstractRows:
    """Makes the abstract arrays of a batch: `[1, rows, ...]`, rows split over the mesh."""

    layout: Layout
    rows: int

    def array(self, *shape: int, dtype: Any = jnp.int32) -> ShapeDtypeStruct:
        """Return an array of this shape for each row."""
        spec = PartitionSpec(None, *self.layout.spec(("batch",), (self.rows,)))
        place = NamedSharding(self.layout.mesh, spec)
        return ShapeDtypeStruct((1, self.rows, *shape), dtype, sharding=place)

    def batch(self, length: int, extras: Any = None) -> Batch:
        """Return a batch of sequences of `length` tokens."""
        ids, trained = self.array(length), self.array(length, dtype=bool)
        return Batch(tokens=ids, trained=trained, segments=ids, positions=ids, extras=extras)


# Training steps.


def train_program(
    step: StateProgram,
    state: TrainState,
    batch: Any,
    config: StepConfig,
    architecture: Architecture,
    resident_bytes: int = 0,
) -> AbstractProgram:
    """Return the program that updates a state."""
    at_host = host_bytes(state, config)
    changing, _ = split_state(state)
    return AbstractProgram(
        "train",
        lambda: _lower_step(step, state, batch, config),
        resident_bytes=resident_bytes,
        donated=device_bytes(changing),
        stage_bytes=device_bytes(state) - at_host + resident_bytes,
        trained=architecture,
        micro_batches=config.micro_batches,
        offloaded=0 if _compiler_knows_host_memory(config) else at_host,
    )


def _states_with_offloaded_moments(state: TrainState, config: StepConfig) -> list[TrainState]:
    if not config.offloaded:
        return []
    critic = state.critic
    if critic is not None and len(jax.tree.leaves(critic.params)) > 1:  # more than a head
        return [state, critic]
    return [state]


def host_bytes(state: TrainState, config: StepConfig) -> int:
    """Count the bytes in host memory for each device."""
    return sum(device_bytes(s.optimizer) for s in _states_with_offloaded_moments(state, config))


def _compiler_knows_host_memory(config: StepConfig) -> bool:
    """Whether the compiler tells host memory apart; it does not for GPUs that are not here."""
    place = NamedSharding(config.layout.mesh, PartitionSpec(), memory_kind=HOST)
    return place.memory_kind == HOST


def _lower_step(
    step: StateProgram, state: TrainState, batch: Any, config: StepConfig
) -> jax.stages.Lowered:
    if not config.offloaded or _compiler_knows_host_memory(config):
        return step.lower(state, batch)
    # The moments arrive on the device as arguments: send them to the host first, and back at last.
    changing, read_only = split_state(state)
    critic_too = len(_states_with_offloaded_moments(state, config)) > 1

    def move(state: TrainState, memory: Literal["Host", "Device"]) -> TrainState:
        def move_array(leaf: Any) -> Any:
            return moved_to(leaf, memory) if leaf.shape else leaf

        critic = move(state.critic, memory) if critic_too and state.critic else state.critic
        return replace(state, optimizer=jax.tree.map(move_array, state.optimizer), critic=critic)

    def offloading_step(changing: TrainState, read_only: ReadOnlyState, batch: Any) -> Any:
        jitted: Any = step.jitted
        changed, metrics = jitted.__wrapped__(move(changing, "Host"), read_only, batch)
        return move(changed, "Device"), metrics

    places = jax.tree.map(lambda leaf: leaf.sharding, changing)
    program = jit(offloading_step, config.layout, donate_argnums=0, out_shardings=(places, None))
    return program.lower(changing, read_only, batch)


# Rollouts.


@dataclass(frozen=True)
class RolloutSizes:
    """The sizes that the programs of a rollout are compiled for."""

    slots: int
    capacity: int
    """Tokens of a slot."""
    prompt: int
    """Tokens of a prompt, at most."""
    completion: int
    """Tokens of a completion, at most."""
    completions: int


def rollout_programs(
    a: Architecture,
    dtype: Any,
    params: Any,
    layout: Layout,
    sizes: RolloutSizes,
    sampling: Sampling,
    resident_bytes: int,
    prefix: str = "",
) -> Iterator[AbstractProgram]:
    """Yield the programs of a rollout: `prefill` and `decode`, their names behind `prefix`."""
    slots = sizes.slots
    engine: Any = make_engine(a, slots=slots, capacity=sizes.capacity, dtype=dtype, layout=layout)
    filled = abstract_slots(
        a, slots, sizes.capacity, dtype, sizes.completions, sizes.completion, layout
    )
    replicated = NamedSharding(layout.mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return ShapeDtypeStruct(shape, dtype, sharding=replicated)

    prompts = array(PREFILL, sizes.prompt), array(PREFILL)
    slot_bytes = device_bytes(filled)
    yield AbstractProgram(
        prefix + "prefill",
        lambda: engine.prefill.lower(params, *prompts),
        resident_bytes + slot_bytes,
    )

    def request() -> DecodeRequest:
        settings = jax.tree.map(
            lambda value: array(*jnp.shape(value), dtype=jnp.asarray(value).dtype),
            slot_settings(sampling, slots),
        )
        return DecodeRequest(settings, array(4), array(dtype=jnp.uint32), array(), array(), array())

    yield AbstractProgram(
        prefix + "decode",
        lambda: engine.decode.lower(params, filled, array(slots, dtype=bool), request()),
        resident_bytes,
        slot_bytes,
    )


@dataclass(frozen=True)
class SampleRequest:
    """A rollout that is no part of a training step."""

    completions: int
    prompt: int
    """Tokens of a prompt, at most."""
    completion: int
    """Tokens of a completion, at most."""


def sampling_programs(
    a: Architecture,
    dtype: Any,
    params: Any,
    layout: Layout,
    request: SampleRequest,
    sampling: Sampling,
    resident_bytes: int,
    prefix: str = "",
    most_slots: int = MOST_SLOTS,
) -> Iterator[AbstractProgram]:
    """Yield the programs of a rollout that is no part of a training step."""
    params, layout, copied_bytes = _decode_params(a, dtype, params, layout)
    slots = slot_count(request.completions, most_slots)
    capacity = request.prompt + request.completion
    sizes = RolloutSizes(slots, capacity, request.prompt, request.completion, request.completions)
    resident_bytes += copied_bytes
    yield from rollout_programs(a, dtype, params, layout, sizes, sampling, resident_bytes, prefix)


def _search_program(
    a: Architecture,
    dtype: Any,
    params: Any,
    layout: Layout,
    request: SampleRequest,
    beams: int,
    resident_bytes: int,
    name: str,
) -> AbstractProgram:
    """Return the program of a beam search."""
    params, layout, copied_bytes = _decode_params(a, dtype, params, layout)
    prompts = slot_count(request.completions, max(1, MOST_SLOTS // beams))
    capacity = request.prompt + request.completion
    search: Any = beam_search.make_search(
        a, prompts=prompts, beams=beams, capacity=capacity, dtype=dtype, layout=layout
    )
    array: Any = partial(ShapeDtypeStruct, sharding=NamedSharding(layout.mesh, PartitionSpec()))
    rows = array((prompts, request.prompt), jnp.int32), array((prompts,), jnp.int32)
    settings = beam_search.SearchRequest(
        array((4,), jnp.int32), array((), jnp.int32), array((), jnp.float32)
    )
    return AbstractProgram(
        name, lambda: search.run.lower(params, *rows, settings), resident_bytes + copied_bytes
    )


def _decode_params(
    a: Architecture, dtype: Any, params: Any, layout: Layout
) -> tuple[Any, Layout, int]:
    """Return parameters in the layout that they are sampled from, that layout, and the bytes on
    each device of the original, where that is another.
    """
    decode = sampling_layout(a, dtype, layout)
    if decode == layout:
        return params, layout, 0
    config = StepConfig(layout=decode, dtype=dtype)
    return abstract_params(a, config), decode, device_bytes(params)


# Judges and evals.


def judge_programs(
    judge: Judge, completions: int, length: int, layout: Layout, stage_bytes: int, name: str
) -> Iterator[AbstractProgram]:
    """Yield the programs of a model that judges completions of up to `length` tokens, prompts
    included; the stage holds `stage_bytes` on each device, the judge's weights among them.
    """
    a, dtype = judge.architecture, DTYPES["bf16" if judge.dtype_bytes == 2 else "f32"]
    decode = sampling_layout(a, dtype, layout)
    config = StepConfig(layout=decode, dtype=dtype, chunk=CHUNK)
    params = abstract_params(a, config)
    resident_bytes = stage_bytes - device_bytes(params)
    if judge.speaks:
        verdict = min(VERDICT_TOKENS, a.context - 1)
        request = SampleRequest(completions, min(length, a.context - verdict), verdict)
        sampling = Sampling.unvalidated(max_tokens=verdict, temperature=0.0)
        most_slots = VERDICT_SLOTS * decode.batch_shards
        yield from sampling_programs(
            a, dtype, params, decode, request, sampling, resident_bytes, f"{name} ", most_slots
        )
        return
    length = min(length, a.context)
    rows = max(1, SCORED_TOKENS // length // decode.batch_shards) * decode.batch_shards
    score: Any = segment_program(a, config, 1)
    batch = AbstractRows(decode, rows).batch(length)
    yield AbstractProgram(name, lambda: score.lower(params, batch), resident_bytes)


def stage_eval_programs(
    stage: Training,
    evals: Mapping[str, EvalKind],
    shapes: Shapes,
    planned: StageLayout,
    layout: Layout,
    stage_bytes: int,
) -> Iterator[AbstractProgram]:
    """Yield the eval programs of a training stage that holds `stage_bytes` on each device."""
    a = replace(shapes.architecture, scores=stage.yields == "scores")
    params = abstract_params(a, step_config(shapes, planned, layout))
    dtype = DTYPES[shapes.dtype]
    yield from eval_programs(evals, a, dtype, params, layout, stage_bytes - device_bytes(params))


def eval_programs(
    evals: Mapping[str, EvalKind],
    a: Architecture,
    dtype: Any,
    params: Any,
    layout: Layout,
    resident_bytes: int,
) -> Iterator[AbstractProgram]:
    """Yield the programs of evals; those of equal sizes once.

    Prompts and rows are as long as the context, since no data is read.
    """
    seen: set[Any] = set()
    for name, kind in evals.items():
        if isinstance(kind, Generate):
            count = kind.limit or MOST_SLOTS
            completion = min(kind.max_tokens, a.context - 1)
            completions = count if kind.beams is not None else kind.samples * count
            request = SampleRequest(completions, a.context - completion, completion)
            if (request, kind.beams) in seen:
                continue
            seen.add((request, kind.beams))
            model = a, dtype, params, layout, request
            if kind.beams is not None:
                yield _search_program(*model, kind.beams, resident_bytes, f"{name} search")
            else:
                sampling = Sampling.unvalidated(
                    max_tokens=completion, temperature=kind.temperature, top_p=kind.top_p,
                    top_k=kind.top_k,
                )  # fmt: skip
                yield from sampling_programs(*model, sampling, resident_bytes, f"{name} ")
        elif type(kind) not in seen:
            seen.add(type(kind))
            config = StepConfig(layout=layout, dtype=dtype)
            rows = max(1, SCORED_TOKENS // a.context // layout.batch_shards) * layout.batch_shards
            batch = AbstractRows(layout, rows).batch(a.context)
            score: Any = (
                loss_program(a, config)
                if isinstance(kind, Perplexity)
                else segment_program(a, config, max(2, a.context // SHORTEST_EXAMPLE))
            )
            yield AbstractProgram(name, partial(score.lower, params, batch), resident_bytes)
