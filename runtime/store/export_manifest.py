"""The folder of an export stage, and the manifest of the files that it wrote."""

from __future__ import annotations

from pathlib import Path

from tunelang.compiler.graph import StageGraph
from tunelang.dsl.program import Program
from tunelang.runtime.store.atomic_files import read_json

MANIFEST = ".tune-export.json"
"""Name of the file that lists the files of an export."""


def export_folder(program: Program, graph: StageGraph, node: str) -> Path:
    """Return the folder of an export; branches of a sweep have subfolders of the stage's."""
    stage_node = graph.nodes[node]
    folder = program.folder / Path(stage_node.value.path).expanduser()  # type: ignore[attr-defined]
    if len(graph.by_stage[stage_node.stage]) == 1:
        return folder
    return folder / node.removeprefix(stage_node.stage).strip("[]").replace("/", "-")


def is_written(path: Path, digest: str) -> bool:
    """Return whether a folder has all files that an export with this digest wrote."""
    manifest = read_json(path / MANIFEST)
    return (
        isinstance(manifest, dict)
        and manifest.get("digest") == digest
        and all(
            (path / name).is_file() and (path / name).stat().st_size == size
            for name, size in manifest["files"].items()
        )
    )
