"""Loads the weights that a stage starts from, with the adapters on top of them.

A stage that trains an adapter keeps only that. It yields the weights that it started from, with
their adapters and its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike

from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture, plain
from tunelang.dsl.vocabulary.training import Adapter, Continued, Lora
from tunelang.runtime.generation.engine_sizes import sampling_layout_over
from tunelang.runtime.generation.text_generator import TextGenerator
from tunelang.runtime.loading import pretrained
from tunelang.runtime.models.decoder import Decoder
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import (
    Params,
    abstract_decoder,
    merge_params,
    split_trainable,
)
from tunelang.runtime.sharding import Layout, shardings
from tunelang.runtime.training.checkpoints import load_params
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state


@dataclass(frozen=True)
class Origin:
    """Weights to start from."""

    model: str
    """The declared model."""
    path: Path | None
    """The checkpoint of all weights; None for the declared model's own."""
    adapters: tuple[tuple[Lora, Path], ...] = ()
    """The adapters on top of the weights, each with its checkpoint."""
    scores: bool = False
    """Whether they are of a reward model."""
    node: str | None = None
    """The stage; None for the declared model."""
    evals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Digest of an eval -> its metrics for these weights."""


def initial_params(
    origin: Origin,
    adapter: Adapter | None,
    model: Model,
    layout: Layout,
    seed: int,
    scores: bool = False,
) -> tuple[Architecture, Params]:
    """Return the architecture that a stage trains, and its initial parameters.

    `seed` is of random weights; with `scores` the head yields a number. Raises `NoTargetError`,
    `BadWeightsError`, `CheckpointError`.
    """
    loras = tuple(lora for lora, _ in origin.adapters)
    base = _base_architecture(origin, model)
    if adapter is None:
        architecture, params = base, load_merged(origin, model, layout, seed)
    elif isinstance(adapter, Continued):
        architecture = adapted(base, loras, model.storage)
        params = _load_with_adapters(origin, architecture, model, layout)
    else:
        assert isinstance(adapter, Lora)
        architecture = adapted(base, (*loras, adapter), model.storage)
        params = _load_with_adapters(origin, architecture, model, layout)
        params = _add_adapter(params, architecture, layout, model.dtype, seed)
    if not scores or origin.scores:
        return architecture, params
    drawn = architecture.width**-0.5 * jax.random.normal(
        jax.random.key(seed), (architecture.width,)
    )
    return with_score_head(architecture, params, score_head(architecture, drawn, layout))


def score_head(architecture: Architecture, weight: jax.Array, layout: Layout) -> Params:
    """Return a head of one number as parameters; `weight` is `[width]` float32."""
    _, abstract = abstract_decoder(replace(architecture, scores=True), weight.dtype)
    place = shardings(abstract, layout)["score"].get_value()
    head = dict(nnx.to_flat_state(abstract))["score",].replace(jax.device_put(weight, place))
    return nnx.from_flat_state([(("score",), head)])


def with_score_head(
    architecture: Architecture, params: Params, head: Params
) -> tuple[Architecture, Params]:
    """Replace the head that yields logits by one that yields a number."""
    return replace(architecture, scores=True), merge_params(_without_head(params), head)


def _without_head(params: Params) -> Params:
    """Return the parameters without an output head."""
    return nnx.split_state(params, lambda path, _: path[0] == "head", ...)[1]


def _base_architecture(origin: Origin, model: Model) -> Architecture:
    return replace(plain(model.architecture), scores=origin.scores)


def load_merged(origin: Origin, model: Model, layout: Layout, seed: int) -> Params:
    """Return weights in float32, their adapters merged into them.

    `seed` is of a model's random weights. Raises `BadWeightsError`, `CheckpointError`.
    """
    base = _base_architecture(origin, model)
    if origin.path is None and model.folder is None:
        config = StepConfig(layout=layout, dtype=model.dtype)
        return random_state(base, optax.identity(), config, seed).params
    loras = tuple(lora for lora, _ in origin.adapters)
    storage = model.storage if model.storage in ("nf4", "int8") else "f32"
    architecture = adapted(base, loras, storage)
    params = _load_with_adapters(origin, architecture, model, layout)
    return merge_adapters(params, architecture, layout, model.dtype)


def load_generator(origin: Origin, model: Model, devices: Sequence[jax.Device]) -> TextGenerator:
    """Load a model to generate with, over all devices; raises what `load_merged` raises."""
    layout = sampling_layout_over(devices, model.architecture, model.dtype)
    return TextGenerator(model, load_merged(origin, model, layout, 0), layout)


def abstract_adapter(lora: Lora, model: Model, layout: Layout) -> Params:
    """Return the shapes of the first adapter on a model, to load it; raises `NoTargetError`."""
    architecture = adapted(plain(model.architecture), (lora,), model.storage)
    _, abstract = abstract_decoder(architecture, model.dtype)
    return _with_shardings(split_trainable(architecture, abstract)[0], layout)


def merge_adapters(
    params: Params, architecture: Architecture, layout: Layout, dtype: DTypeLike
) -> Params:
    """Merge the adapters into the weights, float32; the model computes the same function."""
    if not architecture.adapters:
        return params
    graph, _ = abstract_decoder(architecture, dtype)
    _, abstract = abstract_decoder(plain(architecture), dtype)
    make = jax.jit(
        lambda params: nnx.split(nnx.merge(graph, params).merge_adapters())[1],
        out_shardings=shardings(abstract, layout),
    )
    merged: Params = make(params)
    return merged


def _load_with_adapters(
    origin: Origin, architecture: Architecture, model: Model, layout: Layout
) -> Params:
    """Load the base as the architecture stores it, with the adapters that the origin has."""
    storage = architecture.storage
    # With an adapter, the score head is among the adapter's parameters.
    plain_base = replace(plain(architecture), scores=origin.scores and not origin.adapters)
    if origin.path is None:
        assert model.folder is not None
        base = pretrained.load(model.folder, plain_base, layout, storage, model.dtype)
    else:
        shapes = _with_shardings(abstract_decoder(plain_base, model.dtype)[1], layout)
        base = pretrained.convert(load_params(origin.path, shapes), layout, storage, model.dtype)
    if architecture.scores:
        base = _without_head(base)
    parts = [base]
    for place, (_, path) in enumerate(origin.adapters):
        top = replace(
            architecture,
            adapters=architecture.adapters[: place + 1],
            scores=origin.scores and place == len(origin.adapters) - 1,
        )
        _, abstract = abstract_decoder(top, model.dtype)
        parts.append(load_params(path, _with_shardings(split_trainable(top, abstract)[0], layout)))
    return merge_params(*parts)


def _add_adapter(
    params: Params, architecture: Architecture, layout: Layout, dtype: DTypeLike, seed: int
) -> Params:
    """Add the last adapter of an architecture to the parameters below it."""
    _, abstract = abstract_decoder(architecture, dtype)
    trained = split_trainable(architecture, abstract)[0]

    def make(params: Params, seed: jax.Array) -> Params:
        decoder = Decoder(architecture, nnx.Rngs(jax.random.key(seed)), dtype)
        nnx.update(decoder, params)
        decoder.set_magnitudes()
        return split_trainable(architecture, nnx.state(decoder, nnx.Param))[0]

    added = jax.jit(make, out_shardings=shardings(trained, layout))(params, np.uint32(seed % 2**32))
    return merge_params(params, added)


def _with_shardings(abstract: Params, layout: Layout) -> Params:
    shaped: Params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings(abstract, layout),
    )
    return shaped
