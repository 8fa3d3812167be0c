"""Errors that several sub-packages raise or catch."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures


class Interrupted(Exception):
    """The user asked to stop; everything is saved."""


class StageFailed(Exception):
    """An error in a stage, in planning or running it; the error itself is `__cause__`."""

    def __init__(self, stage: str, node: str = "") -> None:
        super().__init__(stage, node)
        self.stage = stage
        self.node = node


@dataclass(eq=False)
class NotBuiltError(TuneError):
    """The spec uses a `feature` that this version cannot run, in a `declaration`."""

    code = "not-built"
    declaration: str
    feature: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.not_built(self.feature)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(declaration=self.declaration)


@dataclass(eq=False)
class MissingExtraError(TuneError):
    """An optional package is not installed: the `extra` that installs it, and the `attribute` of
    the spec that needs it.
    """

    code = "missing-package"
    extra: str
    attribute: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.missing_extra(self.extra)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute=self.attribute)
