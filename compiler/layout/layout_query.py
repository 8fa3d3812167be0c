"""The question that the layout search answers, and the two ways in which it has no answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.stage_layout import Kernel, StageLayout
from tunelang.compiler.models.architecture import Architecture
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


class DoesNotFitError(Exception):
    """No layout fits into the memory of the devices.

    `nearest` is the layout that needs the least memory, `pinned` names the attributes with which
    the spec restricts the layout, `query` is what was searched for.
    """

    def __init__(self, query: LayoutQuery, nearest: StageLayout, pinned: tuple[str, ...]) -> None:
        super().__init__(f"needs {nearest.total} bytes of {query.devices.chip.memory}")
        self.query = query
        self.nearest = nearest
        self.pinned = pinned


class NoLayoutError(Exception):
    """An attribute of the spec contradicts the devices or the batch; `why` in words."""

    def __init__(self, attribute: str, why: str) -> None:
        super().__init__(attribute, why)
        self.attribute = attribute
        self.why = why
