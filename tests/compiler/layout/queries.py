"""Stages of a small spec, and their layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.compiler.workspace import program
from tunelang.compiler.layout.hardware import Devices
from tunelang.compiler.layout.layout_query import (
    LayoutQuery,
)
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.presets import PRESETS
from tunelang.compiler.search.layout_search import rank_layouts
from tunelang.dsl.vocabulary.stages import Training

LLAMA = replace(PRESETS["llama-3.1-8b"], context=4096)


def query(stage: Training, a: Architecture, dtype_bytes: int, devices: Devices) -> LayoutQuery:
    return LayoutQuery(stage=stage, architecture=a, dtype_bytes=dtype_bytes, devices=devices)


def lay_out(
    stage: Training, a: Architecture, dtype_bytes: int, devices: Devices, **more: Any
) -> StageLayout:
    return rank_layouts(replace(query(stage, a, dtype_bytes, devices), **more))[0]


def stage(folder: Path, more: str = "", batch: str = "batch = 64 sequences") -> Training:
    text = f"""\
model g : pretrained {{ path = "models/tiny" }}
data d : jsonl {{ path = "data/sums.jsonl", prompt = "{{question}}", response = "{{answer}}" }}
stage s : sft {{ from = g, data = d, length = 1 epoch, {batch}{", " + more if more else ""} }}
"""
    value = program(text, folder).declarations["s"].branches[0].value
    assert isinstance(value, Training)
    return value


def policy(folder: Path, more: str = "", kind: str = "grpo") -> Training:
    text = f"""\
model g : pretrained {{ path = "models/tiny" }}
data d : jsonl {{ path = "data/sums.jsonl", prompt = "{{question}}", response = "{{answer}}" }}
stage s : {kind} {{
  from = g, data = d, length = 1 epoch, batch = 32 prompts, group = 8
  reward = exact("{{completion}}", "{{response}}"){", " + more if more else ""}
}}
"""
    value = program(text, folder).declarations["s"].branches[0].value
    assert isinstance(value, Training)
    return value
