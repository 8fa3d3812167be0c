"""The search for a layout: every legal mesh, and for each the fewest micro-batches and the least
rematerialisation that fit. What is left is ranked by the estimate of a step's time; ties go to the
simpler layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, replace
from typing import Any, Literal, cast

from tunelang.compiler.costs.step_costs import estimated, has_reference
from tunelang.compiler.layout.hardware import Chip
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery, NoLayoutError
from tunelang.compiler.layout.stage_layout import (
    OFFLOADS,
    Kernel,
    Remat,
    StageLayout,
    shards_of,
)
from tunelang.compiler.models.adapters import Storage, adapted
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.vocabulary.stages import PAIRS, Policy, Supervised, Training
from tunelang.dsl.vocabulary.training import Lora

MARGIN = 0.9
"""Share of the memory that a plan may take by the estimate, which can be too low."""
AXES = ("data", "fsdp", "expert", "context", "tensor")
SPLASH_UNIT = 128
"""Tokens that the kernel for TPUs works on at once, at least."""
SHORTEST = 1024
"""Tokens of a part of a sequence, at least, where the plan decides to split sequences."""
_LEAST_REMAT = 0.7
"""How much less a layout may have to compute than another one, at least."""
REPORTED_LAYOUTS = 4
"""Layouts listed in a plan, best first."""
_LEAST_SKIPPED = 0.7
"""What is left at least of the time of an update whose parts are skipped where nothing counts."""
_PINS = {
    "mesh": None, "micro_batch": None, "remat": "auto", "offload": "auto", "decode_mesh": None,
    "slots": None,
}  # fmt: skip
"""Attributes that decide a part of the layout, and what leaves it to the plan."""
_FURTHER = 4
"""Numbers of micro-batches to look at beyond the fewest that fit: more may be faster, where some
of them can be skipped or stay in a cache."""


def best_layout(query: LayoutQuery) -> StageLayout:
    """Return the best layout of a training stage; see `rank_layouts`."""
    return rank_layouts(query)[0]


def rank_layouts(query: LayoutQuery) -> list[StageLayout]:
    """Return the layouts of a training stage that fit, best first: for each mesh the fastest one,
    and of equally fast ones the simpler first. Where nothing fits, the optimizer or the reference
    go to the host, but not those of several branches.

    Raises `DoesNotFitError` and `NoLayoutError`.
    """
    nearest: DoesNotFitError | None = None
    for offload in _offloads(query) if query.branches == 1 else ((),):
        try:
            return _ranked(query, offload)
        except DoesNotFitError as error:
            if nearest is None or error.nearest.total < nearest.nearest.total:
                nearest = error
    assert nearest is not None
    raise nearest


def _offloads(query: LayoutQuery) -> Iterator[tuple[str, ...]]:
    """Give what may go to the host, in the order in which it is tried.

    Raises `NoLayoutError` where a reference is to go that the stage does not hold.
    """
    stage, architecture = query.stage, query.architecture
    waits = has_reference(stage, architecture)
    match stage.offload:
        case "auto" if query.devices.chip.platform == "cpu":
            yield ()  # it is the same memory
        case "auto":
            # The moments of an adapter are few.
            unused = {"optimizer"} if architecture.adapters else set()
            unused |= set() if waits else {"reference"}
            yield from (each for each in OFFLOADS if unused.isdisjoint(each))
        case "none":
            yield ()
        case "optimizer":
            yield ("optimizer",)
        case which if waits:
            yield ("reference",) if which == "reference" else ("optimizer", "reference")
        case _:
            raise NoLayoutError("offload", "the stage holds no reference that could wait there")


def _ranked(query: LayoutQuery, offload: tuple[str, ...]) -> list[StageLayout]:
    stage, architecture, devices = query.stage, query.architecture, query.devices
    rows, length = _batch(stage, architecture)
    kernel = attention_kernel(
        query.attention, architecture, length, query.dtype_bytes, devices.chip.platform
    )
    if isinstance(stage, Policy):
        kernel = "xla"  # completions attend to a prompt of any length that they share
    unit = SPLASH_UNIT if kernel == "splash" else 1
    nearest: StageLayout | None = None
    best: StageLayout | None = None
    undivided = 0
    found: list[tuple[tuple[float, int, int], StageLayout]] = []

    def filled(layout: StageLayout) -> StageLayout:
        return estimated(layout, query)

    experts = 1 if architecture.experts is None else architecture.experts.count
    for mesh in _meshes(stage, devices.count, experts, length // SHORTEST):
        used = math.prod(mesh.values())
        if best is not None:
            # Fewer devices may be faster, where what they exchange takes longer than computing.
            whole = best.times["computing"] * math.prod(best.mesh.values())
            if _LEAST_REMAT * whole >= used * (best.seconds - best.times.get("rollout", 0.0)):
                break
            # To split sequences costs more than to split the batch, where that can be.
            if mesh["context"] > 1 and rows >= used:
                continue
        if rows % shards_of(mesh) or any(
            size % mesh["tensor"] for size in (architecture.heads, architecture.mlp)
        ):
            continue
        if experts % mesh["expert"] or length % (mesh["context"] * unit):
            continue
        local = rows // shards_of(mesh)
        if stage.micro_batch is not None and local % stage.micro_batch:
            undivided = min(undivided or local, local)
            continue
        plain = StageLayout(
            mesh=mesh, rows=rows, length=length, micro_batches=1, remat="none", kernel=kernel,
            offload=offload, slots=None, branches=query.branches,
        )  # fmt: skip
        fastest = sorted(each.seconds for _, each in found)[:REPORTED_LAYOUTS]
        cutoff = fastest[-1] if len(fastest) == REPORTED_LAYOUTS else math.inf
        layout, fits = _fitting(plain, stage, devices.chip, filled, cutoff)
        if nearest is None or layout.total < nearest.total:
            nearest = layout
        if fits:
            if best is None or layout.seconds < best.seconds:
                best = layout
            axes = sum(size > 1 for size in mesh.values())
            found.append(((float(f"{layout.seconds:.6g}"), axes, -mesh["data"]), layout))
    if found:
        return [layout for _, layout in sorted(found, key=lambda each: each[0])]
    if nearest is None:
        if stage.mesh is not None and length % (stage.mesh.context * unit):
            multiples = "" if unit == 1 else f" that are multiples of {unit}"
            raise NoLayoutError(
                "mesh",
                f"{length} tokens do not divide into {stage.mesh.context} parts{multiples}",
            )
        if undivided:
            raise NoLayoutError(
                "micro_batch",
                f"{stage.micro_batch} do not divide the {undivided} sequences of a device",
            )
        size = math.prod(_mesh_of(stage).values()) if stage.mesh is not None else devices.count
        raise NoLayoutError(
            "mesh" if stage.mesh is not None else "batch",
            f"{rows} sequences do not divide over {size} devices",
        )
    raise DoesNotFitError(query, nearest, pins(stage))


def remedies(query: LayoutQuery) -> Iterator[tuple[str, int]]:
    """Give what would make a stage fit that does not, each by itself and as little of it as will
    do, and the bytes that a device would then need by the estimate.
    """
    for changes in _changes(query):
        least: tuple[str, int] | None = None
        for change, changed in reversed(changes):
            try:
                least = change, best_layout(changed).total
            except NoLayoutError:
                continue
            except DoesNotFitError:  # then nothing less does
                break
        if least is not None:
            yield least


def _changes(query: LayoutQuery) -> Iterator[list[tuple[str, LayoutQuery]]]:
    """Give kinds of changes to a stage that may make it fit; of each the smallest first."""
    stage, a, devices = query.stage, query.architecture, query.devices
    if query.branches > 1:
        yield [("`sweep = in_turn`", replace(query, branches=1))]
        return
    if pinned := pins(stage):
        names = ", ".join(f"`{name}`" for name in pinned)
        yield [(f"{names} left to the plan", replace(query, stage=unpinned(stage)))]
    by = (2, 4, 8, 16)
    batch: Any = stage.batch  # type: ignore[attr-defined]
    unit, count = getattr(batch, "unit", "prompts"), int(getattr(batch, "value", batch))
    smaller: list[tuple[str, LayoutQuery]] = []
    for less in (count // part for part in by if count % part == 0):
        given = less if isinstance(batch, int) else batch.model_copy(update={"value": less})
        changed = stage.model_copy(update={"batch": given})
        smaller.append((f"`batch = {less} {unit}`", replace(query, stage=changed)))
    yield smaller
    if devices.chip.platform != "cpu":  # those that are simulated share a memory
        several = (replace(devices, count=times * devices.count) for times in by)
        yield [(str(more), replace(query, devices=more)) for more in several]
    if not a.adapters:
        plain: Storage = "bf16" if query.dtype_bytes == 2 else "f32"
        lora, adapter = "`adapter = lora()`", (Lora.unvalidated(),)
        yield [
            (lora, replace(query, architecture=adapted(a, adapter, plain))),
            (
                f"{lora}, `weights = nf4` of the model",
                replace(query, architecture=adapted(a, adapter, "nf4")),
            ),
        ]
    if isinstance(stage, Supervised):
        contexts = [a.context // part for part in by if a.context // part >= SHORTEST]
        yield [
            (f"a context of {n}", replace(query, architecture=replace(a, context=n)))
            for n in contexts
        ]


def pins(stage: Training) -> tuple[str, ...]:
    """Return the parts of the layout that the spec decides itself."""
    return tuple(n for n, free in _PINS.items() if getattr(stage, n, free) != free)


def unpinned(stage: Training) -> Training:
    """Return the stage with all of its layout left to the plan."""
    return stage.model_copy(update={n: v for n, v in _PINS.items() if hasattr(stage, n)})


_DECIDING = (
    "batch", "group", "minibatches", "passes", "refill", "rollout", "packing", "needs_reference",
    "reference_log_probs", "reference", "value_model", *_PINS,
)  # fmt: skip


def layout_key(query: LayoutQuery) -> Hashable:
    """Return what determines the layouts of a query; queries with equal keys share them."""
    stage = query.stage
    critic = getattr(stage, "critic", None)
    return (
        type(stage),
        type(stage.optimizer),
        getattr(stage, "kl", None) is None,
        getattr(stage, "advantage", None) == "gae",
        critic and (critic.trunk, type(critic.optimizer)),
        *(str(getattr(stage, name, None)) for name in _DECIDING),
        *(getattr(query, each.name) for each in fields(query) if each.name != "stage"),
    )


def attention_kernel(
    declared: Kernel | Literal["auto"],
    a: Architecture,
    length: int,
    dtype_bytes: int,
    platform: str,
) -> Kernel:
    """Return the kernel of attention: the one that the model declares, or for `auto` the fastest.

    Raises `NoLayoutError` where the declared one cannot be used.
    """
    why: dict[Kernel, str] = {"xla": ""}
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
        else f"{length} tokens are no multiple of {SPLASH_UNIT}"
        if length % SPLASH_UNIT
        else ""
    )
    if declared != "auto":
        if why[declared]:
            raise NoLayoutError("attention", f"the kernel `{declared}`: {why[declared]}")
        return declared
    fastest_first: tuple[Kernel, ...] = ("splash", "cudnn", "xla")
    return next(name for name in fastest_first if not why[name])


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
    return {name: getattr(stage.mesh, name) for name in AXES}


def _meshes(stage: Training, count: int, experts: int, longest: int) -> Iterator[dict[str, int]]:
    """Give the meshes that are legal for some batch; of those that split sequences, into `longest`
    parts at most, after the others of as many devices.
    """
    if stage.mesh is not None:
        if stage.mesh.context > 1 and (isinstance(stage, Policy) or experts > 1):
            whose = "completions" if isinstance(stage, Policy) else "models with experts"
            raise NoLayoutError("mesh", f"the axis `context` is not for {whose}")
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
                    sizes = left // fsdp, fsdp, expert, 1, tensor
                    yield dict(zip(AXES, sizes, strict=True))
        if isinstance(stage, Policy) or experts > 1:
            continue
        for context in (n for n in (2, 4, 8, 16, 32, 64) if used % n == 0 and n <= longest):
            for tensor in (n for n in (1, 2, 4, 8) if used // context % n == 0):
                left = used // context // tensor
                for fsdp in (n for n in range(1, left + 1) if left % n == 0):
                    sizes = left // fsdp, fsdp, 1, context, tensor
                    yield dict(zip(AXES, sizes, strict=True))


def _fitting(
    plain: StageLayout,
    stage: Training,
    chip: Chip,
    filled: Callable[[StageLayout], StageLayout],
    cutoff: float,
) -> tuple[StageLayout, bool]:
    """Return the fastest layout of a mesh that fits, or the smallest, and whether it fits. Slower
    ones than `cutoff` need not be looked for.
    """
    local = plain.rows // shards_of(plain.mesh)
    counts = [n for n in range(1, local + 1) if local % n == 0]
    if isinstance(stage, Policy):  # whole groups, or equal parts of one
        group = stage.group
        counts = [n for n in counts if max(group, local // n) % min(group, local // n) == 0]
    if stage.micro_batch is not None:
        counts = [local // stage.micro_batch]
    remats: tuple[Remat, ...] = ("none", "dots", "full")
    if stage.remat != "auto":
        remats = (cast(Remat, stage.remat),)
    # More parts take longer, and so does computing again: but not always on a CPU, nor where parts
    # are skipped.
    on_cpu, skips = chip.cache is not None, isinstance(stage, Policy)
    further = _FURTHER if on_cpu or skips else 0
    least = 0.0 if on_cpu else _LEAST_SKIPPED if skips else 1.0
    best: StageLayout | None = None
    smallest: StageLayout | None = None
    for remat in remats:
        found = 0
        for parts in counts:
            layout = filled(replace(plain, micro_batches=parts, remat=remat))
            if smallest is None or layout.total < smallest.total:
                smallest = layout
            if least * layout.seconds > (cutoff if best is None else min(best.seconds, cutoff)):
                break
            if layout.total <= MARGIN * chip.memory:
                if best is None or layout.seconds < best.seconds:
                    best = layout
                found += 1
                if found > further:
                    break
        if not on_cpu and best is not None and best.micro_batches == counts[0]:
            break
    assert smallest is not None
    return (smallest, False) if best is None else (best, True)
