"""What a layout of a stage takes: memory by parts, FLOPs, and seconds by what they are spent on.

Closed forms over counts: they rank layouts and leave out what cannot be. Whether one fits is for
the compiler to say (`tune plan --compile`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from tunelang.compiler.layout.hardware import Chip, Devices
from tunelang.compiler.layout.layout_query import Judge, LayoutQuery, NoLayoutError
from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout, held, shards_of
from tunelang.compiler.models.adapters import STORED_BYTES, adapter_parameters, off_width
from tunelang.compiler.models.architecture import (
    Architecture,
    expert_count,
    forward_flops,
    kv_bytes_per_token,
    matmul_parameters,
    parameter_count,
    train_flops,
    trained_count,
)
from tunelang.dsl.vocabulary.stages import Compared, Policy, Ppo, Training
from tunelang.dsl.vocabulary.training import AdamW, Lion, Muon, Sgd

MOST_SLOTS = 256
"""Completions that a group of devices samples at once, at most."""
VERDICT = 256
"""Tokens of what a judge says, at most."""
VERDICTS = 64
"""Completions that a judge looks at at once, on each group of devices that has it."""
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
_IN_TRANSIT = 2
"""Arrays whose moments are in a device at once, where they are offloaded."""
_LAID_OUT_ANEW = frozenset({"tpu7x"})
"""Chips for which XLA tiles frozen arrays in bfloat16 anew: it copies those of all layers ahead of
them, and the head as it is gathered."""
_LANES = 128
"""Numbers that TPUs pad the last axis of an array to, such as that of a narrow attention head. A
table whose part in a device is not a multiple of it along the width is transposed as it is
gathered: a frozen one is there twice."""
_CACHE_MISSES = 1.15
"""Factor of the time of an update whose activations do not stay in a CPU's cache (measured)."""


FACTORS = {
    "gpu": {
        "width": 8.85, "hidden": 0.69, "block": 0.61, "later": 1.42,
        "lora width": 8.05, "lora hidden": 1.57, "lora block": 1.02, "lora later": 0.1,
        "qlora width": 6.25, "qlora hidden": 1.52, "qlora block": 1.13, "qlora later": 0.33,
        "geglu": 1.63, "heads": 2.57, "scores": 3.38, "mask": 1.84,
        "logits": 1.79, "frozen logits": 1.76, "states": 1.31, "head": 1.39,
        "slope": 1.13, "summed slope": 1.23,
    },
    "tpu": {
        "width": 5.64, "hidden": 1.52, "block": 0.72, "later": 0.13,
        "lora width": 7.13, "lora hidden": 1.53, "lora block": 1.13, "lora later": 0.07,
        "qlora width": 7.48, "qlora hidden": 1.63, "qlora block": 0.73, "qlora later": 0.04,
        "geglu on v5e": 1.25, "heads": 2.5, "scores": 4.5, "mask": 0.5, "cast": 0.87, "vmem": 0.36,
        "logits": 1.16, "frozen logits": 0.55, "states": 1.19, "head": 1.04,
        "slope": 0.84, "summed slope": 1.11, "narrow table": 0.68,
    },
    "cpu": {
        "width": 8.0, "hidden": 3.0, "block": 2.0, "later": 1.0,
        "lora width": 8.0, "lora hidden": 3.5, "lora block": 2.0, "lora later": 1.0,
        "qlora width": 8.0, "qlora hidden": 3.0, "qlora block": 2.0, "qlora later": 1.0,
        "heads": 3.0, "scores": 4.5, "mask": 0.5,
        "logits": 3.0, "frozen logits": 3.0, "states": 2.0, "head": 1.0,
        "slope": 1.0, "summed slope": 1.0,
    },
}  # fmt: skip
"""How often parts are there at the peak, by compiler: what a layer works with in the backward pass,
its matrices as they come over the mesh or out of storage, and what is left of the head by then,
each for weights that are trained, for frozen ones (`lora`) and for quantised ones (`qlora`); how
much more of the hidden units there is with an activation on a chip; casts of what is trained; what
of a TPU core's vector memory is used for it; logits, of a head that is trained and of a frozen one;
the head as the activations have it, its gradient (`slope`), also where gradients of parts are
summed, and a trained table that is transposed. Those of GPUs and TPUs are fitted to what the
compilers say (`benchmarks/plan_accuracy.py --fit`); those of CPUs only rank. What layers keep for
the backward pass needs none: it was counted in the compiled programs."""


@dataclass(frozen=True)
class _Sizes:
    """Counts of a model that its layouts share."""

    parameters: int
    trained: int
    experts: int
    """Numbers in the matrices of experts."""
    largest: int
    """Numbers in the largest array that is updated at once, see `optimizers._streamed`."""
    held: int
    """Bytes of all parameters."""
    table_bytes: float
    """Bytes of a number of the tables."""
    forward: float
    """FLOPs of a token's forward pass."""
    train: float
    cache: int
    """Bytes of a token in the KV cache."""
    narrow: bool
    """Whether activations have two bytes."""


@lru_cache(maxsize=256)
def _sizes(a: Architecture, dtype_bytes: int, length: int) -> _Sizes:
    return _Sizes(
        parameter_count(a),
        trained_count(a),
        expert_count(a),
        _largest(a),
        _held(a, dtype_bytes),
        _table_bytes(a, dtype_bytes),
        forward_flops(a, length),
        train_flops(a, length),
        kv_bytes_per_token(a, dtype_bytes),
        dtype_bytes == 2,
    )


def estimated(layout: StageLayout, query: LayoutQuery) -> StageLayout:
    """Fill in what a layout of a stage takes: memory, FLOPs, seconds."""
    stage, a, dtype_bytes = query.stage, query.architecture, query.dtype_bytes
    there, teacher, judges = query.devices, query.teacher, query.judges
    chip = there.chip
    sizes = _sizes(a, dtype_bytes, layout.length)
    devices = math.prod(layout.mesh.values())
    tensor = layout.mesh["tensor"]
    context = layout.mesh["context"]
    split = layout.mesh["fsdp"] * context * tensor
    # As if there were fewer experts, where they are split.
    elsewhere = sizes.experts - sizes.experts // layout.mesh["expert"]
    alone = sizes.parameters - elsewhere
    own = sizes.trained - (0 if a.adapters else elsewhere)
    # What is trained, each branch has of its own; of what is frozen there is one.
    branches = layout.branches
    parameters, trained = alone + (branches - 1) * own, branches * own
    # Of a pair of matrices only one is along a width.
    whole = branches * off_width(a, a.adapters[-1]) if a.adapters else 0
    here = (trained - whole) // split + whole // tensor
    stored = sizes.held - int(sizes.table_bytes * elsewhere) + (branches - 1) * 4 * own
    moments = _MOMENTS[type(stage.optimizer)]
    shards = shards_of(layout.mesh)
    local = layout.rows // shards // layout.micro_batches
    micro, scored = (count // context for count in _tokens(stage, layout, local))
    tokens = micro * layout.micro_batches
    brought = 0  # over the link to the host, in each direction
    if "optimizer" in layout.offload:
        brought = 4 * moments * here
        kept = {"moments in transit": _IN_TRANSIT * 4 * moments * sizes.largest // split}
    else:
        kept = {"optimizer": 4 * moments * here}
    memory = {
        "parameters": (stored - 4 * whole) // split + 4 * whole // tensor,
        **kept,
        "gradients": 4 * here,
        **_temporaries(a, sizes, layout, chip, micro, local, scored),
    }
    if copied := _copied(a, sizes, layout, chip, here):
        memory["copies of weights"] = copied
    gradients = 1
    if layout.micro_batches > 1:
        gradients = 2
        memory["summed gradients"] = memory["gradients"]
    step_tokens = tokens * shards * context
    flops = branches * sizes.train * step_tokens
    costs = _REMAT_COST if chip.cache is None else _REMAT_COST_CPU
    work = sizes.forward * step_tokens * costs[layout.remat]
    work *= branches * sizes.train / (3 * sizes.forward)
    if context > 1:  # who has the last tokens of sequences attends to all the others
        attention = 1 - 2 * matmul_parameters(a) / sizes.forward
        work *= 1 + attention * (1 - 1 / context)
    work *= 1 + _MICRO_OVERHEAD * (layout.micro_batches - 1)
    if chip.cache is not None and memory["activations"] > chip.cache:
        work *= _CACHE_MISSES
    if teacher is not None:
        work += forward_flops(teacher, layout.length) * step_tokens
        memory["teacher"] = 4 * parameter_count(teacher) // split
    if isinstance(stage, Compared) and stage.needs_reference:
        work += sizes.forward * step_tokens
        live = getattr(stage, "reference_log_probs", "live") == "live"
        if live and (not a.adapters or stage.reference is not None):
            memory["reference"] = 4 * alone // split
    updates = 1
    if isinstance(stage, Policy):
        compared = stage.advantage != "gae" and not stage.refill
        if compared and stage.minibatches == 1:  # see `policy_step.useful_first`
            parts = layout.micro_batches
            work *= math.ceil((1 - _FLAT) * parts) / parts
        if isinstance(stage, Ppo) and stage.critic.trunk == "separate":
            # Two decoders are trained; the second is taken to be as large as the first.
            flops, work = 2 * flops, 2 * work
            its = trained_count(replace(a, scores=True)) - (0 if a.adapters else elsewhere)
            its_moments = _MOMENTS[type(stage.critic.optimizer)]
            if "optimizer" in layout.offload:
                brought += 4 * its_moments * its // split
                its_moments = 0
            each = 1 + its_moments + gradients
            below = stored if a.adapters and stage.value_model is not None else 0
            memory["critic"] = (4 * each * its + below) // split
        updates = stage.minibatches * stage.passes
        sampled = step_tokens * stage.minibatches
        flops = flops * updates + sizes.forward * sampled
        # The passes that only score: the policy itself before its first update, values, reference.
        scored_by = (updates > 1) + isinstance(stage, Ppo) + (stage.kl is not None)
        flops += isinstance(stage, Ppo) * sizes.forward * sampled
        work = work * updates + scored_by * sizes.forward * sampled
        if has_reference(stage, a):
            offloaded = "reference" in layout.offload
            memory["reference in transit" if offloaded else "reference"] = 4 * alone // split
    hidden, exposed = _exchanges(
        a, layout, there, parameters, trained, branches * tokens, dtype_bytes
    )
    if brought:
        exposed["bringing moments from the host, and back"] = 2 * brought / chip.host
    hidden, exposed = (
        {name: updates * each for name, each in times.items()} for times in (hidden, exposed)
    )
    computing = work / (devices * chip.peak * chip.efficiency)
    if "reference in transit" in memory:
        exposed["bringing the reference"] = memory["reference in transit"] / chip.host
    times = {"computing": computing, **hidden, **exposed}
    seconds = max(computing, sum(hidden.values())) + sum(exposed.values())
    layout = replace(layout, memory=memory, flops=flops, seconds=seconds, times=times)
    if isinstance(stage, Policy):
        layout = _with_judges(layout, stage, judges, there)
        return _with_rollout(layout, stage, a, sizes, dtype_bytes, there)
    return layout


def _with_judges(
    layout: StageLayout, stage: Policy, judges: tuple[Judge, ...], there: Devices
) -> StageLayout:
    """Add what the local models of a stage's reward take; they judge one after another."""
    if not judges:
        return layout
    count, chip = stage.batch * stage.group, there.chip
    devices = math.prod(layout.mesh.values())
    held = most = 0
    seconds = 0.0
    for each in judges:
        a, width = each.architecture, each.dtype_bytes
        # What is judged is in its prompt.
        length = min(a.context, layout.length + VERDICT if each.speaks else layout.length)
        sizes = _sizes(a, width, length)
        tensor = sampling_tensor(a, width, devices, chip.memory)
        held += sizes.held // tensor
        seconds += count * length * sizes.forward / (devices * chip.peak * chip.efficiency)
        copied = width * sizes.parameters // tensor
        if each.speaks:
            asked = _Asked(count, VERDICT, None, None, None)
            groups = devices // tensor
            local = min(VERDICTS, -(-count // groups))
            slots = local * groups
            seconds += _sampling(a, sizes, length, tensor, local, asked, slots, there, width)
            copied += sizes.cache * length * local // _key_shards(a, tensor)
        most = max(most, copied)
    memory = layout.memory | {"judges": held, "judging": most}
    times = {**layout.times, "judging": seconds}
    return replace(layout, memory=memory, times=times, seconds=layout.seconds + seconds)


def has_reference(stage: Training, a: Architecture) -> bool:
    """Whether a stage with rollouts holds the parameters of a reference: where an adapter is
    trained, the model without it is one.
    """
    own = not a.adapters or getattr(stage, "reference", None) is not None
    return isinstance(stage, Policy) and stage.kl is not None and own


def sampling_tensor(a: Architecture, dtype_bytes: int, count: int, memory: int) -> int:
    """Return into how many parts matrices are split where `count` devices sample for an evaluation:
    the fewest with which the weights, and those that are copied ahead of the loop, take a quarter
    of a device's memory at most; else the most there can be.
    """
    ways = [n for n in (1, 2, 4, 8, 16) if count % n == 0 and a.heads % n == 0]
    size = _held(a, dtype_bytes) + dtype_bytes * parameter_count(a)
    return next((n for n in ways if size <= n * memory // 4), ways[-1])


def _temporaries(
    a: Architecture,
    sizes: _Sizes,
    layout: StageLayout,
    chip: Chip,
    tokens: int,
    local: int,
    scored: int,
) -> dict[str, int]:
    """Return the bytes in a device of what an update makes and lets go again.

    `tokens` are those of a micro-batch in a device, of `local` sequences with `scored` positions
    that have logits.
    """
    tokens, local = layout.branches * tokens, layout.branches * local
    copies = 1 if a.adapters else layout.branches
    dtype, tensor = 2 if sizes.narrow else 4, layout.mesh["tensor"]
    quantised = a.storage in ("nf4", "int8")
    form = "qlora " if quantised else "lora " if a.adapters else ""
    factors = FACTORS[chip.platform]
    table = a.vocabulary * a.width
    block = (sizes.parameters - table * (1 if a.tied else 2)) / a.layers
    queries = a.heads * a.head_dim / tensor
    keys = a.kv_heads * a.head_dim / _key_shards(a, tensor)
    mlp: float = a.mlp / tensor
    if a.experts is not None:  # the tokens of each expert, and what it makes of them
        mlp = a.experts.active * (a.experts.width / tensor + a.width)
    keys *= layout.mesh["context"]  # gathered
    heads, hidden = queries + 2 * keys, mlp * (2 if a.gated else 1)
    norms = 6 if a.norm_placement == "both" else 4  # what goes into each, and comes out
    # Queries, keys, values and what they attend to, as attention has them.
    lanes = max(1.0, _LANES / a.head_dim) if chip.platform == "tpu" else 1.0
    attended = 2 * (queries + keys) * lanes
    if chip.platform == "tpu":  # what they attend to is transposed for the product that follows
        attended += queries
    if a.qk_norm:
        attended += queries + keys
    if a.rope_local_base is not None:  # sines and cosines, float32, differ by layer
        attended += 2 * a.head_dim
    kept: float = {
        "full": a.width,
        # A norm behind a product needs it in the backward pass.
        "dots": heads + (2 if a.norm_placement == "pre" else 3) * a.width + hidden,
        "none": norms * a.width + attended + hidden + mlp,
    }[layout.remat]
    if layout.remat == "dots" and quantised:
        kept = a.width  # products with what is quantised are computed again
    if layout.remat != "full":  # what the first of each pair of matrices makes
        kept += sum(each.rank * len(each.matrices) for each in a.adapters)
    scores = 0.0
    if layout.kernel == "xla":  # the only one that holds all logits of attention
        scores = a.heads / tensor * layout.length
    if layout.remat == "none":
        kept += 3 * scores  # logits, float32, and what they come to
    # What is between its products differs by activation.
    more = factors.get(f"{a.activation} on {chip.name}", factors.get(a.activation, 1.0))
    at_work = (
        factors[form + "width"] * a.width
        + factors["heads"] * heads * lanes
        + factors[form + "hidden"] * hidden * more
        + factors["scores"] * scores
        + (factors["mask"] * layout.length if layout.kernel == "cudnn" else 0)
    )
    ways = layout.mesh["fsdp"] * layout.mesh["context"]
    layers = tokens * dtype * a.layers * kept
    # A block as it comes over the mesh, or out of storage.
    working = tokens * dtype * at_work
    if ways > 1 or quantised:
        working += factors[form + "block"] * dtype * copies * block / tensor
    # The head as the activations have it, and its whole gradient: over devices it is summed last,
    # and while that lasts it is there in their dtype.
    head = slope = 0.0
    if ways > 1 or (sizes.narrow and sizes.table_bytes > dtype):
        head = copies * table * dtype / tensor
    if not a.adapters:
        slope = 4 * copies * table / tensor
    anew = 0.0
    narrow = chip.platform == "tpu" and ways > 1 and a.width // ways % _LANES > 0
    if _anew(a, sizes, chip) or (narrow and a.adapters):
        anew = table * dtype / tensor
    elif narrow:
        anew = factors["narrow table"] * table * dtype / tensor
    logits = factors["frozen logits" if a.adapters else "logits"]
    loss = logits * 4 * local * min(CHUNK, scored) * a.vocabulary / tensor
    loss += factors["states"] * tokens * dtype * a.width + anew
    parts = "summed slope" if layout.micro_batches > 1 else "slope"
    loss += factors["head"] * head + factors[parts] * slope
    if ways * layout.mesh["data"] > 1:
        working += factors[form + "later"] * head
    if chip.vmem:  # what is small and soon used is not in the memory; the logits mostly are
        working = max(0.0, working - factors["vmem"] * chip.vmem)
        loss = max(0.0, loss - factors["vmem"] * chip.vmem / 2)
    return {"activations": int(layers), "loss": int(loss), "backward": int(working)}


def _copied(a: Architecture, sizes: _Sizes, layout: StageLayout, chip: Chip, trained: int) -> int:
    """Return the bytes in a device of the weights that XLA copies ahead of the layers, of which
    `trained` numbers are trained.
    """
    mesh = layout.mesh
    split = mesh["fsdp"] * mesh["context"] * mesh["tensor"]
    copied = 0.0
    if chip.platform == "tpu" and sizes.narrow:
        tables = 0 if a.adapters else layout.branches * _tables(a)
        copied += FACTORS["tpu"]["cast"] * 2 * (trained - tables / split)
    if _anew(a, sizes, chip) and a.storage == "bf16":
        copied += (sizes.held - 2 * _tables(a)) / split
        if a.head_dim == _LANES:  # their tiles are those of queries, keys and values already
            heads = a.heads + 2 * a.kv_heads
            copied -= 2 * a.layers * a.width * heads * a.head_dim / split
    if chip.platform == "gpu" and a.adapters and a.storage == "bf16" and split > mesh["tensor"]:
        # What is split along its last axis is transposed: what writes to the residual stream.
        down = a.layers * a.mlp * a.width if a.experts is None else sizes.experts / 3
        copied += 2 * (a.layers * a.heads * a.head_dim * a.width + down) / split
    return int(copied)


def _anew(a: Architecture, sizes: _Sizes, chip: Chip) -> bool:
    """Whether XLA tiles anew what is frozen and not quantised."""
    return bool(a.adapters) and sizes.table_bytes == 2 and chip.name in _LAID_OUT_ANEW


def _key_shards(a: Architecture, tensor: int) -> int:
    """Return how many parts keys and values are split into: where heads do not divide, they have
    copies.
    """
    return tensor if a.kv_heads % tensor == 0 else 1


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
    per_table = _table_bytes(a, dtype_bytes)
    tables = _tables(a) + expert_count(a)
    blocks = parameter_count(a) - tables
    adapters = sum(adapter_parameters(a, each) for each in a.adapters)
    return int(STORED_BYTES[a.storage] * blocks + per_table * tables + 4 * adapters)


def _tables(a: Architecture) -> int:
    """Count the numbers of the embedding, and of a head of its own."""
    return a.vocabulary * a.width * (1 if a.tied else 2)


def _largest(a: Architecture) -> int:
    """Count the numbers of the largest array, those of each layer by themselves."""
    if a.experts is not None:
        return max(a.vocabulary * a.width, expert_count(a) // a.layers // 3)
    return max(a.vocabulary, a.mlp, a.heads * a.head_dim) * a.width


def _table_bytes(a: Architecture, dtype_bytes: int) -> float:
    """Bytes of a parameter of what is not quantised: embeddings, experts."""
    return dtype_bytes if a.storage in ("nf4", "int8") else STORED_BYTES[a.storage]


class _Asked(NamedTuple):
    """What a stage asks of its rollout."""

    completions: int
    max_tokens: int
    tensor: int | None
    """As the spec pins it, and what follows."""
    data: int | None
    slots: int | None


class _Rollout(NamedTuple):
    """How completions are sampled."""

    decode: dict[str, int]
    slots: int
    memory: dict[str, int]
    seconds: float


def _with_rollout(
    layout: StageLayout,
    stage: Policy,
    a: Architecture,
    sizes: _Sizes,
    dtype_bytes: int,
    there: Devices,
) -> StageLayout:
    """Choose the mesh of the rollout, over the devices of the update, and add what it takes."""
    pinned = stage.decode_mesh
    asked = _Asked(
        stage.batch * stage.group,
        stage.rollout.max_tokens,
        None if pinned is None else pinned.tensor,
        None if pinned is None else pinned.data,
        stage.slots,
    )
    count = math.prod(layout.mesh.values())
    free = there.chip.memory - held(layout.memory)
    found = _best_rollout(a, sizes, dtype_bytes, there, asked, layout.length, count, free)
    if found is None:
        raise NoLayoutError("decode_mesh", f"it has to divide the {count} devices and the heads")
    return replace(
        layout,
        memory=layout.memory | found.memory,
        slots=found.slots,
        decode=found.decode,
        times={**layout.times, "rollout": found.seconds},
        seconds=layout.seconds + found.seconds,
    )


@lru_cache(maxsize=4096)
def _best_rollout(
    a: Architecture,
    sizes: _Sizes,
    dtype_bytes: int,
    there: Devices,
    asked: _Asked,
    length: int,
    count: int,
    free: int,
) -> _Rollout | None:
    """Return the fastest rollout on `count` devices with `free` bytes each, or the smallest: into
    groups of how many devices they are split, and how many completions are sampled at once.

    Weights are whole in each group of devices that sample together, so that no turn gathers them;
    many small groups are faster than one large one, as long as they hold weights and cache.
    """
    found: list[_Rollout] = []
    for tensor in (n for n in (1, 2, 4, 8, 16) if count % n == 0 and a.heads % n == 0):
        decode = {"data": count // tensor, "tensor": tensor}
        if asked.tensor is not None and decode != {"data": asked.data, "tensor": asked.tensor}:
            continue
        weights = sizes.held // tensor if count > 1 else 0
        if a.storage not in ("nf4", "int8") and (there.chip.cache is not None or dtype_bytes < 4):
            weights += dtype_bytes * sizes.parameters // tensor  # copied ahead of the loop
        slots = min(MOST_SLOTS * decode["data"], 1 << (asked.completions - 1).bit_length())
        slots = asked.slots or slots
        while True:  # more at once are faster, as long as there is room for them
            local = -(-slots // decode["data"])
            cache = sizes.cache * length * local
            memory = {"kv cache": cache // _key_shards(a, tensor)}
            if weights:
                memory["decoding"] = weights
            if sum(memory.values()) <= free or asked.slots or slots <= decode["data"]:
                break
            slots //= 2
        seconds = _sampling(a, sizes, length, tensor, local, asked, slots, there, dtype_bytes)
        found.append(_Rollout(decode, slots, memory, seconds))
    fitting = [each for each in found if sum(each.memory.values()) <= free]
    if fitting:
        return min(fitting, key=lambda each: each.seconds)
    return min(found, key=lambda each: sum(each.memory.values()), default=None)


def _sampling(
    a: Architecture,
    sizes: _Sizes,
    length: int,
    tensor: int,
    local: int,
    asked: _Asked,
    slots: int,
    there: Devices,
    dtype_bytes: int,
) -> float:
    """Estimate the seconds of sampling with `local` slots in a group of `tensor` devices: each turn
    reads the weights and half a full cache, or computes a token in every slot, whichever takes
    longer; and sums activations over the group.
    """
    chip = there.chip
    turns = -(-asked.completions // slots) * asked.max_tokens
    computing = sizes.forward * local / (tensor * chip.peak * chip.efficiency)
    cache = sizes.cache * length / 2 * local
    reading = dtype_bytes * sizes.parameters / tensor + cache / _key_shards(a, tensor)
    reading /= chip.bandwidth
    turn = max(computing, reading)
    if tensor > 1:
        moved = 2 * a.layers * local * a.width * dtype_bytes * 2 * (tensor - 1) / tensor
        turn += moved / there.bandwidth(tensor, 1) + 2 * a.layers * _LATENCY
    return turns * turn


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
    computing, and what cannot. `tokens` are those of a device, of all branches.

    Gradients are summed over copies, parameters gathered for each pass of each micro-batch, and
    activations summed over the tensor axis, twice in a block for each pass.
    """
    mesh = layout.mesh
    tensor, data, context = mesh["tensor"], mesh["data"], mesh["context"]
    fsdp = mesh["fsdp"] * context  # parameters are split over both
    hidden: Times = {}
    exposed: Times = {}
    stride = tensor * mesh["expert"]
    if fsdp > 1:
        # The head for one pass only; the embedding never is, see `Decoder._embed`.
        copies = 1 if a.adapters else layout.branches
        gathered = parameters - copies * a.vocabulary * a.width * (0.5 if a.tied else 1.5)
        moved = layout.micro_batches * (2 * dtype_bytes * gathered + 4 * trained) / tensor
        name = "gathering parameters over `fsdp`"
        hidden[name] = moved * (fsdp - 1) / fsdp / there.bandwidth(fsdp, stride)
    if data > 1:
        moved = 2 * 4 * trained / (fsdp * tensor) * (data - 1) / data
        name = "summing gradients over `data`"
        hidden[name] = moved / there.bandwidth(data, stride * fsdp)
    passes = 3 if layout.remat == "full" else 2
    if tensor > 1:
        moved = passes * 2 * a.layers * tokens * a.width * dtype_bytes * 2 * (tensor - 1) / tensor
        exposed["summing activations over `tensor`"] = moved / there.bandwidth(tensor, 1)
    if context > 1:
        keys = 2 * a.kv_heads * a.head_dim / _key_shards(a, tensor)
        moved = passes * a.layers * tokens * (context - 1) * keys * dtype_bytes
        exposed["gathering keys over `context`"] = moved / there.bandwidth(context, tensor)
    if mesh["expert"] > 1 and a.experts is not None:
        moved = 4 * a.layers * tokens * a.experts.active * a.width * dtype_bytes
        name = "sending tokens over `expert`"
        exposed[name] = moved / there.bandwidth(mesh["expert"], tensor)
    return hidden, exposed
