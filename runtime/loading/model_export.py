"""Models written as `transformers` loads them, and adapters as PEFT does.

A folder may hold other files: those of exports are listed in `MANIFEST`, and only they are ever
replaced or removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from typing_extensions import override

from tunelang.compiler.models.families import config_of
from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.training import Dora, Lora
from tunelang.dsl.vocabulary.utility_stages import Export
from tunelang.runtime.loading import stored_tensors
from tunelang.runtime.loading.initial_weights import Origin, abstract_adapter, load_merged
from tunelang.runtime.loading.stored_tensors import Tensor
from tunelang.runtime.models import model_folder
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.sharding import Layout
from tunelang.runtime.store.atomic_files import (
    raising_store_errors,
    read_json,
    replacing,
    write_json,
)
from tunelang.runtime.store.export_manifest import MANIFEST
from tunelang.runtime.tokenize.hf_files import tokenizer_files
from tunelang.runtime.training.checkpoints import load_params

DTYPES: dict[str, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
_TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_PREFIX = "base_model.model."
"""The prefix of PEFT's names of modules."""


@dataclass(eq=False)
class ForeignFileError(TuneError):
    """A file would be overwritten that no export of this stage wrote: its `path`."""

    code = "export-fails"
    path: Path

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.foreign_file(self.path)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="path")


@dataclass(eq=False)
class NotApartError(TuneError):
    """An adapter cannot be written by itself; `why` in words."""

    code = "export-fails"
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.adapter_not_separable(self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="adapter")


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]


@dataclass
class ExportFolder:
    """A folder that is written to, and the files of earlier exports of the stage in it."""

    path: Path
    files: dict[str, int]
    """Names of files -> their sizes, of this export and those before."""
    written: list[str] = field(default_factory=list)
    """Names of files of this export."""

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file, all of it or nothing; raises `ForeignFileError` and `StoreError`."""
        target = self.path / name
        if name not in self.files:
            if target.exists():
                raise ForeignFileError(target)
            # Before the file exists: whatever happens, the next export may replace it.
            self.files[name] = 0
            self.note(None)
        with raising_store_errors("write", target), replacing(target) as temporary:
            write(temporary)
        self.files[name] = target.stat().st_size
        self.written.append(name)

    def note(self, digest: str | None) -> None:
        """Write down the files of the folder; `digest` is of an export that is complete."""
        write_json(self.path / MANIFEST, {"digest": digest, "files": self.files})

    def finish(self, digest: str) -> None:
        """Remove the files of earlier exports that this one did not write."""
        for name in self.files.keys() - set(self.written):
            (self.path / name).unlink(missing_ok=True)
        self.files = {name: self.files[name] for name in self.written}
        self.note(digest)

    def put_bytes(self, name: str, content: bytes) -> None:
        """Write a file from memory."""

        def write(path: Path) -> None:
            path.write_bytes(content)

        self.put(name, write)

    def put_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file of tensors."""
        # Other tools look for this before they open a file.
        self.put(name, lambda path: save_file(tensors, path, metadata={"format": "pt"}))

    def put_json(self, name: str, value: Any) -> None:
        """Write a file of JSON."""
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        self.put_bytes(name, text.encode())


def export_model(
    origin: Origin, kind: Export, model: Model, layout: Layout, path: Path, digest: str
) -> list[str]:
    """Write a model or an adapter to a folder; returns the names of the files.

    Raises `ForeignFileError`, `NotApartError`, `BadConfigError`, `NoTokenizerFileError` and what
    loading and writing raise.
    """
    manifest = read_json(path / MANIFEST)
    with raising_store_errors("write", path):
        path.mkdir(parents=True, exist_ok=True)
    folder = ExportFolder(path, dict(manifest["files"]) if isinstance(manifest, dict) else {})
    if kind.adapter == "apart":
        _write_adapter(folder, origin, model, layout)
    else:
        _write_model(folder, origin, kind, model, layout)
    folder.finish(digest)
    return folder.written


def _write_model(
    folder: ExportFolder, origin: Origin, kind: Export, model: Model, layout: Layout
) -> None:
    config = _config(model, kind.dtype)
    params = load_merged(origin, model, layout, 0)
    dtype = DTYPES[kind.dtype]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, array in stored_tensors.tensors(params, config):
            yield name, array.astype(dtype)

    shapes = [_Tensor(name, shape) for name, shape in stored_tensors.tensor_shapes(params, config)]
    _write_tensors(folder, tensors(), shapes, np.dtype(dtype).itemsize, kind.shard)
    folder.put_json("config.json", config)
    _write_tokenizer(folder, model)


def _write_tensors(
    folder: ExportFolder,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: list[_Tensor],
    itemsize: int,
    limit: int,
) -> None:
    """Write tensors to files of at most `limit` bytes, or one tensor; with an index of several."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in shapes:
        nbytes = itemsize * int(np.prod(shape))
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        shard: dict[str, Tensor] = {}
        for name in names:
            next_name, array = next(tensors)
            assert next_name == name
            shard[name] = np.ascontiguousarray(array)
        folder.put_tensors(file, shard)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        folder.put_json("model.safetensors.index.json", index)


def _config(model: Model, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of a model: its folder's, or one of a family that describes it."""
    a = model.architecture
    config = dict(model_folder.read_config(model.folder) if model.folder else config_of(a))
    tokenizer = model.renderer.tokenizer
    config |= {"vocab_size": a.vocabulary, "dtype": _TORCH[dtype]}
    config.pop("torch_dtype", None)
    if model.folder is None:
        config |= {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end}
        config["pad_token_id"] = tokenizer.pad
    return config


def _write_tokenizer(folder: ExportFolder, model: Model) -> None:
    renderer, tokenizer = model.renderer, model.renderer.tokenizer
    settings = read_json(model.folder / "tokenizer_config.json") if model.folder else None
    files = tokenizer_files(renderer, settings or {}, model.architecture.context)
    for name, content in files.items():
        folder.put_bytes(name, content)
    generation = read_json(model.folder / "generation_config.json") if model.folder else None
    folder.put_json(
        "generation_config.json",
        {
            "bos_token_id": tokenizer.start,
            "pad_token_id": tokenizer.pad,
            **(generation or {}),
            "eos_token_id": list(renderer.stops),
        },
    )


# Adapters by themselves.


def _write_adapter(folder: ExportFolder, origin: Origin, model: Model, layout: Layout) -> None:
    if not origin.adapters:
        raise NotApartError("it has no adapter: all of its weights were trained")
    if origin.path is not None or model.folder is None:
        raise NotApartError("its adapter is on weights that an earlier stage trained")
    loras = [lora for lora, _ in origin.adapters]
    if len(loras) > 1:
        raise NotApartError(f"it has {len(loras)} adapters on top of each other")
    ((lora, path),) = origin.adapters
    params = load_params(path, abstract_adapter(lora, model, layout))
    config = model_folder.read_config(model.folder)
    tensors: dict[str, Tensor] = {}
    modules: dict[str, None] = {}
    try:
        for module, part, array in stored_tensors.adapter_tensors(params, config):
            if model.architecture.tied and part.startswith("lora_embedding"):
                raise NotApartError("its embedding is the head too, which PEFT leaves as it was")
            tensors[f"{_PREFIX}{module}.{part}"] = np.ascontiguousarray(array, np.float32)
            modules[module.rpartition(".")[2]] = None
    except ValueError as error:
        raise NotApartError(str(error)) from None
    folder.put_tensors("adapter_model.safetensors", tensors)
    folder.put_json("adapter_config.json", _peft(lora, model, list(modules)))
    _write_tokenizer(folder, model)


def _peft(lora: Lora, model: Model, modules: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "use_dora": isinstance(lora, Dora),
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
