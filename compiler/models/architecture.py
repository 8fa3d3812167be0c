"""A decoder-only transformer as data: its sizes and choices, and the counts that follow from them.

`Architecture` is the one record that drives the decoder, the cost model and the conversion of
checkpoints. A model family is a row of it. Nothing here touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunelang.dsl.vocabulary.models import Transformer

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "both"]
Position = Literal["rope", "learned"]
Span = Literal["local", "global"]
Storage = Literal["f32", "bf16", "nf4", "int8"]
"""How matrices are kept; only frozen ones are in less than float32."""
STORED_BYTES: dict[str, float] = {"f32": 4, "bf16": 2, "nf4": 0.5 + 4 / 64, "int8": 1}
"""Bytes of a stored parameter; of nf4 with the scales of its tiles, each of 64."""

GATED: frozenset[str] = frozenset({"swiglu", "geglu"})
"""Activations that multiply two projections (GLU variants, arXiv:2002.05202)."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low rotary frequencies divided by `factor`, high ones kept, those between interpolated
    (Llama 3.1). The bounds are `original_context` over a wavelength.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts in place of each feed-forward layer."""

    count: int
    active: int
    """Experts for each token: those of the highest probability."""
    width: int
    """Hidden size of an expert."""
    balance: float = 1e-2
    """Weight of the load-balance loss while training on given sequences."""
    normalised: bool = True
    """Whether the weights of the experts of a token are made to add up to 1."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank update (LoRA, arXiv:2106.09685) of some matrices."""

    rank: int
    scale: float
    """Factor of the update: `alpha / rank`, or `alpha / sqrt(rank)`."""
    matrices: tuple[str, ...]
    """Paths, as in `matrices`."""
    dropout: float = 0.0
    magnitudes: bool = False
    """Whether the update is of directions, beside learned magnitudes (DoRA, arXiv:2402.09353)."""


RopeScaling = LinearScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only transformer. Raises `ValueError` where its values contradict each other."""

    vocabulary: int
    """Rows of the embedding."""
    layers: int
    width: int
    """Size of the residual stream."""
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    """Hidden size of the feed-forward layer."""
    context: int
    """The longest sequence; with learned positions, also the rows of their table."""

    activation: Activation = "swiglu"
    norm: Norm = "rms"
    norm_placement: NormPlacement = "pre"
    """On the input of each sub-layer, on its output before it is added, or on both."""
    norm_epsilon: float = 1e-6
    norm_unit_offset: bool = False
    """Whether the stored scale is a distance from 1 (Gemma)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised over `head_dim` before the rotation."""
    qk_norm_joint: bool = False
    """Whether that is over all heads at once (OLMo 2)."""

    position: Position = "rope"
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    """Scaling of the global layers."""
    rope_local_base: float | None = None
    """The base of the local layers, which then have no scaling (Gemma 3); `None`: as the others."""

    window: int | None = None
    """How many tokens a local layer attends to, the current one included."""
    pattern: tuple[Span, ...] = ("global",)
    """The kinds of layers, repeated over the depth and cut off at its end."""

    query_scale: float | None = None
    """Factor of the attention logits; `None`: `head_dim ** -0.5`."""
    attention_cap: float | None = None
    """Soft cap of the attention logits (Gemma 2)."""
    logit_cap: float | None = None
    """Soft cap of the output logits, `cap * tanh(logits / cap)`."""
    embedding_scale: float = 1.0
    """Factor of the embedded tokens; `sqrt(width)` in Gemma."""
    tied: bool = True
    """Whether the output head is the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    experts: Mixture | None = None
    dropout: float = 0.0
    """Dropout of the embedding and of each sub-layer's output, while training."""

    scores: bool = False
    """Whether the head yields one number in place of logits: a reward model, a critic."""

    adapters: tuple[Adapter, ...] = ()
    """On top of each other. With some, all but the last is frozen."""
    storage: Storage = "f32"
    """How the matrices are kept; in less than float32 only beside adapters."""

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "layers", "width", "heads", "kv_heads", "head_dim", "mlp", "context")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and has to be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide into {self.kv_heads} kv_heads")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, and rotary embeddings need an even one")
        if not self.pattern:
            raise ValueError("the pattern of layers is empty")
        if "local" in self.pattern and (self.window is None or self.window < 1):
            raise ValueError("local layers need a window of at least 1 token")
        if self.experts is not None and not 1 <= self.experts.active <= self.experts.count:
            active, count = self.experts.active, self.experts.count
            raise ValueError(f"{active} of {count} experts for each token")
        if self.experts is not None and not self.gated:
            raise ValueError(f"experts are gated, and {self.activation} is not")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, and has to be in [0, 1)")
        if self.storage != "f32" and not self.adapters:
            raise ValueError(f"weights in {self.storage} are frozen, and there is no adapter")
        if self.storage == "nf4" and (self.head_dim % 2 or self.mlp % 2 or self.width % 2):
            raise ValueError("nf4 needs an even width, head_dim and mlp: two weights share a byte")

    @property
    def gated(self) -> bool:
        """Return whether the feed-forward layer multiplies two projections."""
        return self.activation in GATED

    @property
    def spans(self) -> tuple[Span, ...]:
        """Local or global, for each layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.layers))


def plain(architecture: Architecture) -> Architecture:
    """Return the architecture without adapters."""
    return replace(architecture, adapters=(), storage="f32")


_SAME_NAME = (
    "layers", "width", "heads", "kv_heads", "head_dim", "mlp", "context", "activation", "norm",
    "position", "rope_base", "tied", "qk_norm", "logit_cap", "dropout",
)  # fmt: skip
"""Attributes of a `transformer` that are fields of an `Architecture`."""


def from_transformer(
    model: Transformer, vocabulary: int, presets: Mapping[str, Architecture]
) -> Architecture:
    """Return the architecture of a `transformer` whose tokenizer has `vocabulary` tokens.

    With a preset, the attributes that the spec states go before the preset's. Without one, what
    is left out follows from the rest: `kv_heads` from `heads`, `head_dim` from `width / heads`,
    `mlp` from `width`.

    Raises `ValueError` where sizes are missing or contradict each other, and `KeyError` for an
    unknown preset.
    """
    if model.preset is not None:
        stated = model.model_fields_set
        row = replace(presets[model.preset], vocabulary=vocabulary)
    else:
        stated = set(type(model).model_fields)
        row = None
    values: dict[str, Any] = {name: getattr(model, name) for name in _SAME_NAME if name in stated}
    if "window" in stated:
        values["window"] = model.window
        values["pattern"] = ("global",) if model.window is None else ("local",)
    if "experts" in stated and model.experts is not None:
        mlp = values.get("mlp") or (row.mlp if row is not None else None)
        derived_mlp = mlp or _derived(model.width or 0, model.heads or 1, model.activation)["mlp"]
        values["experts"] = Mixture(
            count=model.experts.count,
            active=model.experts.active,
            width=model.experts.width or derived_mlp,
            balance=model.experts.balance,
        )
    if row is not None:
        return replace(row, **values)
    missing = [name for name in ("layers", "width", "heads") if values[name] is None]
    if missing:
        raise ValueError(f"a transformer without a preset needs {', '.join(missing)}")
    derived = _derived(model.width or 0, model.heads or 0, model.activation)
    values.update({name: size for name, size in derived.items() if values[name] is None})
    return Architecture(vocabulary=vocabulary, **values)


def _derived(width: int, heads: int, activation: Activation | str) -> dict[str, int]:
    mlp = width * 8 / 3 if activation in GATED else width * 4
    return {"kv_heads": heads, "head_dim": width // heads, "mlp": 32 * math.ceil(mlp / 32)}
