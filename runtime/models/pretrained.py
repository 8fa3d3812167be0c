"""Published checkpoints: a folder of safetensors as `transformers` writes it, in and out.

Reading goes tensor by tensor straight to where each parameter lies, so that the host never holds
more than one. A linear layer is stored as `[outputs, inputs]` and kept as `[*inputs, *outputs]`;
layers that are stored apart are stacked.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from tunelang.compiler.models.architecture import Architecture, Storage
from tunelang.compiler.models.families import (
    BadConfigError,
    Config,
    UnknownFamilyError,
    architecture_of,
    family_of,
    names_of,
)
from tunelang.compiler.models.presets import PRESETS, PUBLISHED
from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.models import Pretrained
from tunelang.runtime import hub
from tunelang.runtime.models.parameters import Params, abstract_decoder
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.models.quantization import quantized
from tunelang.runtime.sharding import Layout, logical_axes

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 4


@dataclass(eq=False)
class BadWeightsError(TuneError):
    """A folder whose weights cannot be read, or are not those of its configuration: its `path`, and
    `problems` in words.
    """

    code = "weights-fail"
    path: Path
    problems: tuple[str, ...]

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.bad_weights(self.path.name, self.problems)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(file=self.path)

    def __str__(self) -> str:
        return f"{self.path}: {'; '.join(self.problems)}"


@dataclass(frozen=True)
class _Leaf:
    """A parameter, and how it is stored."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    name: str
    """Of its tensor; with `{}` for each axis that is stacked: the layer, the expert."""
    inputs: int
    """Input axes of a linear layer's weight, without stacked ones; 0 for all else."""
    offset: int = 0
    """Its first row in a tensor that holds several parameters one below the other."""
    fused: int | None = None
    """Rows of such a tensor."""
    added: int = 0
    """Rows of a table that the file does not have: of tokens that were added."""

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return self.shape[: self.name.count("{}")]

    @property
    def own(self) -> tuple[int, ...]:
        """The shape without stacked axes."""
        return self.shape[self.name.count("{}") :]

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of its part of the tensor."""
        if self.path[-1] in ("bias", "scale"):
            return (math.prod(self.own),)
        if self.inputs:
            return math.prod(self.own[self.inputs :]), math.prod(self.own[: self.inputs])
        return (self.own[0] - self.added, *self.own[1:])

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return (self.fused or self.rows[0], *self.rows[1:])

    def tensors(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Give the place on the stacked axes, and the name, of each tensor."""
        for place in np.ndindex(self.stack):
            yield place, self.name.format(*place)

    def read(self, tensor: Any) -> NDArray[Any]:
        """Return the parameter's part of a tensor, which is a slice of a file."""
        part = tensor[self.offset : self.offset + self.rows[0]]
        if self.added:
            mean = part.mean(0, keepdims=True, dtype=np.float32).astype(part.dtype)
            part = np.concatenate([part, np.repeat(mean, self.added, 0)])
        own: NDArray[Any] = (part.T if self.inputs else part).reshape(self.own)
        return own

    def written(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the part of a tensor that a parameter is."""
        if not self.inputs:
            return array.reshape(self.rows)
        return np.ascontiguousarray(array.reshape(self.rows[::-1]).T)


def folder_of(kind: Pretrained, beside: Path) -> Path:
    """Return the folder of a declared model; `beside` is what its path is relative to.

    Raises `BadWeightsError` where there is none.
    """
    try:
        return hub.folder_of(kind.path, beside, kind.revision)
    except hub.NoModelError as error:
        raise BadWeightsError(Path(kind.path), (error.why, error.fix)) from None


def planned(kind: Pretrained, beside: Path) -> Architecture:
    """Return the architecture of a declared model to plan for: nothing is fetched but its
    configuration, and not that of models whose sizes are known.

    Raises `BadWeightsError`.
    """
    folder = hub.cached_config(kind.path, beside, kind.revision)
    if folder is not None:
        return architecture(kind, folder)
    if kind.path in PUBLISHED:
        found = PRESETS[PUBLISHED[kind.path]]
        return found if kind.context is None else replace(found, context=kind.context)
    try:
        folder = hub.folder_of(kind.path, beside, kind.revision, hub.DESCRIBING)
    except hub.NoModelError as error:
        raise BadWeightsError(Path(kind.path), (error.why, error.fix)) from None
    return architecture(kind, folder)


def architecture(kind: Pretrained, folder: Path) -> Architecture:
    """Return the architecture of a declared model.

    Raises `BadWeightsError`.
    """
    try:
        found = architecture_of(configuration(folder))
    except (BadConfigError, UnknownFamilyError) as error:
        raise BadWeightsError(folder, (str(error),)) from None
    return found if kind.context is None else replace(found, context=kind.context)


def resized(architecture: Architecture, tokens: int) -> Architecture:
    """Return the architecture with an embedding for at least so many tokens.

    `load` gives the rows that a file does not have the mean of those that it has: a new token is
    neither likelier nor less likely than the others at first.
    """
    return replace(architecture, vocabulary=max(architecture.vocabulary, tokens))


def configuration(folder: Path) -> Config:
    """Return a folder's `config.json`; raises `BadWeightsError`."""
    try:
        found = json.loads((folder / hub.CONFIG).read_text("utf-8"))
    except OSError as error:
        why = (error.strerror or "it cannot be read").lower()
        raise BadWeightsError(folder, (f"`{hub.CONFIG}`: {why}",)) from None
    except ValueError:
        raise BadWeightsError(folder, (f"`{hub.CONFIG}` is not JSON",)) from None
    if not isinstance(found, dict):
        raise BadWeightsError(folder, (f"`{hub.CONFIG}` is not an object",))
    # Models that see and hear keep their language model's part apart.
    inner = found.get("text_config")
    return inner if isinstance(inner, dict) and "hidden_size" in inner else found


def load(
    folder: Path,
    architecture: Architecture,
    layout: Layout,
    storage: Storage = "f32",
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Return the decoder's parameters as `storage` keeps them, each where the layout has it.

    `dtype` is that of activations. Raises `BadWeightsError`, which names every tensor that is
    missing, left over or misshapen, and `UnknownFamilyError`.
    """
    config = configuration(folder)
    _, abstract = abstract_decoder(architecture, jnp.float32)
    leaves = _leaves(abstract, config)
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


def kept(params: Params, layout: Layout, storage: Storage, dtype: DTypeLike) -> Params:
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


def tensors(params: Params, config: Config) -> Iterator[tuple[str, NDArray[Any]]]:
    """Give the tensors of parameters one by one, as the family of a configuration stores them."""
    flat = {tuple(map(str, path)): value for path, value in nnx.to_flat_state(params)}

    def part(leaf: _Leaf, place: tuple[int, ...]) -> NDArray[Any]:
        array = flat[leaf.path].get_value()
        return leaf.written(np.asarray(array[place] if place else array))

    for leaves in _fused(_leaves(params, config)):
        for place, name in leaves[0].tensors():
            parts = [part(leaf, place) for leaf in leaves]
            yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)


def tensor_shapes(params: Params, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give name and shape of what `tensors` gives, in the same order."""
    for leaves in _fused(_leaves(params, config)):
        for _, name in leaves[0].tensors():
            yield name, leaves[0].stored


def adapter_tensors(params: Params, config: Config) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Give an adapter as PEFT stores it: the name of a module, of its part, and the tensor.

    Raises `ValueError` for a matrix that the family stores within another one.
    """
    names = {**names_of(family_of(config))}
    fused = {name for name, times in Counter(names.values()).items() if times > 1}
    for path, value in nnx.to_flat_state(params):
        *inside, holder, _, part = map(str, path)
        table = holder.removesuffix("_adapters") if holder != "adapters" else None
        name = names[table or ".".join([*inside, "weight"])]
        module = name.removesuffix(".weight")
        if name in fused:
            raise ValueError(f"`{module.format(0)}` holds several matrices")
        array = np.asarray(value.get_value())
        for layer in range(len(array)) if "{}" in name else [None]:
            one = array if layer is None else array[layer]
            if part == "magnitude":
                yield module.format(layer), "lora_magnitude_vector", one.reshape(-1)
            elif table == "embedding":  # PEFT has the look-up first
                yield module, f"lora_embedding_{part.upper()}", one.T
            elif (part == "a") is (table != "head"):  # the side of the inputs
                rank = one.shape[-1] if part == "a" else one.shape[0]
                rows = one.reshape(-1, rank).T if part == "a" else one.reshape(rank, -1)
                yield module.format(layer), "lora_A.weight", rows
            else:
                rank = one.shape[-1] if part == "a" else one.shape[0]
                rows = one.reshape(-1, rank) if part == "a" else one.reshape(rank, -1).T
                yield module.format(layer), "lora_B.weight", rows


def _leaves(state: Params, config: Config) -> list[_Leaf]:
    flat = {tuple(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    names = names_of(family_of(config))
    order = {path: at for at, path in enumerate(names)}
    rows: dict[str, int] = {}
    found = []
    for path in sorted(flat, key=lambda path: order[".".join(path)]):
        value, name = flat[path], names[".".join(path)]
        leaf = _Leaf(
            path, tuple(value.get_value().shape), logical_axes(value), name, _inputs(path),
            rows.get(name, 0),
        )  # fmt: skip
        if path in (("embedding",), ("head",)):
            leaf = replace(leaf, added=max(0, leaf.own[0] - int(config["vocab_size"])))
        rows[name] = leaf.offset + leaf.rows[0]
        found.append(leaf)
    return [replace(leaf, fused=rows[leaf.name]) for leaf in found]


def _fused(leaves: list[_Leaf]) -> list[list[_Leaf]]:
    """Group the parameters that share tensors."""
    groups: dict[str, list[_Leaf]] = {}
    for leaf in leaves:
        groups.setdefault(leaf.name, []).append(leaf)
    return list(groups.values())


def _inputs(path: tuple[str, ...]) -> int:
    """Return how many input axes a linear layer's weight has; 0 for all else."""
    if path[-1] == "router" or path[-2:-1] == ("experts",):
        return 1
    if path[-1] != "weight":
        return 0
    return 2 if path[-2] == "o" else 1


Arrays = tuple[jax.Array, ...]


def _form(
    path: tuple[str, ...], inputs: int, storage: Storage, dtype: DTypeLike
) -> Callable[[jax.Array], Arrays]:
    """Return what makes a parameter, of one layer, what is kept of it: with the scales, if any."""

    def form(array: jax.Array) -> Arrays:
        array = array.astype(jnp.float32)
        if path[-1] == "weight" and storage in ("nf4", "int8"):
            return quantized(array, inputs, storage)
        if path[-2:-1] == ("experts",):
            return (array.astype(DTYPES.get(storage, jnp.bfloat16)),)
        if path[-1] == "weight" or path in (("embedding",), ("head",)):
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
    wanted = {name: leaf for leaf in leaves for _, name in leaf.tensors()}
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


def _by_file(files: Mapping[str, Path], wanted: Iterable[str]) -> dict[Path, list[str]]:
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
            return leaf.read(file.get_slice(name))

    stack = len(leaf.stack)
    slot = layout.sharding(leaf.axes[stack:], leaf.own)
    given = jax.ShapeDtypeStruct(leaf.own, jnp.float32)
    made = [
        jax.ShapeDtypeStruct((*leaf.stack, *each.shape), each.dtype)
        for each in jax.eval_shape(form, given)
    ]
    places = tuple(layout.sharding(leaf.axes, each.shape) for each in made)
    if not stack:
        whole: Arrays = jax.jit(form, out_shardings=places)(jax.device_put(read(leaf.name), slot))
        return whole
    into: Arrays = jax.jit(
        lambda: tuple(jnp.zeros(each.shape, each.dtype) for each in made), out_shardings=places
    )()

    def put(into: Arrays, array: jax.Array, at: jax.Array) -> Arrays:
        parts = zip(into, form(array), strict=True)
        return tuple(whole.at[tuple(at)].set(part) for whole, part in parts)

    put_in = jax.jit(put, donate_argnums=0, out_shardings=places)
    for place, name in leaf.tensors():
        into = put_in(into, jax.device_put(read(name), slot), np.array(place, np.int32))
    return into


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
