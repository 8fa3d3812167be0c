"""How a stage is laid out over devices: mesh, micro-batches, remat, slots; and what that takes.

Every legal mesh over the `data`, `fsdp` and `tensor` axes is looked at, and for each the fewest
micro-batches and the least rematerialisation that fit. What is left is ranked by a closed-form
estimate of the time of a step; ties go to the simpler layout. The memory model is a sum over named
parts; it ranks and prunes, and promises nothing for small models (see the tests).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from tunelang.compiler.hardware import Chip, Devices
from tunelang.dsl.vocabulary.stages import PAIRS, Compared, Policy, Ppo, Supervised, Training
from tunelang.dsl.vocabulary.training import AdamW, Lion, Muon, Sgd

CHUNK = 128
"""Tokens of a sequence whose logits are in memory at once."""
MOST_SLOTS = 256
EFFICIENCY = 0.5
"""The share of a chip's peak that a well laid out program reaches: for the estimate of time."""
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
    seconds: float = 0.0
    """Estimate for a step."""

    @property
    def total(self) -> int:
        """Bytes in each device."""
        return sum(self.memory.values())


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
    """Return the best layout of a training stage; `attention` is the kernel that its model wants,
    `teacher` what it is distilled from.

    Raises `DoesNotFitError` and `NoLayoutError`.
    """
    rows, length = _batch(stage, architecture)
    kernel = attention_kernel(attention, architecture, length, dtype_bytes, devices)
    pinned = tuple(
        name
        for name in ("mesh", "micro_batch", "remat")
        if getattr(stage, name) not in (None, "auto")
    )
    nearest: StageLayout | None = None
    best: tuple[tuple[float, int, int], StageLayout] | None = None
    experts = 1 if architecture.experts is None else architecture.experts.count
    for mesh in _meshes(stage, devices.count, experts):
        if rows % _shards(mesh) or any(
            size % mesh["tensor"] for size in (architecture.heads, architecture.mlp)
        ):
            continue
        if experts % mesh["expert"]:
            continue
        found = _fitting(
            stage, architecture, dtype_bytes, devices, mesh, rows, length, kernel, teacher
        )
        for layout, fits in found:
            if nearest is None or layout.total < nearest.total:
                nearest = layout
            if not fits:
                continue
            axes = sum(size > 1 for size in mesh.values())
            key = (round(layout.seconds, 12), axes, -mesh["data"])
            if best is None or key < best[0]:
                best = key, layout
            break
    if best is not None:
        return best[1]
    if nearest is None:
        size = math.prod(_mesh_of(stage).values()) if stage.mesh is not None else devices.count
        raise NoLayoutError(
            "mesh" if stage.mesh is not None else "batch",
            f"{rows} sequences do not divide over {size} devices",
        )
    raise DoesNotFitError(nearest, devices, pinned)


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
        _estimated(
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
            devices.chip,
            teacher,
        )
        for parts in counts
        for remat in remats
    ]
    for layout in sorted(layouts, key=lambda layout: layout.seconds):
        yield layout, layout.total <= devices.chip.memory


def _estimated(
    layout: StageLayout,
    stage: Training,
    a: Architecture,
    dtype_bytes: int,
    chip: Chip,
    teacher: Architecture | None,
) -> StageLayout:
    """Fill in memory, FLOPs and seconds."""
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
    slots = None
    if teacher is not None:
        work += forward_flops(teacher, layout.length) * step_tokens
        memory["teacher"] = 4 * parameter_count(teacher) // split
    if isinstance(stage, Compared) and stage.needs_reference:
        work += forward_flops(a, layout.length) * step_tokens
        live = getattr(stage, "reference_log_probs", "live") == "live"
        if live and (not a.adapters or stage.reference is not None):
            memory["reference"] = 4 * parameters // split
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
        flops, work = flops * updates, work * updates
        slots = min(MOST_SLOTS * shards, _slots(stage))
        kv = kv_bytes_per_token(a, dtype_bytes) * layout.length
        memory["kv cache"] = kv * slots // shards
        sampled = step_tokens * stage.minibatches
        flops += forward_flops(a, layout.length) * sampled
        work += 2 * forward_flops(a, layout.length) * sampled
        if isinstance(stage, Ppo):  # the values
            flops += forward_flops(a, layout.length) * sampled
            work += forward_flops(a, layout.length) * sampled
        quantised = a.storage in ("nf4", "int8")
        if not quantised and (
            chip.cache is not None or dtype_bytes < 4
        ):  # copied ahead of the loop
            memory["decoding"] = dtype_bytes * parameters // split
        if stage.kl is not None:
            if not a.adapters or stage.reference is not None:  # else the adapter's beginning
                memory["reference"] = 4 * parameters // split
            work += forward_flops(a, layout.length) * sampled
    seconds = work / (devices * chip.peak * EFFICIENCY)
    if devices > 1:
        seconds += _communication(a, layout, parameters, trained, tokens, dtype_bytes) / chip.link
    return replace(layout, memory=memory, flops=flops, seconds=seconds, slots=slots)


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


def _communication(
    a: Architecture,
    layout: StageLayout,
    parameters: int,
    trained: int,
    tokens: int,
    dtype_bytes: int,
) -> float:
    """Bytes that each device exchanges in a step: gradients summed over copies, parameters gathered
    for each pass, activations summed over the tensor axis.
    """
    data, fsdp, tensor = (layout.mesh[name] for name in ("data", "fsdp", "tensor"))
    total = 0.0
    if data > 1:
        total += 2 * 4 * trained / (fsdp * tensor) * (data - 1) / data
    if fsdp > 1:
        gathered = 2 * min(dtype_bytes, STORED_BYTES[a.storage]) * layout.micro_batches * parameters
        total += (gathered + 4 * trained) / tensor * (fsdp - 1) / fsdp
    if tensor > 1:
        total += 8 * a.layers * tokens * a.width * dtype_bytes * (tensor - 1) / tensor
    return total


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
    }
