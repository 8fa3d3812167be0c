"""How a stage is laid out over devices: mesh, micro-batches, remat, slots; and what that takes.

Every legal mesh over the `data`, `fsdp` and `tensor` axes is looked at, and for each the fewest
micro-batches and the least rematerialisation that fit. What is left is ranked by a closed-form
estimate of the time of a step; ties go to the simpler layout. The memory model is a sum over named
parts; it ranks and prunes, and promises nothing for small models (see the tests).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tunelang.compiler.adapters import STORED_BYTES, adapter_parameters
from tunelang.compiler.architecture import (
    Architecture,
    expert_count,
    forward_flops,
    kv_bytes_per_token,
    parameter_count,
    train_flops,
    trained_count,
)
from tunelang.compiler.hardware import Devices
from tunelang.dsl.vocabulary.stages import PAIRS, Compared, Policy, Ppo, Supervised, Training
from tunelang.dsl.vocabulary.training import AdamW, Lion, Muon, Sgd

CHUNK = 128
"""Tokens of a sequence whose logits are in memory at once."""
MOST_SLOTS = 256
_LATENCY = 5e-6
"""Seconds until a small exchange is through, at least."""
_REMAT_COST = {"none": 3.0, "dots": 3.2, "full": 4.0}
"""Forward passes that a training step is worth."""
_REMAT_COST_CPU = {"none": 3.3, "dots": 3.2, "full": 3.4}
"""The same on a CPU, where to keep an activation costs as much as to compute it (measured)."""
_MOMENTS = {AdamW: 2, Muon: 2, Lion: 1, Sgd: 1}
"""Numbers that an optimizer keeps of each parameter."""
_MICRO_OVERHEAD = 0.02
"""What one more micro-batch adds to the time of an update."""
_FLAT = 0.25
"""The share of groups that is assumed to have no advantage: their micro-batches are skipped."""
_CACHE_MISSES = 1.15
"""Factor of the time of an update whose activations do not stay in a CPU's cache (measured)."""


_HELD = ("parameters", "optimizer", "reference", "critic", "teacher")
"""Parts of the memory that stay for the whole stage."""
_ROLLOUT = ("kv cache", "decoding")
"""Parts that are there while completions are sampled; all others are of the update."""


def peak(memory: Mapping[str, int]) -> int:
    """Return the most bytes in a device, from its parts: a rollout and an update come in turn."""
    held = sum(memory.get(name, 0) for name in _HELD)
    rollout = sum(memory.get(name, 0) for name in _ROLLOUT)
    return held + max(rollout, sum(memory.values()) - held - rollout)


@dataclass(frozen=True, kw_only=True)
class StageLayout:
    """Where and in which parts a stage runs."""

    mesh: dict[str, int]
    rows: int
    """Sequences of one update, over all devices."""
    length: int
    """Tokens of a sequence, at most."""
    micro_batches: int
    remat: str
    kernel: str = "xla"
    """Of attention."""
    slots: int | None
    """Completions that are sampled at once, over all devices; None without a rollout."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes in each device, by part."""
    flops: float = 0.0
    """Of a step, over all devices: what has to be computed."""
    decode: dict[str, int] | None = None
    """Mesh of the rollout, over the same devices; None without a rollout."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of a step that would be spent on each thing by itself: computing, reading the memory,
    each exchange, and the rollout."""
    seconds: float = 0.0
    """Estimate for a step: exchanges that can be hidden behind computing are, the rest adds up."""

    @property
    def total(self) -> int:
        """Bytes in each device, at most."""
        return peak(self.memory)

    @property
    def bound(self) -> str:
        """What takes longest in a step."""
        return max(self.times, key=self.times.__getitem__)


class DoesNotFitError(Exception):
    """No layout fits; `nearest` is the one that needs the least memory, `devices` what it is for,
    `pinned` what the spec itself decides.
    """

    def __init__(self, nearest: StageLayout, devices: Devices, pinned: tuple[str, ...]) -> None:
        super().__init__(f"needs {nearest.total} bytes of {devices.chip.memory}")
        self.nearest = nearest
        self.devices = devices
        self.pinned = pinned


class NoLayoutError(Exception):
    """A pinned mesh or micro-batch contradicts the devices or the batch; `why` in words."""

    def __init__(self, attribute: str, why: str) -> None:
        super().__init__(attribute, why)
        self.attribute = attribute
        self.why = why


def lay_out(
    stage: Training,
    architecture: Architecture,
    dtype_bytes: int,
    devices: Devices,
    attention: str = "auto",
    teacher: Architecture | None = None,
) -> StageLayout:
    """Return the best layout of a training stage; see `ranked`."""
    return ranked(stage, architecture, dtype_bytes, devices, attention, teacher)[0]


def ranked(
    stage: Training,
    architecture: Architecture,
    dtype_bytes: int,
    devices: Devices,
    attention: str = "auto",
    teacher: Architecture | None = None,
) -> list[StageLayout]:
    """Return the layouts of a training stage that fit, best first: for each mesh the fastest one,
    and of equally fast ones the simpler first. `attention` is the kernel that its model wants,
    `teacher` what it is distilled from.

    Raises `DoesNotFitError` and `NoLayoutError`.
    """
    rows, length = _batch(stage, architecture)
    kernel = attention_kernel(attention, architecture, length, dtype_bytes, devices)
    pinned = pins(stage)
    nearest: StageLayout | None = None
    found: list[tuple[tuple[float, int, int], StageLayout]] = []
    experts = 1 if architecture.experts is None else architecture.experts.count
    for mesh in _meshes(stage, devices.count, experts):
        if rows % _shards(mesh) or any(
            size % mesh["tensor"] for size in (architecture.heads, architecture.mlp)
        ):
            continue
        if experts % mesh["expert"]:
            continue
        fitting = _fitting(
            stage, architecture, dtype_bytes, devices, mesh, rows, length, kernel, teacher
        )
        for layout, fits in fitting:
            if nearest is None or layout.total < nearest.total:
                nearest = layout
            if not fits:
                continue
            axes = sum(size > 1 for size in mesh.values())
            found.append(((float(f"{layout.seconds:.6g}"), axes, -mesh["data"]), layout))
            break
    if found:
        return [layout for _, layout in sorted(found, key=lambda each: each[0])]
    if nearest is None:
        size = math.prod(_mesh_of(stage).values()) if stage.mesh is not None else devices.count
        raise NoLayoutError(
            "mesh" if stage.mesh is not None else "batch",
            f"{rows} sequences do not divide over {size} devices",
        )
    raise DoesNotFitError(nearest, devices, pinned)


def pins(stage: Training) -> tuple[str, ...]:
    """Return the parts of the layout that the spec decides itself."""
    names = ("mesh", "micro_batch", "remat")
    return tuple(name for name in names if getattr(stage, name) not in (None, "auto"))


_DECIDING = (
    "batch", "group", "minibatches", "passes", "refill", "rollout", "packing", "needs_reference",
    "reference_log_probs", "reference", "value_model", "mesh", "decode_mesh", "micro_batch",
    "remat",
)  # fmt: skip


def depends(stage: Training) -> tuple[Any, ...]:
    """Return what of a stage its layout depends on."""
    critic = getattr(stage, "critic", None)
    return (
        type(stage),
        type(stage.optimizer),
        getattr(stage, "kl", None) is None,
        getattr(stage, "advantage", None) == "gae",
        critic and (critic.trunk, type(critic.optimizer)),
        *(str(getattr(stage, name, None)) for name in _DECIDING),
    )


def unpinned(stage: Training) -> Training:
    """Return the stage with all of its layout left to the plan."""
    return stage.model_copy(update={"mesh": None, "micro_batch": None, "remat": "auto"})


def attention_kernel(
    asked: str, a: Architecture, length: int, dtype_bytes: int, devices: Devices
) -> str:
    """Return the kernel of attention: the one that is asked for, or for `auto` the fastest.

    Raises `NoLayoutError` where the one that is asked for cannot be.
    """
    platform = devices.chip.platform
    why = {"xla": ""}
    why["cudnn"] = (
        "it is for GPUs"
        if platform != "gpu"
        else "it is for bf16"
        if dtype_bytes != 2
        else "it has no capped logits"
        if a.attention_cap is not None
        else f"it has no head_dim of {a.head_dim}"
        if a.head_dim % 8 or a.head_dim > 128
        else ""
    )
    why["splash"] = (
        "it is for TPUs"
        if platform != "tpu"
        else f"{length} tokens are no multiple of 128"
        if length % 128
        else ""
    )
    if asked != "auto":
        if why[asked]:
            raise NoLayoutError("attention", f"the kernel `{asked}`: {why[asked]}")
        return asked
    return next(name for name in ("splash", "cudnn", "xla") if not why[name])


def _batch(stage: Training, architecture: Architecture) -> tuple[int, int]:
    """Return the sequences of an update and the tokens of one."""
    context = architecture.context
    match stage:
        case Supervised():
            if stage.needs[-1:] == PAIRS[-1:]:  # both answers of a pair share a sequence
                context *= 2
            if stage.batch.unit == "tokens":
                return max(1, int(stage.batch.value) // context), context
            return int(stage.batch.value), context
        case Policy():
            longest = stage.rollout.max_prompt
            length = context if longest is None else longest + stage.rollout.max_tokens
            return stage.batch * stage.group // stage.minibatches, min(length, context)
    raise TypeError(f"{type(stage).__name__} is not laid out")


def _mesh_of(stage: Training) -> dict[str, int]:
    assert stage.mesh is not None
    return {name: getattr(stage.mesh, name) for name in ("data", "fsdp", "expert", "tensor")}


def _shards(mesh: dict[str, int]) -> int:
    """Return how many parts the batch is split into."""
    return mesh["data"] * mesh["fsdp"] * mesh["expert"]


def _meshes(stage: Training, count: int, experts: int) -> Iterator[dict[str, int]]:
    if stage.mesh is not None:
        if stage.mesh.context > 1:
            raise NoLayoutError("mesh", "the axis `context` is not built yet")
        if stage.mesh.expert > 1 and experts % stage.mesh.expert:
            raise NoLayoutError(
                "mesh", f"{stage.mesh.expert} do not divide the {experts} experts of the model"
            )
        mesh = _mesh_of(stage)
        if math.prod(mesh.values()) > count:
            need = " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
            raise NoLayoutError("mesh", f"{need} need more than the {count} devices that there are")
        yield mesh
        return
    # Fewer devices than there are, where the batch does not divide over all.
    for used in (n for n in range(count, 0, -1) if count % n == 0):
        for tensor in (n for n in (1, 2, 4, 8, 16) if used % n == 0):
            rest = used // tensor
            for expert in (n for n in range(1, min(rest, experts) + 1) if rest % n == 0):
                left = rest // expert
                for fsdp in (n for n in range(1, left + 1) if left % n == 0):
                    yield {"data": left // fsdp, "fsdp": fsdp, "expert": expert, "tensor": tensor}


def _fitting(
    stage: Training,
    architecture: Architecture,
    dtype_bytes: int,
    devices: Devices,
    mesh: dict[str, int],
    rows: int,
    length: int,
    kernel: str,
    teacher: Architecture | None,
) -> Iterator[tuple[StageLayout, bool]]:
    """Give the layouts of a mesh from the fastest on, and whether each fits."""
    local = rows // _shards(mesh)
    counts = [n for n in range(1, local + 1) if local % n == 0]
    if stage.micro_batch is not None:
        if local % stage.micro_batch:
            raise NoLayoutError(
                "micro_batch",
                f"{stage.micro_batch} do not divide the {local} sequences of a device",
            )
        counts = [local // stage.micro_batch]
    remats = ("none", "dots", "full") if stage.remat == "auto" else (stage.remat,)
    layouts = [
        estimated(
            StageLayout(
                mesh=mesh,
                rows=rows,
                length=length,
                micro_batches=parts,
                remat=remat,
                kernel=kernel,
                slots=None,
            ),
            stage,
            architecture,
            dtype_bytes,
            devices,
            teacher,
        )
        for parts in counts
        for remat in remats
    ]
    for layout in sorted(layouts, key=lambda layout: layout.seconds):
        yield layout, layout.total <= devices.chip.memory


def estimated(
    layout: StageLayout,
    stage: Training,
    a: Architecture,
    dtype_bytes: int,
    there: Devices,
    teacher: Architecture | None,
) -> StageLayout:
    """Fill in memory, FLOPs and seconds."""
    chip = there.chip
    devices = math.prod(layout.mesh.values())
    tensor = layout.mesh["tensor"]
    split = layout.mesh["fsdp"] * tensor
    # As if there were fewer experts, where they are split.
    elsewhere = expert_count(a) - expert_count(a) // layout.mesh["expert"]
    parameters = parameter_count(a) - elsewhere
    trained = trained_count(a) - (0 if a.adapters else elsewhere)
    held = _held(a, dtype_bytes) - int(_table_bytes(a, dtype_bytes) * elsewhere)
    moments = _MOMENTS[type(stage.optimizer)]
    shards = _shards(layout.mesh)
    local = layout.rows // shards // layout.micro_batches
    micro, scored = _tokens(stage, layout, local)
    tokens = micro * layout.micro_batches
    chunk = local * min(CHUNK, scored)
    gradients = 1 if layout.micro_batches == 1 else 2
    memory = {
        "parameters": held // split,
        "optimizer": 4 * moments * trained // split,
        "gradients": 4 * gradients * trained // split,
        "activations": _activations(a, layout, micro, dtype_bytes) // tensor,
        "logits": 2 * 4 * chunk * a.vocabulary // tensor,
    }
    # The layer at work, and the head: gathered, or in another form.
    if split > tensor or dtype_bytes < STORED_BYTES[a.storage] or a.storage in ("nf4", "int8"):
        memory["gathered"] = (
            dtype_bytes * (parameters // a.layers + a.vocabulary * a.width) // tensor
        )
    step_tokens = tokens * shards
    flops = train_flops(a, layout.length) * step_tokens
    costs = _REMAT_COST if chip.cache is None else _REMAT_COST_CPU
    work = forward_flops(a, layout.length) * step_tokens * costs[layout.remat]
    work *= train_flops(a, layout.length) / (3 * forward_flops(a, layout.length))
    work *= 1 + _MICRO_OVERHEAD * (layout.micro_batches - 1)
    if chip.cache is not None and memory["activations"] > chip.cache:
        work *= _CACHE_MISSES
    if teacher is not None:
        work += forward_flops(teacher, layout.length) * step_tokens
        memory["teacher"] = 4 * parameter_count(teacher) // split
    if isinstance(stage, Compared) and stage.needs_reference:
        work += forward_flops(a, layout.length) * step_tokens
        live = getattr(stage, "reference_log_probs", "live") == "live"
        if live and (not a.adapters or stage.reference is not None):
            memory["reference"] = 4 * parameters // split
    updates = 1
    if isinstance(stage, Policy):
        compared = stage.advantage != "gae" and not stage.refill
        if compared and stage.minibatches == 1:  # see `policy_step.useful_first`
            parts = layout.micro_batches
            work *= math.ceil((1 - _FLAT) * parts) / parts
        if isinstance(stage, Ppo) and stage.critic.trunk == "separate":
            # Two decoders are trained; the second is taken to be as large as the first.
            flops, work = 2 * flops, 2 * work
            own = trained_count(replace(a, scores=True)) - (0 if a.adapters else elsewhere)
            each = 1 + _MOMENTS[type(stage.critic.optimizer)] + gradients
            below = held if a.adapters and stage.value_model is not None else 0
            memory["critic"] = (4 * each * own + below) // split
        updates = stage.minibatches * stage.passes
        sampled = step_tokens * stage.minibatches
        flops = flops * updates + forward_flops(a, layout.length) * sampled
        # The passes that only score: the policy itself before its first update, values, reference.
        scored_by = (updates > 1) + isinstance(stage, Ppo) + (stage.kl is not None)
        flops += isinstance(stage, Ppo) * forward_flops(a, layout.length) * sampled
        work = work * updates + scored_by * forward_flops(a, layout.length) * sampled
        if stage.kl is not None and (not a.adapters or stage.reference is not None):
            memory["reference"] = 4 * parameters // split  # else it is the adapter's beginning
    hidden, exposed = _exchanges(a, layout, there, parameters, trained, tokens, dtype_bytes)
    hidden, exposed = (
        {name: updates * each for name, each in times.items()} for times in (hidden, exposed)
    )
    computing = work / (devices * chip.peak * chip.efficiency)
    times = {"computing": computing, **hidden, **exposed}
    seconds = max(computing, sum(hidden.values())) + sum(exposed.values())
    layout = replace(layout, memory=memory, flops=flops, seconds=seconds, times=times)
    if isinstance(stage, Policy):
        return _with_rollout(layout, stage, a, dtype_bytes, there)
    return layout


def _with_rollout(
    layout: StageLayout, stage: Policy, a: Architecture, dtype_bytes: int, there: Devices
) -> StageLayout:
    """Choose the mesh of the rollout, over the devices of the update, and add what it takes.

    Weights are whole in each group of devices that sample together, so that no turn gathers them;
    many small groups are faster than one large one, as long as they hold weights and cache.
    """
    count = math.prod(layout.mesh.values())
    found: list[StageLayout] = []
    for tensor in (n for n in (1, 2, 4, 8, 16) if count % n == 0 and a.heads % n == 0):
        decode = {"data": count // tensor, "tensor": tensor}
        if stage.decode_mesh is not None and decode != _decode_of(stage):
            continue
        slots = min(MOST_SLOTS * decode["data"], _slots(stage))
        local = -(-slots // decode["data"])
        cache = kv_bytes_per_token(a, dtype_bytes) * layout.length * local
        memory = {**layout.memory, "kv cache": cache // math.gcd(tensor, a.kv_heads)}
        stored = _held(a, dtype_bytes) // tensor
        if count > 1:
            memory["decoding"] = stored
        if a.storage not in ("nf4", "int8") and (there.chip.cache is not None or dtype_bytes < 4):
            # Copied ahead of the loop.
            own = dtype_bytes * parameter_count(a) // tensor
            memory["decoding"] = memory.get("decoding", 0) + own
        seconds = _rollout(a, layout.length, decode, stage, there, slots, dtype_bytes)
        times = {**layout.times, "rollout": seconds}
        found.append(
            replace(
                layout, memory=memory, slots=slots, decode=decode, times=times,
                seconds=layout.seconds + seconds,
            )
        )  # fmt: skip
    if not found:
        raise NoLayoutError("decode_mesh", f"it has to divide the {count} devices and the heads")
    fitting = [each for each in found if each.total <= there.chip.memory]
    if fitting:
        return min(fitting, key=lambda each: each.seconds)
    return min(found, key=lambda each: each.total)


def _decode_of(stage: Policy) -> dict[str, int]:
    assert stage.decode_mesh is not None
    return {"data": stage.decode_mesh.data, "tensor": stage.decode_mesh.tensor}


def _tokens(stage: Training, layout: StageLayout, local: int) -> tuple[int, int]:
    """Return the tokens of a micro-batch of `local` sequences, and those of a sequence that have
    logits. Completions that are trained on together share their prompt.
    """
    if not isinstance(stage, Policy):
        return local * layout.length, layout.length
    completion = min(stage.rollout.max_tokens, layout.length)
    prompts = local // math.gcd(stage.group, local)
    return prompts * (layout.length - completion) + local * completion, completion


def _held(a: Architecture, dtype_bytes: int) -> int:
    """Bytes of all parameters."""
    tables = a.vocabulary * a.width * (1 if a.tied else 2)
    per_table = _table_bytes(a, dtype_bytes)
    tables += expert_count(a)
    blocks = parameter_count(a) - tables
    adapters = sum(adapter_parameters(a, each) for each in a.adapters)
    return int(STORED_BYTES[a.storage] * blocks + per_table * tables + 4 * adapters)


def _table_bytes(a: Architecture, dtype_bytes: int) -> float:
    """Bytes of a parameter of what is not quantised: embeddings, experts."""
    return dtype_bytes if a.storage in ("nf4", "int8") else STORED_BYTES[a.storage]


def _slots(stage: Policy) -> int:
    return 1 << max(0, (stage.batch * stage.group - 1).bit_length())


def _activations(a: Architecture, layout: StageLayout, tokens: int, dtype_bytes: int) -> int:
    """Bytes that the backward pass finds kept, and the layer at work."""
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    mlp = a.mlp
    if a.experts is not None:  # the tokens of each expert, and what it makes of them
        mlp = a.experts.active * (a.experts.width + a.width)
    hidden = mlp * (3 if a.gated else 2)
    dots = queries + 2 * keys + 2 * a.width + hidden
    whole = dots + 6 * a.width + mlp
    # Kernels other than XLA's own never hold all logits.
    scores = 2 * a.heads * layout.length * 4 // dtype_bytes if layout.kernel == "xla" else 0
    layer = {"none": whole + scores, "dots": dots + a.width, "full": a.width}[layout.remat]
    return tokens * dtype_bytes * (a.layers * layer + whole + scores)


Times = dict[str, float]


def _exchanges(
    a: Architecture,
    layout: StageLayout,
    there: Devices,
    parameters: int,
    trained: int,
    tokens: int,
    dtype_bytes: int,
) -> tuple[Times, Times]:
    """Return the seconds of what devices exchange in an update: what can be hidden behind
    computing, and what cannot. `tokens` are those of a device.

    Gradients are summed over copies, parameters gathered for each pass of each micro-batch, and
    activations summed over the tensor axis, twice in a block for each pass.
    """
    mesh = layout.mesh
    tensor, fsdp, data = mesh["tensor"], mesh["fsdp"], mesh["data"]
    hidden: Times = {}
    exposed: Times = {}
    stride = tensor * mesh["expert"]
    if fsdp > 1:
        stored = min(dtype_bytes, STORED_BYTES[a.storage])
        moved = layout.micro_batches * (2 * stored * parameters + 4 * trained) / tensor
        name = "gathering parameters over `fsdp`"
        hidden[name] = moved * (fsdp - 1) / fsdp / there.bandwidth(fsdp, stride)
    if data > 1:
        moved = 2 * 4 * trained / (fsdp * tensor) * (data - 1) / data
        name = "summing gradients over `data`"
        hidden[name] = moved / there.bandwidth(data, stride * fsdp)
    if tensor > 1:
        passes = 3 if layout.remat == "full" else 2
        moved = passes * 2 * a.layers * tokens * a.width * dtype_bytes * 2 * (tensor - 1) / tensor
        exposed["summing activations over `tensor`"] = moved / there.bandwidth(tensor, 1)
    if mesh["expert"] > 1 and a.experts is not None:
        moved = 4 * a.layers * tokens * a.experts.active * a.width * dtype_bytes
        name = "sending tokens over `expert`"
        exposed[name] = moved / there.bandwidth(mesh["expert"], tensor)
    return hidden, exposed


def _rollout(
    a: Architecture,
    length: int,
    decode: dict[str, int],
    stage: Policy,
    there: Devices,
    slots: int,
    dtype_bytes: int,
) -> float:
    """Estimate the seconds of sampling: each turn reads the weights and half a full cache, or
    computes a token in every slot, whichever takes longer; and sums activations over `tensor`.
    """
    chip, tensor = there.chip, decode["tensor"]
    local = -(-slots // decode["data"])
    turns = -(-stage.batch * stage.group // slots) * stage.rollout.max_tokens
    computing = forward_flops(a, length) * local / (tensor * chip.peak * chip.efficiency)
    cache = kv_bytes_per_token(a, dtype_bytes) * length / 2 * local
    reading = (dtype_bytes * parameter_count(a) + cache) / tensor / chip.bandwidth
    turn = max(computing, reading)
    if tensor > 1:
        moved = 2 * a.layers * local * a.width * dtype_bytes * 2 * (tensor - 1) / tensor
        turn += moved / there.bandwidth(tensor, 1) + 2 * a.layers * _LATENCY
    return turns * turn


def plain(layout: StageLayout) -> dict[str, Any]:
    """Return the layout's own part as JSON; memory and cost stand apart in a plan."""
    return {
        "mesh": layout.mesh,
        "rows": layout.rows,
        "length": layout.length,
        "micro_batches": layout.micro_batches,
        "remat": layout.remat,
        "kernel": layout.kernel,
        "slots": layout.slots,
        "decode": layout.decode,
    }
