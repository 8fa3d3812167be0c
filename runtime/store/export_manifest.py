"""Where an export stage writes, and whether what it wrote is still there."""

from __future__ import annotations

from pathlib import Path

from tunelang.compiler.graph import StageGraph
from tunelang.dsl.program import Program
from tunelang.runtime.store.atomic_files import read_json

MANIFEST = ".tune-export.json"
"""The file that lists what exports wrote to its folder."""


def export_folder(program: Program, graph: StageGraph, node: str) -> Path:
    """Return the folder of an export; branches of a sweep have one each within the stage's."""
    found = graph.nodes[node]
    folder = program.folder / Path(found.value.path).expanduser()  # type: ignore[attr-defined]
    if len(graph.by_stage[found.stage]) == 1:
        return folder
    return folder / node.removeprefix(found.stage).strip("[]").replace("/", "-")


def is_written(path: Path, digest: str) -> bool:
    """Whether a folder holds what an export with this digest wrote, whole."""
    held = read_json(path / MANIFEST)
    return (
        isinstance(held, dict)
        and held.get("digest") == digest
        and all(
            (path / name).is_file() and (path / name).stat().st_size == size
            for name, size in held["files"].items()
        )
    )
