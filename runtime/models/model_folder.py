"""Folders of published models: where they lie, and the architectures that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from typing_extensions import override

from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.families import (
    BadConfigError,
    Config,
    UnknownFamilyError,
    architecture_of,
)
from tunelang.compiler.models.presets import PRESETS, PUBLISHED
from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.models import Pretrained
from tunelang.runtime import hub


@dataclass(eq=False)
class BadWeightsError(TuneError):
    """The weights of a folder cannot be read, or do not fit its configuration."""

    code = "weights-fail"
    path: Path
    """The folder."""
    problems: tuple[str, ...]
    """In words."""

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.bad_weights(self.path.name, self.problems)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(file=self.path)

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.problems)}"


def find_folder(kind: Pretrained, spec_folder: Path) -> Path:
    """Find the folder of a declared model, whose path may be relative to that of the spec.

    Fetches the model where it is one of the hub's. Raises `BadWeightsError` where there is none.
    """
    try:
        return hub.folder_of(kind.path, spec_folder, kind.revision)
    except hub.NoModelError as error:
        raise BadWeightsError(Path(kind.path), (error.why, error.fix)) from None


def plan_architecture(kind: Pretrained, spec_folder: Path) -> Architecture:
    """Return the architecture of a declared model to plan for.

    Fetches the configuration alone, and for models whose sizes are known nothing. Raises
    `BadWeightsError`.
    """
    folder = hub.cached_config(kind.path, spec_folder, kind.revision)
    if folder is not None:
        return read_architecture(kind, folder)
    if kind.path in PUBLISHED:
        return _with_context(PRESETS[PUBLISHED[kind.path]], kind)
    try:
        folder = hub.folder_of(kind.path, spec_folder, kind.revision, hub.DESCRIBING)
    except hub.NoModelError as error:
        raise BadWeightsError(Path(kind.path), (error.why, error.fix)) from None
    return read_architecture(kind, folder)


def read_architecture(kind: Pretrained, folder: Path) -> Architecture:
    """Read the architecture of a declared model from its folder; raises `BadWeightsError`."""
    try:
        architecture = architecture_of(read_config(folder))
    except (BadConfigError, UnknownFamilyError) as error:
        raise BadWeightsError(folder, (str(error),)) from None
    return _with_context(architecture, kind)


def _with_context(architecture: Architecture, kind: Pretrained) -> Architecture:
    return architecture if kind.context is None else replace(architecture, context=kind.context)


def with_vocabulary(architecture: Architecture, tokens: int) -> Architecture:
    """Return the architecture with an embedding for at least so many tokens.

    `pretrained.load` fills the rows that a file lacks with the mean of the rows that it has: a new
    token is neither likelier nor less likely than the others at first.
    """
    return replace(architecture, vocabulary=max(architecture.vocabulary, tokens))


def read_config(folder: Path) -> Config:
    """Read a folder's `config.json`; raises `BadWeightsError`."""
    try:
        config = json.loads((folder / hub.CONFIG).read_text("utf-8"))
    except OSError as error:
        why = (error.strerror or "it cannot be read").lower()
        raise BadWeightsError(folder, (f"`{hub.CONFIG}`: {why}",)) from None
    except ValueError:
        raise BadWeightsError(folder, (f"`{hub.CONFIG}` is not JSON",)) from None
    if not isinstance(config, dict):
        raise BadWeightsError(folder, (f"`{hub.CONFIG}` is not an object",))
    # Models that see and hear nest the configuration of their language model.
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" in inner else config
