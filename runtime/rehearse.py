"""Rehearsal: a stage's own programs, compiled for hardware that need not be here.

What is compiled is what `execute.py` would run: the same builders, the same layout. The compiler
says what memory a program takes, and refuses what cannot be; nothing runs.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from tunelang.compiler.adapters import adapted
from tunelang.compiler.architecture import Architecture, plain
from tunelang.compiler.hardware import Devices
from tunelang.compiler.layout import (
    CHUNK,
    DoesNotFitError,
    NoLayoutError,
    StageLayout,
    shards_of,
)
from tunelang.compiler.search import lay_out, unpinned
from tunelang.dsl.vocabulary.rewards import EvalKind, Generate, Perplexity
from tunelang.dsl.vocabulary.stages import (
    Compared,
    Distill,
    Evaluate,
    Kto,
    Merge,
    Policy,
    Ppo,
    Preference,
    RewardModel,
    Sample,
    Supervised,
    Training,
)
from tunelang.dsl.vocabulary.training import Lora, Sampling
from tunelang.runtime import train
from tunelang.runtime.answers import TOKENS
from tunelang.runtime.collectives import exchanged, wasteful
from tunelang.runtime.comparing import segment_program
from tunelang.runtime.critic import learner_of
from tunelang.runtime.custom import bound
from tunelang.runtime.decode_loop import Request, abstract_slots, make_engine
from tunelang.runtime.durable import read_json, write_json
from tunelang.runtime.evaluate import MOST_SLOTS, sampled_on
from tunelang.runtime.layers import DTYPES
from tunelang.runtime.optimizers import at_unit_rate, build_optimizer, learning_rate
from tunelang.runtime.policy import decode_layout
from tunelang.runtime.policy_step import PolicyBatch, policy_step, score_program
from tunelang.runtime.prepare import Prepared, Shapes
from tunelang.runtime.rollout import PREFILL
from tunelang.runtime.sample import CHUNK as CHUNK_OF_SAMPLES
from tunelang.runtime.sampling import slot_settings
from tunelang.runtime.sharding import Layout, is_variable, make_layout, shardings
from tunelang.runtime.supervised import compiled, objective_of
from tunelang.runtime.topologies import compilable
from tunelang.runtime.words import size_text

STEP = ("train", "score", "reference", "prefill", "decode")
"""The programs of a step."""
_NOT_COMPILED = ("from_", "data", "seed", "length", "reward")
"""What branches may differ in and still have the same programs."""
_FORMAT = "2"
"""Of what is kept of a compilation."""
_STEPS = 1000
"""Of a schedule; the program is the same for any."""
_TRIES = 3
"""Layouts that are compiled to find one that fits."""
_SEGMENT = 64
"""Tokens of an example, at least, where the data is not looked at."""


@dataclass(frozen=True)
class Rehearsed:
    """What the compiler says of one program."""

    name: str
    """`train`, `score`, `prefill`, `decode`, `reference`."""
    peak: int
    """Bytes in a device while it runs, with what else the stage holds there."""
    seconds: float
    """Compiling took."""
    exchanged: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Collective -> how many there are in a call, and their bytes in each device."""
    findings: tuple[str, ...] = ()
    """What should not be."""
    refused: str = ""
    """Why the compiler would not: the program needs more memory than there is."""


@dataclass(frozen=True)
class Program:
    """One that a stage runs, to be lowered, and what the stage needs beside it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    beside: int = 0
    """Bytes in each device that the stage holds and the program does not read."""
    donated: int = 0
    """Bytes in each device that have to be reused."""
    held: int = 0
    """Bytes in each device that the stage holds from its first step to its last."""
    trained: Architecture | None = None
    """Whose weights it updates."""
    micro_batches: int = 1


def rehearse(prepared: Prepared, node: str, cache: Path) -> Iterator[Rehearsed]:
    """Compile the programs of a stage, one after another.

    What was compiled before is read from `cache`. Raises `MissingExtraError` where the compiler
    for the hardware is not installed, and `CustomError`.
    """
    stage, devices = prepared.graph.nodes[node].value, prepared.devices[node]
    assert isinstance(stage, Training | Sample | Merge | Evaluate)
    there = compilable(devices)
    references = () if isinstance(stage, Sample) else stage.evals
    evals = {each.name: prepared.program.declarations[each.name].value for each in references}
    if not isinstance(stage, Training):
        layout = make_layout(fsdp=len(there), devices=there)
        models = prepared.measured[node]
        for shapes in models:
            which = f"{shapes.architecture.width} × {shapes.architecture.layers} "
            for program in _measuring(stage, evals, shapes, layout):
                name = program.name if len(models) == 1 else which + program.name
                yield _compiled(replace(program, name=name), devices, cache)
        return
    stage = bound(stage, prepared.program.folder)
    planned, shapes = prepared.layouts[node], prepared.shapes[node]
    layout = make_layout(**planned.mesh, devices=there)
    copied = tuple(unsplit(shapes.architecture, layout))
    held = 0
    for program in programs(stage, shapes, planned, layout):
        found = _compiled(program, devices, cache)
        held = max(held, program.held)
        yield replace(found, findings=found.findings + copied) if program.name == "train" else found
    a = replace(shapes.architecture, scores=stage.yields == "scores")
    params = _params(a, _program_of(shapes, planned, layout))
    for program in _evaluations(evals, a, shapes.dtype, params, layout, held - _bytes(params)):
        yield _compiled(program, devices, cache)


def identity(prepared: Prepared, node: str) -> tuple[object, ...]:
    """Return what the programs of a node depend on: branches of a sweep over numbers share them."""
    stage = prepared.graph.nodes[node].value
    assert isinstance(stage, Training | Sample | Merge | Evaluate)
    if not isinstance(stage, Training):
        return (node,)
    unit = stage.model_copy(update={"optimizer": at_unit_rate(stage.optimizer)})
    told = ((name, str(value)) for name, value in unit if name not in _NOT_COMPILED)
    where = str(prepared.layouts[node]), prepared.shapes[node], prepared.devices[node]
    return type(stage), *told, *where


def fits(prepared: Prepared, node: str, found: Rehearsed) -> bool:
    """Whether a program of a stage fits into the memory of a device."""
    return not found.refused and found.peak <= prepared.devices[node].chip.memory


def remedies(prepared: Prepared, node: str, found: Rehearsed, cache: Path) -> Iterator[str]:
    """Say what would make a stage fit of which a program does not: another layout, compiled as
    well; or more devices, or frozen weights in four bits, by the estimate.
    """
    stage = prepared.graph.nodes[node].value
    if not isinstance(stage, Training) or found.name not in STEP:
        yield f"more devices than the {prepared.devices[node]}"
        return
    shapes = prepared.shapes[node]
    stage = bound(unpinned(stage), prepared.program.folder)
    devices, planned = prepared.devices[node], prepared.layouts[node]
    a, width = shapes.architecture, 4 if shapes.dtype == "f32" else 2
    budget = devices.chip.memory
    worst = max(found.peak, budget + 1)
    for _ in range(_TRIES):
        budget = int(budget * min(0.95, planned.total / worst))
        try:
            smaller = replace(devices, chip=replace(devices.chip, memory=budget))
            layout = lay_out(stage, a, width, smaller, planned.kernel, shapes.teacher)
        except DoesNotFitError:
            break
        mesh = make_layout(**layout.mesh, devices=compilable(devices))
        made = [_compiled(p, devices, cache) for p in programs(stage, shapes, layout, mesh)]
        worst = max(each.peak for each in made)
        if all(not each.refused and each.peak <= devices.chip.memory for each in made):
            yield f"{_pinned(layout)}: {size_text(worst)}, as the compiler says"
            return
    for times in (2, 4, 8, 16):
        more = replace(devices, count=times * devices.count)
        with suppress(DoesNotFitError, NoLayoutError):
            layout = lay_out(stage, a, width, more, teacher=shapes.teacher)
            yield f"{more}: {size_text(layout.total)}, by the estimate"
            break
    if not a.adapters:
        with suppress(DoesNotFitError, NoLayoutError):
            frozen = adapted(a, (Lora.fixed(),), "nf4")
            layout = lay_out(stage, frozen, width, devices, teacher=shapes.teacher)
            size = size_text(layout.total)
            yield f"`adapter = lora()`, `weights = nf4` of the model: {size}, by the estimate"


def _pinned(layout: StageLayout) -> str:
    axes = ", ".join(f"{axis} = {size}" for axis, size in layout.mesh.items() if size > 1)
    local = layout.rows // shards_of(layout.mesh) // layout.micro_batches
    return f"`mesh = axes({axes})`, `micro_batch = {local} sequences`, `remat = {layout.remat}`"


def programs(
    stage: Training, shapes: Shapes, planned: StageLayout, layout: Layout
) -> Iterator[Program]:
    """Give the programs of a stage, to be lowered."""
    if isinstance(stage, Policy):
        return _policy(stage, shapes, planned, layout)
    assert isinstance(stage, Supervised)
    return _supervised(stage, shapes, planned, layout)


def _program_of(shapes: Shapes, planned: StageLayout, layout: Layout) -> train.Program:
    return train.Program(
        layout=layout,
        dtype=DTYPES[shapes.dtype],
        micro_batches=planned.micro_batches,
        remat=planned.remat,  # type: ignore[arg-type]
        kernel=planned.kernel,  # type: ignore[arg-type]
        chunk=CHUNK,
    )


def _params(architecture: Architecture, program: train.Program) -> Any:
    """Return a model's parameters as shapes and shardings."""
    return train.abstract_state(architecture, optax.identity(), program).weights


def _supervised(
    stage: Supervised, shapes: Shapes, planned: StageLayout, layout: Layout
) -> Iterator[Program]:
    a = replace(shapes.architecture, scores=stage.yields == "scores")
    program = _program_of(shapes, planned, layout)
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
    beside = None if live is None else _params(live, program)
    if isinstance(stage, Distill) and stage.teacher_log_probs == "ahead":
        beside = None
    objective = objective_of(stage, count, a, live, isinstance(stage, RewardModel))
    optimizer, step = compiled(a, at_unit_rate(stage.optimizer), _STEPS, program, objective)
    state = train.abstract_state(a, optimizer, program, objective.extra)
    batch = _batch(stage, planned, count, layout)
    yield Program(
        "train",
        lambda: step.lower(replace(state, beside=beside), batch),
        donated=_bytes(replace(state, frozen=nnx.State({}))),
        held=_bytes(replace(state, beside=beside)),
        trained=a,
        micro_batches=program.micro_batches,
    )
    if isinstance(stage, Compared) and stage.needs_reference and ahead:
        score = segment_program(plain(a), program, count)
        params = _params(plain(a), program)
        yield Program("reference", lambda: score.lower(params, batch))  # type: ignore[attr-defined]


def _rows(layout: Layout, rows: int, *shape: int, dtype: Any = jnp.int32) -> Any:
    spec = PartitionSpec(None, *layout.spec(("batch",), (rows,)))
    return ShapeDtypeStruct((1, rows, *shape), dtype, sharding=NamedSharding(layout.mesh, spec))


def _tokens(layout: Layout, rows: int, length: int) -> dict[str, Any]:
    whole = _rows(layout, rows, length)
    trained = _rows(layout, rows, length, dtype=bool)
    return {"tokens": whole, "trained": trained, "segments": whole, "positions": whole}


def _batch(stage: Supervised, planned: StageLayout, count: int, layout: Layout) -> train.Batch:
    rows, length = planned.rows, planned.length

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return _rows(layout, rows, *shape, dtype=dtype)

    batch = train.Batch(**_tokens(layout, rows, length))
    numbers = array(count, dtype=jnp.float32)
    if isinstance(stage, Kto | RewardModel):
        batch = replace(batch, values=numbers)
    if isinstance(stage, Kto):
        batch = replace(batch, mismatched=train.Batch(**_tokens(layout, rows, length)))
    if isinstance(stage, Preference) and stage.needs_reference:
        if stage.reference_log_probs == "ahead":
            batch = replace(batch, reference=numbers)
    if isinstance(stage, Distill) and stage.teacher_log_probs == "ahead":
        k = stage.top_k or 1
        batch = replace(batch, teacher=(array(length, k), array(length, k, dtype=jnp.float32)))
    return batch


def _policy(
    stage: Policy, shapes: Shapes, planned: StageLayout, layout: Layout
) -> Iterator[Program]:
    a, sampling = shapes.architecture, stage.rollout
    program = replace(_program_of(shapes, planned, layout), kernel="xla")
    unit = at_unit_rate(stage.optimizer)
    optimizer, schedule = build_optimizer(unit, _STEPS), learning_rate(unit, _STEPS)
    state = train.abstract_state(a, optimizer, program)
    learner = None
    if isinstance(stage, Ppo):
        scores = replace(a, scores=True)
        learner = learner_of(stage.critic, scores, _STEPS)
        held = train.abstract_state(scores, learner.optimizer, program)
        if stage.critic.trunk == "shared":
            held = _head_alone(held, learner.optimizer, layout)
        state = replace(state, critic=replace(held, frozen=nnx.State({})), beside=held.frozen)
    step = policy_step(a, optimizer, schedule, stage, program, learner)
    completion = min(sampling.max_tokens, planned.length)
    prompt = max(1, planned.length - completion)
    part = math.gcd(stage.group, planned.rows // layout.batch_shards // program.micro_batches)
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
    if stage.kl is not None and (not a.adapters or stage.reference is not None):
        reference = _bytes(_params(plain(a), program))
    changing = _bytes(replace(state, frozen=nnx.State({}), beside=None))
    kept = _bytes(state) + reference
    lower = partial(step.lower, state, batch)
    yield Program("train", lower, reference, changing, kept, a, program.micro_batches)

    params = state.weights
    beside = _bytes(state) - _bytes(params) + reference
    given = params, batch.prompts, batch.prompt_lengths, batch.tokens
    if several or stage.kl is not None:
        score = score_program(a, program, sampling.temperature)
        yield Program("score", lambda: score.lower(*given), beside)  # type: ignore[attr-defined]

    slots, capacity = planned.slots or 1, planned.length
    apart = decode_layout(planned, layout)
    if apart is not None:  # then the weights are there twice
        params = _params(a, replace(program, layout=apart))
        beside += _bytes(state.weights)
        layout = apart
    count = stage.batch * stage.group
    sizes = _Sizes(slots, capacity, prompt, completion, count)
    yield from _sampler(a, shapes.dtype, params, layout, sizes, sampling, beside)


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
    dtype: str,
    params: Any,
    layout: Layout,
    sizes: _Sizes,
    sampling: Sampling,
    beside: int,
    name: str = "",
) -> Iterator[Program]:
    """Give the programs of a rollout."""
    slots, capacity, of = sizes.slots, sizes.capacity, DTYPES[dtype]
    engine: Any = make_engine(a, slots=slots, capacity=capacity, dtype=of, layout=layout)
    filled = abstract_slots(a, slots, capacity, of, sizes.count, sizes.completion, layout)
    whole = NamedSharding(layout.mesh, PartitionSpec())

    def ints(*shape: int, dtype: Any = jnp.int32) -> Any:
        return ShapeDtypeStruct(shape, dtype, sharding=whole)

    prompts = ints(PREFILL, sizes.prompt), ints(PREFILL)
    kept = _bytes(filled)
    yield Program(name + "prefill", lambda: engine.prefill.lower(params, *prompts), beside + kept)

    def request() -> Request:
        settings = jax.tree.map(
            lambda array: ints(*jnp.shape(array), dtype=jnp.asarray(array).dtype),
            slot_settings(sampling, slots),
        )
        return Request(settings, ints(4), ints(dtype=jnp.uint32), ints(), ints(), ints())

    yield Program(
        name + "decode",
        lambda: engine.decode.lower(params, filled, ints(slots, dtype=bool), request()),
        beside,
        kept,
    )


def _evaluations(
    evals: Mapping[str, EvalKind],
    a: Architecture,
    dtype: str,
    params: Any,
    layout: Layout,
    beside: int,
) -> Iterator[Program]:
    """Give the programs of evals: prompts and rows as long as the context, since no data is read;
    those of equal sizes once. `beside` is what a stage holds beside the parameters.
    """
    seen: set[Any] = set()
    for name, kind in evals.items():
        if isinstance(kind, Generate) and kind.beams is None:
            count = kind.samples * (kind.limit or MOST_SLOTS)
            slots = min(MOST_SLOTS, _power_of_two(count))
            completion = min(kind.max_tokens, a.context - 1)
            sizes = _Sizes(slots, a.context, a.context - completion, completion, count)
            sampling = Sampling.fixed(
                max_tokens=completion, temperature=kind.temperature, top_p=kind.top_p,
                top_k=kind.top_k,
            )  # fmt: skip
            if sizes not in seen:
                yield from _sampled(a, dtype, params, layout, sizes, sampling, beside, f"{name} ")
            seen.add(sizes)
        elif not isinstance(kind, Generate) and type(kind) not in seen:
            seen.add(type(kind))
            program = train.Program(layout=layout, dtype=DTYPES[dtype])
            rows = max(1, TOKENS // a.context // layout.batch_shards) * layout.batch_shards
            batch = train.Batch(**_tokens(layout, rows, a.context))
            score: Any = (
                train.loss_program(a, program)
                if isinstance(kind, Perplexity)
                else segment_program(a, program, max(2, a.context // _SEGMENT))
            )
            yield Program(name, partial(score.lower, params, batch), beside)


def _sampled(
    a: Architecture, dtype: str, params: Any, layout: Layout, sizes: _Sizes, sampling: Sampling,
    beside: int, name: str = "",
) -> Iterator[Program]:  # fmt: skip
    """Give the programs of a rollout that is no part of a step, see `evaluate.sampled_on`."""
    there = sampled_on(a, DTYPES[dtype], layout)
    if there != layout:
        beside += _bytes(params)
        params = _params(a, train.Program(layout=there, dtype=DTYPES[dtype]))
    yield from _sampler(a, dtype, params, there, sizes, sampling, beside, name)


def _measuring(
    stage: Sample | Merge | Evaluate, evals: Mapping[str, EvalKind], shapes: Shapes, layout: Layout
) -> Iterator[Program]:
    """Give the programs of a stage that samples from a model or measures it."""
    a, dtype = shapes.architecture, shapes.dtype
    params = _params(a, train.Program(layout=layout, dtype=DTYPES[dtype]))
    # The models that are merged, and what they become.
    beside = len(stage.others) + 1 if isinstance(stage, Merge) else 0
    beside *= _bytes(params)
    if isinstance(stage, Sample):
        sampling = stage.rollout
        room = a.context - sampling.max_tokens
        prompt = max(1, min(room, sampling.max_prompt or room))
        count = max(1, CHUNK_OF_SAMPLES // stage.samples) * stage.samples
        slots = min(MOST_SLOTS, _power_of_two(count))
        capacity = prompt + sampling.max_tokens
        sizes = _Sizes(slots, capacity, prompt, sampling.max_tokens, count)
        yield from _sampled(a, dtype, params, layout, sizes, sampling, 0)
    yield from _evaluations(evals, a, dtype, params, layout, beside)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _head_alone(state: train.TrainState, optimizer: Any, layout: Layout) -> train.TrainState:
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


# Compiling.


def _compiled(program: Program, devices: Devices, cache: Path) -> Rehearsed:
    lowered = program.lower()
    text = lowered.as_text()
    versions = [_FORMAT, version("jax"), version("jaxlib")]
    key = "\n".join([str(devices), str(devices.shape), *versions, text])
    path = cache / f"rehearsal-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    found = read_json(path) if path.exists() else None
    if found is None:
        found = asdict(measure(program, lowered))
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    held = Rehearsed(
        **{
            **found,
            "findings": tuple(found["findings"]),
            "exchanged": {name: tuple(each) for name, each in found["exchanged"].items()},
        }
    )
    return replace(held, name=program.name, peak=held.peak + program.beside)


def measure(program: Program, lowered: jax.stages.Lowered) -> Rehearsed:
    """Compile a program and look at it."""
    name, donated = program.name, program.donated
    begun = time.monotonic()
    try:
        done = lowered.compile()
    except Exception as error:
        refused = _refusal(str(error))
        if refused is None:
            raise
        needed, why = refused
        return Rehearsed(name, needed, time.monotonic() - begun, refused=why)
    seconds = time.monotonic() - begun
    memory: Any = done.memory_analysis()
    peak = int(getattr(memory, "peak_memory_in_bytes", 0) or 0)
    peak = peak or int(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    findings = []
    kept = donated - int(memory.alias_size_in_bytes)
    if kept > max(2**20, donated // 50):
        findings.append(f"{kept:,} bytes of state are not donated: they are there twice")
    said = done.as_text() or ""
    if program.trained is not None:
        findings += wasteful(said, program.trained, program.micro_batches)
    return Rehearsed(name, peak, seconds, exchanged(said), tuple(findings))


_NEEDED = re.compile(
    r"(?:Used|total memory required[^(]*\(?|allocat\w* )\s*([\d.]+)\s*([KMGT]?)i?B?", re.IGNORECASE
)


def _refusal(text: str) -> tuple[int, str] | None:
    """Return the bytes that a program needs by the compiler's own words, and these words; None
    where it failed for another reason.
    """
    lower = text.lower()
    if "resource_exhausted" not in lower and "out of memory" not in lower:
        return None
    line = next((each for each in text.splitlines() if "memory" in each.lower()), text)
    found = _NEEDED.search(line)
    needed = 0
    if found is not None:
        needed = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    return needed, line.strip()[:200]


def unsplit(architecture: Architecture, layout: Layout) -> Sequence[str]:
    """Name the axes of parameters that the mesh should split and does not divide."""
    program = train.Program(layout=layout)
    found: dict[str, None] = {}
    for node in jax.tree.leaves(_params(architecture, program), is_leaf=is_variable):
        if not is_variable(node):
            continue
        for name, size in zip(node.get_metadata("out_sharding"), node.shape, strict=True):
            over = [x for x in layout.rules.get(name, ()) if layout.mesh.shape.get(x, 1) > 1]
            ways = math.prod(layout.mesh.shape[axis] for axis in over)
            if size % ways:
                found[f"`{name}` of {size} is copied: {ways} do not divide it"] = None
    return list(found)
