"""The question that the layout search answers, and the two ways in which it has no answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.stage_layout import Kernel, StageLayout
from tunelang.compiler.models.architecture import Architecture
from tunelang.dsl.diagnostics.tune_error import (
    DOES_NOT_FIT,
    WRONG_SPEC,
    FailureText,
    SpecPlace,
    TuneError,
)
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.stages import Training


@dataclass(frozen=True)
class Judge:
    """A model that scores completions. Its weights lie as for sampling, over all devices."""

    architecture: Architecture
    dtype_bytes: int
    speaks: bool
    """Whether it writes a verdict, as for a rubric; a reward model yields a number at once."""


@dataclass(frozen=True, kw_only=True)
class LayoutQuery:
    """A training stage with the models and devices that its layout depends on."""

    stage: Training
    architecture: Architecture
    """With the adapter that the stage trains."""
    dtype_bytes: int
    """Bytes of a number of the activations."""
    devices: Devices
    attention: Kernel | Literal["auto"] = "auto"
    """The kernel of attention that the model declares."""
    teacher: Architecture | None = None
    """The model that the stage is distilled from."""
    judges: tuple[Judge, ...] = ()
    """The models of the spec that score the stage's completions."""
    branches: int = 1
    """Branches of a sweep that one program trains side by side."""
    roles: frozenset[str] = frozenset()
    """Roles that every source of the stage's data has."""


@dataclass(eq=False)
class DoesNotFitError(TuneError):
    """No layout fits into the memory of the devices."""

    code = "does-not-fit"
    exit_code = DOES_NOT_FIT
    query: LayoutQuery
    nearest: StageLayout
    """The layout that needs the least memory."""
    pinned: tuple[str, ...]
    """Attributes of the spec that restrict the layout."""
    usable: int
    """Bytes of a device that a plan may use."""
    remedies: tuple[tuple[str, int], ...] = ()
    """Changes that would make the stage fit, and the bytes that each needs; added where the error
    is about to be reported, since they take a search of their own.
    """

    @override
    def text(self, stage: str) -> FailureText:
        nearest = self.nearest
        mesh = " × ".join(f"{axis} {size}" for axis, size in nearest.mesh.items() if size > 1)
        several = f", {nearest.branches} branches in one program" if nearest.branches > 1 else ""
        return run_failures.does_not_fit(
            stage=stage,
            needed=nearest.total,
            memory=self.query.devices.chip.memory,
            usable=self.usable,
            devices=str(self.query.devices),
            layout=f"{mesh or 'one device'}, remat {nearest.remat}{several}",
            parts=nearest.memory,
            pinned=self.pinned,
            remedies=self.remedies,
        )

    def __str__(self) -> str:
        return f"needs {self.nearest.total} bytes of {self.query.devices.chip.memory}"


@dataclass(eq=False)
class NoLayoutError(TuneError):
    """An attribute that the spec sets contradicts the devices or the batch; `why` in words."""

    code = "cannot-lay-out"
    exit_code = WRONG_SPEC
    attribute: str
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_layout(self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute=self.attribute)
