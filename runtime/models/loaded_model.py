"""A declared model, opened: architecture, tokenizer, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelang.compiler.models.architecture import Architecture, Storage
from tunelang.runtime.tokenize.chat_renderer import Renderer


@dataclass(frozen=True)
class Model:
    """A declared model, opened."""

    name: str
    architecture: Architecture
    renderer: Renderer
    dtype: Any
    """The dtype of activations."""
    storage: Storage = "f32"
    """The storage of frozen weights."""
    folder: Path | None = None
    """The folder of its weights; None for random ones."""
