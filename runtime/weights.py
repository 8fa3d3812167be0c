"""Published checkpoints: a folder of safetensors as `transformers` writes it, in and out.

Reading goes tensor by tensor straight to where each parameter lies, so that the host never holds
more than one. A linear layer is stored as `[outputs, inputs]` and kept as `[*inputs, *outputs]`;
layers that are stored apart are stacked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tunelang.compiler.adapters import Storage
from tunelang.compiler.architecture import Architecture
from tunelang.compiler.families import (
    BadConfigError,
    Config,
    UnknownFamilyError,
    architecture_of,
    family_of,
    tensor_names,
)
from tunelang.dsl.vocabulary.models import Pretrained
from tunelang.runtime.layers import DTYPES
from tunelang.runtime.quantize import quantized
from tunelang.runtime.sharding import Layout, logical_axes
from tunelang.runtime.train import abstract_decoder

CONFIG = "config.json"
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 4


class BadWeightsError(Exception):
    """A folder whose weights cannot be read, or are not those of its configuration: its `path`, and
    `problems` in words.
    """

    def __init__(self, path: Path, problems: tuple[str, ...]) -> None:
        super().__init__(path, problems)
        self.path, self.problems = path, problems


@dataclass(frozen=True)
class _Leaf:
    """A parameter, and how it is stored."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    name: str
    """Of its tensor; with `{}` for the layer where it is stacked."""
    inputs: int
    """Input axes of a linear layer's weight, without that of the layers; 0 for all else."""

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def own(self) -> tuple[int, ...]:
        """The shape in one layer."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        if self.path[-1] == "bias":
            return (math.prod(self.own),)
        if not self.inputs:
            return self.own
        return math.prod(self.own[self.inputs :]), math.prod(self.own[: self.inputs])

    def tensors(self) -> list[str]:
        return [self.name.format(layer) for layer in range(self.shape[0] if self.stacked else 1)]

    def read(self, tensor: NDArray[Any]) -> NDArray[Any]:
        return (tensor.T if self.inputs else tensor).reshape(self.own)

    def written(self, array: NDArray[Any]) -> NDArray[Any]:
        if not self.inputs:
            return array.reshape(self.stored)
        return np.ascontiguousarray(array.reshape(self.stored[::-1]).T)


def folder_of(kind: Pretrained, beside: Path) -> Path:
    """Return the folder of a declared model; `beside` is what its path is relative to.

    Raises `BadWeightsError` where there is none.
    """
    folder = beside / Path(kind.path).expanduser()
    if not folder.is_dir():
        fix = f"`hf download {kind.path} --local-dir FOLDER` fetches a model from the hub"
        raise BadWeightsError(Path(kind.path), ("there is no such folder", fix))
    return folder


def architecture(kind: Pretrained, folder: Path) -> Architecture:
    """Return the architecture of a declared model.

    Raises `BadWeightsError`.
    """
    try:
        found = architecture_of(configuration(folder))
    except (BadConfigError, UnknownFamilyError) as error:
        raise BadWeightsError(folder, (str(error),)) from None
    return found if kind.context is None else replace(found, context=kind.context)


def configuration(folder: Path) -> Config:
    """Return a folder's `config.json`; raises `BadWeightsError`."""
    try:
        found = json.loads((folder / CONFIG).read_text("utf-8"))
    except OSError as error:
        why = (error.strerror or "it cannot be read").lower()
        raise BadWeightsError(folder, (f"`{CONFIG}`: {why}",)) from None
    except ValueError:
        raise BadWeightsError(folder, (f"`{CONFIG}` is not JSON",)) from None
    if not isinstance(found, dict):
        raise BadWeightsError(folder, (f"`{CONFIG}` is not an object",))
    # Models that see and hear keep their language model's part apart.
    inner = found.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" in inner else found


def load(
    folder: Path,
    architecture: Architecture,
    layout: Layout,
    storage: Storage = "f32",
    dtype: Any = jnp.float32,
) -> Any:
    """Return the decoder's parameters as `storage` keeps them, each where the layout has it.

    `dtype` is that of activations. Raises `BadWeightsError`, which names every tensor that is
    missing, left over or misshapen, and `UnknownFamilyError`.
    """
    config = configuration(folder)
    _, abstract = abstract_decoder(architecture, jnp.float32)
    leaves = list(_leaves(abstract, config))
    files = _files(folder)
    problems = _problems(files, leaves, architecture)
    if problems:
        raise BadWeightsError(folder, tuple(problems))
    flat = {tuple(map(str, path)): value for path, value in nnx.to_flat_state(abstract)}
    return nnx.from_flat_state(
        [
            named
            for leaf in leaves
            for named in _named(
                leaf.path,
                flat[leaf.path],
                _placed(leaf, files, layout, _form(leaf.path, leaf.inputs, storage, dtype)),
            )
        ]
    )


def kept(params: Any, layout: Layout, storage: Storage, dtype: Any) -> Any:
    """Return float32 parameters as `storage` keeps them; they are used up."""
    if storage == "f32":
        return params
    found = []
    for path, value in nnx.to_flat_state(params):
        names = tuple(map(str, path))
        form = _form(names, _inputs(names), storage, dtype)
        if names[0] == "blocks":
            form = jax.vmap(form)
        axes = logical_axes(value)
        places = [
            layout.sharding(axes, each.shape) for each in jax.eval_shape(form, value.get_value())
        ]
        found += _named(names, value, jax.jit(form, out_shardings=tuple(places))(value.get_value()))
    return nnx.from_flat_state(found)


def tensors(params: Any, config: Config) -> Iterator[tuple[str, NDArray[Any]]]:
    """Give the tensors of parameters one by one, as the family of a configuration stores them."""
    flat = {tuple(map(str, path)): value for path, value in nnx.to_flat_state(params)}
    for leaf in _leaves(params, config):
        array = flat[leaf.path].get_value()
        for layer, name in enumerate(leaf.tensors()):
            yield name, leaf.written(np.asarray(array[layer] if leaf.stacked else array))


def _leaves(state: Any, config: Config) -> Iterator[_Leaf]:
    flat = {tuple(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    names = tensor_names(family_of(config), (".".join(path) for path in flat))
    for path, value in flat.items():
        name = names[".".join(path)]
        yield _Leaf(path, tuple(value.get_value().shape), logical_axes(value), name, _inputs(path))


def _inputs(path: tuple[str, ...]) -> int:
    """Return how many input axes a linear layer's weight has; 0 for all else."""
    if path[-1] != "weight":
        return 0
    return 2 if path[-2] == "o" else 1


Arrays = tuple[jax.Array, ...]


def _form(
    path: tuple[str, ...], inputs: int, storage: Storage, dtype: Any
) -> Callable[[jax.Array], Arrays]:
    """Return what makes a parameter, of one layer, what is kept of it: with the scales, if any."""

    def form(array: jax.Array) -> Arrays:
        array = array.astype(jnp.float32)
        if inputs and storage in ("nf4", "int8"):
            return quantized(array, inputs, storage)
        if inputs or path in (("embedding",), ("head",)):
            return (array.astype(DTYPES.get(storage, dtype)),)
        return (array,)

    return form


def _named(
    path: tuple[str, ...], variable: Any, arrays: Arrays
) -> list[tuple[tuple[str, ...], Any]]:
    names = (path, (*path[:-1], "scales"))
    return [(name, variable.replace(array)) for name, array in zip(names, arrays, strict=False)]


def _files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    index = folder / _INDEX
    try:
        if index.exists():
            where = json.loads(index.read_text("utf-8"))["weight_map"]
            return {name: folder / file for name, file in where.items()}
        with safe_open(folder / _ONE, framework="numpy") as file:
            return dict.fromkeys(file.keys(), folder / _ONE)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        which = index.name if index.exists() else _ONE
        missing = isinstance(error, FileNotFoundError)
        why = "no such file" if missing else f"it cannot be read: {error}"
        raise BadWeightsError(folder, (f"`{which}`: {why}",)) from None


def _problems(
    files: Mapping[str, Path], leaves: list[_Leaf], architecture: Architecture
) -> list[str]:
    wanted = {name: leaf for leaf in leaves for name in leaf.tensors()}
    missing = [name for name in wanted if name not in files]
    ignored = {"lm_head.weight"} if architecture.tied else set()
    extra = [
        name for name in files if name not in wanted | dict.fromkeys(ignored)
        and not name.endswith("rotary_emb.inv_freq")
    ]  # fmt: skip
    misshapen = []
    for file, names in _by_file(files, wanted).items():
        with _opened(file) as opened:
            for name in names:
                found = tuple(opened.get_slice(name).get_shape())
                if found != wanted[name].stored:
                    misshapen.append(f"{name} is {_size(found)}, not {_size(wanted[name].stored)}")
    found_problems = (("missing", missing), ("left over", extra), ("misshapen", misshapen))
    return [f"{what}: {_some(names)}" for what, names in found_problems if names]


def _by_file(files: Mapping[str, Path], wanted: Mapping[str, Any]) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for name in wanted:
        if name in files:
            found.setdefault(files[name], []).append(name)
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise BadWeightsError(file.parent, (f"`{file.name}`: {why}",)) from None


def _placed(
    leaf: _Leaf,
    files: Mapping[str, Path],
    layout: Layout,
    form: Callable[[jax.Array], Arrays],
) -> Arrays:
    """Read a parameter into its place, a layer at a time."""

    def read(name: str) -> NDArray[Any]:
        with _opened(files[name]) as file:
            return leaf.read(file.get_tensor(name))

    given = jax.ShapeDtypeStruct(leaf.own, jnp.float32)
    own_axes = leaf.axes[1:] if leaf.stacked else leaf.axes
    slot = layout.sharding(own_axes, leaf.own)
    layers = leaf.shape[:1] if leaf.stacked else ()
    made = [
        jax.ShapeDtypeStruct((*layers, *each.shape), each.dtype)
        for each in jax.eval_shape(form, given)
    ]
    places = tuple(layout.sharding(leaf.axes, each.shape) for each in made)
    if not leaf.stacked:
        whole: Arrays = jax.jit(form, out_shardings=places)(jax.device_put(read(leaf.name), slot))
        return whole
    into: Arrays = jax.jit(
        lambda: tuple(jnp.zeros(each.shape, each.dtype) for each in made), out_shardings=places
    )()

    def put(into: Arrays, array: jax.Array, at: jax.Array) -> Arrays:
        update = jax.lax.dynamic_update_index_in_dim
        return tuple(update(a, b, at, 0) for a, b in zip(into, form(array), strict=True))

    put_in = jax.jit(put, donate_argnums=0, out_shardings=places)
    for at, name in enumerate(leaf.tensors()):
        into = put_in(into, jax.device_put(read(name), slot), np.int32(at))
    return into


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
