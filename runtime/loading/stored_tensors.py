"""The tensors that each model family stores its parameters as, by name, shape and order of axes.

A linear layer is stored as `[outputs, inputs]` and is `[*inputs, *outputs]` here; layers have a
tensor each and are stacked here; some families store several matrices in one tensor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from flax import nnx
from numpy.typing import NDArray

from tunelang.compiler.models.families import Config, family_of, names_of
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.models.primitives import Parameter
from tunelang.runtime.sharding import logical_axes

ParamPath = tuple[str, ...]
Tensor = NDArray[Any]
"""An array of any dtype on the host."""
TABLES: tuple[ParamPath, ...] = (("embedding",), ("head",))
"""Paths of the parameters that have a row for each token."""


class TensorSlice(Protocol):
    """A tensor in a file, of which rows are read."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Read rows."""


@dataclass(frozen=True)
class StoredParameter:
    """A parameter, and how it is stored."""

    path: ParamPath
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    tensor_name: str
    """With `{}` for each axis that is stacked: the layer, the expert."""
    inputs: int
    """Input axes of a linear layer's weight, without stacked ones; 0 for all else."""
    offset: int = 0
    """Its first row in a tensor that holds several parameters one below the other."""
    tensor_rows: int | None = None
    """Rows of such a tensor."""
    added_rows: int = 0
    """Rows of a table for tokens that were added, which the file does not have."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return self.shape[: self.tensor_name.count("{}")]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape without stacked axes."""
        return self.shape[self.tensor_name.count("{}") :]

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of its part of the tensor."""
        shape = self.layer_shape
        if self.path[-1] in ("bias", "scale"):
            return (math.prod(shape),)
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (shape[0] - self.added_rows, *shape[1:])

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (self.tensor_rows or self.part_shape[0], *self.part_shape[1:])

    def tensor_names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield the index on the stacked axes, and the name, of each tensor."""
        for index in np.ndindex(self.stack):
            yield index, self.tensor_name.format(*index)

    def read(self, tensor: TensorSlice) -> Tensor:
        """Read one layer of the parameter from its part of a tensor."""
        part = tensor[self.offset : self.offset + self.part_shape[0]]
        if self.added_rows:
            mean = part.mean(0, keepdims=True, dtype=np.float32).astype(part.dtype)
            part = np.concatenate([part, np.repeat(mean, self.added_rows, 0)])
        return (part.T if self.inputs else part).reshape(self.layer_shape)

    def to_tensor(self, array: Tensor) -> Tensor:
        """Return the part of a tensor that one layer of the parameter is."""
        if not self.inputs:
            return array.reshape(self.part_shape)
        return np.ascontiguousarray(array.reshape(self.part_shape[::-1]).T)


def variables_by_path(params: Params) -> dict[ParamPath, Parameter]:
    """Return the variables of parameters by their paths."""
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}


def input_axes(path: ParamPath) -> int:
    """Return how many input axes a linear layer's weight has; 0 for all else."""
    if path[-1] == "router" or path[-2:-1] == ("experts",):
        return 1
    if path[-1] != "weight":
        return 0
    return 2 if path[-2] == "o" else 1


def stored_parameters(params: Params, config: Config) -> list[StoredParameter]:
    """Describe how the family of a configuration stores parameters, in its order of tensors."""
    variables = variables_by_path(params)
    names = names_of(family_of(config))
    order = {path: index for index, path in enumerate(names)}
    rows: dict[str, int] = {}
    stored = []
    for path in sorted(variables, key=lambda path: order[".".join(path)]):
        variable, name = variables[path], names[".".join(path)]
        parameter = StoredParameter(
            path, tuple(variable.get_value().shape), logical_axes(variable), name,
            input_axes(path), rows.get(name, 0),
        )  # fmt: skip
        if path in TABLES:
            added = max(0, parameter.layer_shape[0] - int(config["vocab_size"]))
            parameter = replace(parameter, added_rows=added)
        rows[name] = parameter.offset + parameter.part_shape[0]
        stored.append(parameter)
    return [replace(parameter, tensor_rows=rows[parameter.tensor_name]) for parameter in stored]


def _by_tensor(parameters: list[StoredParameter]) -> list[list[StoredParameter]]:
    """Group the parameters that share tensors."""
    groups: dict[str, list[StoredParameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.tensor_name, []).append(parameter)
    return list(groups.values())


def tensors(params: Params, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of parameters one by one, as the family of a configuration stores them."""
    variables = variables_by_path(params)

    def part(parameter: StoredParameter, index: tuple[int, ...]) -> Tensor:
        array = variables[parameter.path].get_value()
        return parameter.to_tensor(np.asarray(array[index] if index else array))

    for group in _by_tensor(stored_parameters(params, config)):
        for index, name in group[0].tensor_names():
            parts = [part(parameter, index) for parameter in group]
            yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)


def tensor_shapes(params: Params, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor that `tensors` yields, in the same order."""
    for group in _by_tensor(stored_parameters(params, config)):
        for _, name in group[0].tensor_names():
            yield name, group[0].tensor_shape


def adapter_tensors(params: Params, config: Config) -> Iterator[tuple[str, str, Tensor]]:
    """Yield an adapter as PEFT stores it: the name of a module, of its part, and the tensor.

    Raises `ValueError` for a matrix that the family stores within another one.
    """
    names = {**names_of(family_of(config))}
    shared = {name for name, times in Counter(names.values()).items() if times > 1}
    for path, variable in variables_by_path(params).items():
        *parents, holder, _, part = path
        table = holder.removesuffix("_adapters") if holder != "adapters" else None
        name = names[table or ".".join([*parents, "weight"])]
        module = name.removesuffix(".weight")
        if name in shared:
            raise ValueError(f"`{module.format(0)}` holds several matrices")
        array = np.asarray(variable.get_value())
        if "{}" not in name:
            yield module, *_peft_tensor(array, part, table)
            continue
        for layer, matrix in enumerate(array):
            yield module.format(layer), *_peft_tensor(matrix, part, table)


def _peft_tensor(matrix: Tensor, part: str, table: str | None) -> tuple[str, Tensor]:
    """Return PEFT's name for a part of an adapter, and the part as PEFT stores it."""
    if part == "magnitude":
        return "lora_magnitude_vector", matrix.reshape(-1)
    if table == "embedding":  # PEFT has the look-up first
        return f"lora_embedding_{part.upper()}", matrix.T
    rows = matrix.reshape(-1, matrix.shape[-1]) if part == "a" else matrix.reshape(len(matrix), -1)
    if (part == "a") is (table != "head"):  # the side of the inputs
        return "lora_A.weight", rows.T if part == "a" else rows
    return "lora_B.weight", rows if part == "a" else rows.T
