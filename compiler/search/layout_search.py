"""The search for a layout: every legal mesh, and for each the fewest micro-batches and the least
rematerialisation that fit, ranked by the estimated time of a step; ties go to the simpler layout.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, fields
from typing import cast

from tunelang.compiler.costs.stage_costs import StageCost, cost_of
from tunelang.compiler.costs.step_costs import estimate_step
from tunelang.compiler.layout.kernels import SPLASH_BLOCK, attention_kernel
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery, NoLayoutError
from tunelang.compiler.layout.stage_layout import OFFLOADS, Kernel, Remat, StageLayout, shards_of
from tunelang.compiler.search.meshes import legal_meshes, mesh_of
from tunelang.dsl.vocabulary.stages import Training

MARGIN = 0.9
"""Share of the memory that a plan may take by the estimate, which can be too low."""
SHORTEST = 1024
"""Tokens of a part of a sequence, at least, where the plan decides to split sequences."""
REPORTED_LAYOUTS = 4
"""Layouts listed in a plan, best first."""
_LEAST_COMPUTING = 0.7
"""Least share of another layout's computing that a layout may get by with."""
_LEAST_UNSKIPPED = 0.7
"""Least share of an update's time that is left where micro-batches are skipped."""
_FURTHER = 4
"""Numbers of micro-batches to try beyond the fewest that fit: more may be faster, where some of
them can be skipped or stay in a cache."""
_PINS = {
    "mesh": None, "micro_batch": None, "remat": "auto", "offload": "auto", "decode_mesh": None,
    "slots": None,
}  # fmt: skip
"""Attributes that decide a part of the layout, and the value that leaves it to the plan."""
_DECIDING = (
    "batch", "group", "minibatches", "passes", "refill", "rollout", "packing", "needs_reference",
    "reference_log_probs", "reference", "value_model", *_PINS,
)  # fmt: skip
"""Attributes whose text enters `layout_key`."""


def best_layout(query: LayoutQuery) -> StageLayout:
    """Return the best layout of a training stage; raises what `rank_layouts` does."""
    return rank_layouts(query)[0]


def rank_layouts(query: LayoutQuery) -> list[StageLayout]:
    """Return the layouts of a training stage that fit, best first: for each mesh the fastest one,
    and of equally fast ones the simpler first.

    Where nothing fits, the optimizer or the reference go to the memory of the host, unless one
    program trains several branches. Raises `DoesNotFitError` and `NoLayoutError`.
    """
    nearest: DoesNotFitError | None = None
    for offload in _offloads(query) if query.branches == 1 else ((),):
        try:
            return _Search(query, offload).ranked()
        except DoesNotFitError as error:
            if nearest is None or error.nearest.total < nearest.nearest.total:
                nearest = error
    assert nearest is not None
    raise nearest


def pins(stage: Training) -> tuple[str, ...]:
    """Return the parts of the layout that the spec decides itself."""
    return tuple(n for n, free in _PINS.items() if getattr(stage, n, free) != free)


def unpinned(stage: Training) -> Training:
    """Return the stage with all of its layout left to the plan."""
    return stage.model_copy(update={n: v for n, v in _PINS.items() if hasattr(stage, n)})


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
        *(getattr(query, part.name) for part in fields(query) if part.name != "stage"),
    )


def _offloads(query: LayoutQuery) -> Iterator[tuple[str, ...]]:
    """Give what may lie in the memory of the host, in the order in which it is tried.

    Raises `NoLayoutError` where the spec offloads a reference that the stage does not hold.
    """
    has_reference = cost_of(query.stage).can_offload_reference(query.architecture)
    match query.stage.offload:
        case "auto" if query.devices.chip.platform == "cpu":
            yield ()  # its memory is the host's
        case "auto":
            # The moments of an adapter are few.
            useless = {"optimizer"} if query.architecture.adapters else set()
            useless |= set() if has_reference else {"reference"}
            yield from (parts for parts in OFFLOADS if useless.isdisjoint(parts))
        case "none":
            yield ()
        case "optimizer":
            yield ("optimizer",)
        case which if has_reference:
            yield ("reference",) if which == "reference" else ("optimizer", "reference")
        case _:
            raise NoLayoutError("offload", "the stage holds no reference that could wait there")


@dataclass
class _Search:
    """A search through the meshes, with the layouts that it has come across."""

    query: LayoutQuery
    offload: tuple[str, ...]
    fitting: list[StageLayout] = field(default_factory=list)
    nearest: StageLayout | None = None
    """The layout of any mesh that needs the least memory."""
    undivided: int = 0
    """Sequences of a device that a pinned micro-batch did not divide; the fewest."""

    def __post_init__(self) -> None:
        query = self.query
        self.stage, self.architecture = query.stage, query.architecture
        self.cost: StageCost = cost_of(query.stage)
        self.rows, self.length = self.cost.batch(self.architecture.context, query.roles)
        kernel = attention_kernel(
            query.attention,
            self.architecture,
            self.length,
            query.dtype_bytes,
            query.devices.chip.platform,
        )
        self.kernel: Kernel = self.cost.attention or kernel
        self.block = SPLASH_BLOCK if self.kernel == "splash" else 1

    def ranked(self) -> list[StageLayout]:
        """Return the layouts that fit, best first. Raises `DoesNotFitError`, `NoLayoutError`."""
        for mesh in legal_meshes(self.query, self.length // SHORTEST):
            if self._is_hopeless(mesh):
                break
            if self._is_possible(mesh):
                self._try(mesh)
        if self.fitting:
            return sorted(self.fitting, key=_rank)
        if self.nearest is None:
            raise self._contradiction()
        usable = int(MARGIN * self.query.devices.chip.memory)
        raise DoesNotFitError(self.query, self.nearest, pins(self.stage), usable)

    @property
    def best(self) -> StageLayout | None:
        """Return the fastest layout so far."""
        return min(self.fitting, key=lambda layout: layout.seconds, default=None)

    def _is_hopeless(self, mesh: dict[str, int]) -> bool:
        """Return whether no mesh of as few devices can be faster than the best layout so far.

        Fewer devices may be faster, where what they exchange takes longer than computing.
        """
        if (best := self.best) is None:
            return False
        computing = best.times["computing"] * math.prod(best.mesh.values())
        seconds = best.seconds - best.times.get("rollout", 0.0)
        return _LEAST_COMPUTING * computing >= math.prod(mesh.values()) * seconds

    def _is_possible(self, mesh: dict[str, int]) -> bool:
        """Return whether the batch and the model divide over a mesh."""
        a, shards = self.architecture, shards_of(mesh)
        if self.fitting and mesh["context"] > 1 and self.rows >= math.prod(mesh.values()):
            return False  # to split sequences costs more than to split the batch
        if self.rows % shards or a.heads % mesh["tensor"] or a.mlp % mesh["tensor"]:
            return False
        experts = 1 if a.experts is None else a.experts.count
        if experts % mesh["expert"] or self.length % (mesh["context"] * self.block):
            return False
        local = self.rows // shards
        if self.stage.micro_batch is not None and local % self.stage.micro_batch:
            self.undivided = min(self.undivided or local, local)
            return False
        return True

    def _try(self, mesh: dict[str, int]) -> None:
        """Estimate the layouts of a mesh, and enter the fastest that fits."""
        fastest = sorted(layout.seconds for layout in self.fitting)[:REPORTED_LAYOUTS]
        cutoff = fastest[-1] if len(fastest) == REPORTED_LAYOUTS else math.inf
        layout, fits = self._fastest_fitting(mesh, cutoff)
        if self.nearest is None or layout.total < self.nearest.total:
            self.nearest = layout
        if fits:
            self.fitting.append(layout)

    def _fastest_fitting(self, mesh: dict[str, int], cutoff: float) -> tuple[StageLayout, bool]:
        """Return the fastest layout of a mesh that fits, or else the smallest, and whether it fits.
        Layouts slower than `cutoff` need not be looked for.
        """
        # More micro-batches take longer, and so does computing again: but not always on a CPU, nor
        # where micro-batches are skipped.
        chip, may_skip = self.query.devices.chip, self.cost.rollout is not None
        on_cpu = chip.cache is not None
        further = _FURTHER if on_cpu or may_skip else 0
        least = 0.0 if on_cpu else _LEAST_UNSKIPPED if may_skip else 1.0
        counts = self._micro_batches(mesh)
        best: StageLayout | None = None
        smallest: StageLayout | None = None
        for remat in self._remats():
            fitting = 0
            for micro_batches in counts:
                layout = self._estimated(mesh, micro_batches, remat)
                if smallest is None or layout.total < smallest.total:
                    smallest = layout
                limit = cutoff if best is None else min(best.seconds, cutoff)
                if least * layout.seconds > limit:
                    break
                if layout.total <= MARGIN * chip.memory:
                    if best is None or layout.seconds < best.seconds:
                        best = layout
                    fitting += 1
                    if fitting > further:
                        break
            if not on_cpu and best is not None and best.micro_batches == counts[0]:
                break
        assert smallest is not None
        return (smallest, False) if best is None else (best, True)

    def _estimated(self, mesh: dict[str, int], micro_batches: int, remat: Remat) -> StageLayout:
        layout = StageLayout(
            mesh=mesh,
            rows=self.rows,
            length=self.length,
            micro_batches=micro_batches,
            remat=remat,
            kernel=self.kernel,
            offload=self.offload,
            slots=None,
            branches=self.query.branches,
        )
        return estimate_step(layout, self.query)

    def _micro_batches(self, mesh: dict[str, int]) -> list[int]:
        """Return the numbers of micro-batches to try, the fewest first."""
        local, group = self.rows // shards_of(mesh), self.cost.group
        if self.stage.micro_batch is not None:
            return [local // self.stage.micro_batch]
        divisors = [n for n in range(1, local + 1) if local % n == 0]
        # Whole groups, or equal parts of one.
        return [n for n in divisors if max(group, local // n) % min(group, local // n) == 0]

    def _remats(self) -> tuple[Remat, ...]:
        """Return the rematerialisations to try, the one that computes the least first."""
        if self.stage.remat == "auto":
            return ("none", "dots", "full")
        return (cast(Remat, self.stage.remat),)

    def _contradiction(self) -> NoLayoutError:
        """Say why no mesh was possible."""
        stage, devices = self.stage, self.query.devices
        if stage.mesh is not None and self.length % (stage.mesh.context * self.block):
            multiples = "" if self.block == 1 else f" that are multiples of {self.block}"
            parts = f"{stage.mesh.context} parts{multiples}"
            return NoLayoutError("mesh", f"{self.length} tokens do not divide into {parts}")
        if self.undivided:
            sequences = f"{self.undivided} sequences of a device"
            return NoLayoutError(
                "micro_batch", f"{stage.micro_batch} do not divide the {sequences}"
            )
        pinned = stage.mesh is not None
        count = math.prod(mesh_of(stage).values()) if pinned else devices.count
        return NoLayoutError(
            "mesh" if pinned else "batch",
            f"{self.rows} sequences do not divide over {count} devices",
        )


def _rank(layout: StageLayout) -> tuple[float, int, int]:
    """Return what layouts are sorted by: seconds, the axes in use, and replicas of the weights."""
    axes = sum(size > 1 for size in layout.mesh.values())
    return float(f"{layout.seconds:.6g}"), axes, -layout.mesh["data"]
