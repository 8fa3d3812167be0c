"""Published weights: safetensors read tensor by tensor, each straight to where its parameter lies.

The host never holds more than one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from tunelang.compiler.models.architecture import Architecture, Storage
from tunelang.runtime.loading.stored_tensors import (
    TABLES,
    ParamPath,
    StoredParameter,
    Tensor,
    input_axes,
    stored_parameters,
    variables_by_path,
)
from tunelang.runtime.models.model_folder import BadWeightsError, read_config
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.models.primitives import DTYPES, Parameter, with_value
from tunelang.runtime.models.quantization import quantized
from tunelang.runtime.sharding import Layout, logical_axes

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 4
"""Names that a problem lists."""

Arrays = tuple[jax.Array, ...]
"""The arrays that a parameter is kept as: itself, or codes and scales."""


def load(
    folder: Path,
    architecture: Architecture,
    layout: Layout,
    storage: Storage = "f32",
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Load the decoder's parameters as `storage` keeps them, each where the layout has it.

    `dtype` is that of activations. Raises `BadWeightsError`, which names every tensor that is
    missing, left over or misshapen, and `UnknownFamilyError`.
    """
    _, abstract = abstract_decoder(architecture, jnp.float32)
    stored = stored_parameters(abstract, read_config(folder))
    files = _files_by_tensor(folder)
    problems = _problems(files, stored, architecture)
    if problems:
        raise BadWeightsError(folder, tuple(problems))
    variables = variables_by_path(abstract)
    params: list[tuple[ParamPath, Parameter]] = []
    for parameter in stored:
        arrays = _read(parameter, files, layout, _conversion(parameter.path, storage, dtype))
        params += _variables(parameter.path, variables[parameter.path], arrays)
    return nnx.from_flat_state(params)


def convert(params: Params, layout: Layout, storage: Storage, dtype: DTypeLike) -> Params:
    """Convert float32 parameters to what `storage` keeps of them; `dtype` is of activations."""
    if storage == "f32":
        return params
    converted: list[tuple[ParamPath, Parameter]] = []
    for path, variable in variables_by_path(params).items():
        conversion = _conversion(path, storage, dtype)
        stacked = path[0] == "blocks"
        array = variable.get_value()
        apply = jax.vmap(conversion.apply) if stacked else conversion.apply
        axes = logical_axes(variable)
        shapes = [part.shape for part in jax.eval_shape(apply, array)]
        places = tuple(layout.sharding(axes, shape) for shape in shapes)
        arrays = _convert_program(conversion, stacked, places)(array)
        converted += _variables(path, variable, arrays)
    return nnx.from_flat_state(converted)


@dataclass(frozen=True)
class _Conversion:
    """The conversion of one layer's parameter to the arrays that it is kept as."""

    dtype: jnp.dtype
    codes: Storage | None = None
    """The storage that quantises it."""
    inputs: int = 0
    """Input axes, where it is quantised."""

    def apply(self, array: jax.Array) -> Arrays:
        array = array.astype(jnp.float32)
        if self.codes is not None:
            return quantized(array, self.inputs, self.codes)
        return (array.astype(self.dtype),)


def _conversion(path: ParamPath, storage: Storage, dtype: DTypeLike) -> _Conversion:
    if path[-1] == "weight" and storage in ("nf4", "int8"):
        return _Conversion(jnp.dtype(jnp.float32), storage, input_axes(path))
    if path[-2:-1] == ("experts",):
        return _Conversion(jnp.dtype(DTYPES.get(storage, jnp.bfloat16)))
    if path[-1] == "weight" or path in TABLES:
        return _Conversion(jnp.dtype(DTYPES.get(storage, dtype)))
    return _Conversion(jnp.dtype(jnp.float32))


# Programs are made once for all parameters that are converted alike.


@cache
def _convert_program(
    conversion: _Conversion, stacked: bool, places: tuple[NamedSharding, ...]
) -> jax.stages.Wrapped:
    """Return the jitted conversion of a parameter, or of each layer of one that is stacked."""
    apply = jax.vmap(conversion.apply) if stacked else conversion.apply
    return jax.jit(apply, out_shardings=places)


@cache
def _insert_program(
    conversion: _Conversion, places: tuple[NamedSharding, ...]
) -> jax.stages.Wrapped:
    """Return the jitted `(stacked, layer, index) -> stacked`, which uses up `stacked`."""

    def insert(stacked: Arrays, layer: jax.Array, index: jax.Array) -> Arrays:
        pairs = zip(stacked, conversion.apply(layer), strict=True)
        return tuple(array.at[tuple(index)].set(part) for array, part in pairs)

    return jax.jit(insert, donate_argnums=0, out_shardings=places)


def _variables(
    path: ParamPath, variable: Parameter, arrays: Arrays
) -> list[tuple[ParamPath, Parameter]]:
    """Name the arrays that a parameter is kept as."""
    names = (path, (*path[:-1], "scales"))
    return [(name, with_value(variable, array)) for name, array in zip(names, arrays, strict=False)]


def _read(
    parameter: StoredParameter, files: Mapping[str, Path], layout: Layout, conversion: _Conversion
) -> Arrays:
    """Read a parameter to where it lies, a layer at a time."""

    def read(name: str) -> Tensor:
        with _open(files[name]) as file:
            return parameter.read(file.get_slice(name))

    stack, layer_shape = parameter.stack, parameter.layer_shape
    layer_place = layout.sharding(parameter.axes[len(stack) :], layer_shape)
    layer = jax.eval_shape(conversion.apply, jax.ShapeDtypeStruct(layer_shape, jnp.float32))
    shapes = [(*stack, *array.shape) for array in layer]
    places = tuple(layout.sharding(parameter.axes, shape) for shape in shapes)
    if not stack:
        array = jax.device_put(read(parameter.tensor_name), layer_place)
        unstacked: Arrays = _convert_program(conversion, False, places)(array)
        return unstacked
    stacked: Arrays = tuple(
        jnp.zeros(shape, array.dtype, device=place)
        for shape, array, place in zip(shapes, layer, places, strict=True)
    )
    insert = _insert_program(conversion, places)
    for index, name in parameter.tensor_names():
        array = jax.device_put(read(name), layer_place)
        stacked = insert(stacked, array, np.array(index, np.int32))
    return stacked


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    index = folder / _INDEX
    try:
        if index.exists():
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        with safe_open(folder / _ONE, framework="numpy") as file:
            return dict.fromkeys(file.keys(), folder / _ONE)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        name = index.name if index.exists() else _ONE
        missing = isinstance(error, FileNotFoundError)
        why = "no such file" if missing else f"it cannot be read: {error}"
        raise BadWeightsError(folder, (f"`{name}`: {why}",)) from None


def _problems(
    files: Mapping[str, Path], stored: list[StoredParameter], architecture: Architecture
) -> list[str]:
    """Compare the tensors that there are with those that the parameters need."""
    needed = {name: parameter for parameter in stored for _, name in parameter.tensor_names()}
    missing = [name for name in needed if name not in files]
    ignored = {"lm_head.weight"} if architecture.tied else set()
    extra = [
        name for name in files if name not in needed | dict.fromkeys(ignored)
        and not name.endswith("rotary_emb.inv_freq")
    ]  # fmt: skip
    misshapen = []
    for path, names in _tensors_by_file(files, needed).items():
        with _open(path) as file:
            for name in names:
                shape, expected = file.get_slice(name).get_shape(), needed[name].tensor_shape
                if tuple(shape) != expected:
                    misshapen.append(f"{name} is {_size(shape)}, not {_size(expected)}")
    problems = (("missing", missing), ("left over", extra), ("misshapen", misshapen))
    return [f"{problem}: {_first_names(names)}" for problem, names in problems if names]


def _tensors_by_file(files: Mapping[str, Path], tensors: Iterable[str]) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = {}
    for name in tensors:
        if name in files:
            names.setdefault(files[name], []).append(name)
    return names


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="numpy")
    except (OSError, SafetensorError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise BadWeightsError(file.parent, (f"`{file.name}`: {why}",)) from None


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _size(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape))
