"""A decoder-only transformer as data: its sizes and choices, and the counts that follow from them.

`Architecture` is the one record that drives the decoder, the cost model and the conversion of
checkpoints. A model family is a row of it. Nothing here touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tunelang.compiler.models.adapters import Adapter, Storage, adapter_parameters
from tunelang.dsl.vocabulary.models import Transformer

Activation = Literal["swiglu", "geglu", "gelu", "relu"]
Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "both"]
Position = Literal["rope", "learned"]
Span = Literal["local", "global"]

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
        """Whether the feed-forward layer multiplies two projections."""
        return self.activation in GATED

    @property
    def spans(self) -> tuple[Span, ...]:
        """Local or global, for each layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.layers))


def plain(architecture: Architecture) -> Architecture:
    """Return the architecture without adapters."""
    return replace(architecture, adapters=(), storage="f32")


def _block_parameters(architecture: Architecture) -> dict[str, int]:
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    projections = 3 if a.gated else 2
    norm = 2 if a.norm == "layer" else 1
    norms = 4 if a.norm_placement == "both" else 2
    mlp = projections * a.width * a.mlp
    if a.experts is not None:
        mlp = a.width * a.experts.count * (1 + projections * a.experts.width)
    return {
        "attention": 2 * a.width * (queries + keys),
        "mlp": mlp,
        "vectors": norms * norm * a.width
        + a.qk_norm * norm * (queries + keys if a.qk_norm_joint else 2 * a.head_dim)
        + a.qkv_bias * (queries + 2 * keys)
        + a.output_bias * a.width
        + a.mlp_bias * ((projections - 1) * a.mlp + a.width),
    }


def parameter_count(architecture: Architecture) -> int:
    """How many numbers there are beside adapters; a tied head is counted once."""
    a = architecture
    head = 1 if a.scores else a.vocabulary * (not a.tied)
    tables = a.vocabulary + head + (a.context if a.position == "learned" else 0)
    final_norm = a.width * (2 if a.norm == "layer" else 1)
    return tables * a.width + final_norm + a.layers * sum(_block_parameters(a).values())


def expert_count(architecture: Architecture) -> int:
    """How many numbers the matrices of all experts hold."""
    a = architecture
    return 0 if a.experts is None else a.layers * a.experts.count * 3 * a.width * a.experts.width


def trained_count(architecture: Architecture) -> int:
    """How many numbers are trained: those of the last adapter, or all."""
    if not architecture.adapters:
        return parameter_count(architecture)
    head = architecture.width if architecture.scores else 0
    return head + adapter_parameters(architecture, architecture.adapters[-1])


def matmul_parameters(architecture: Architecture) -> int:
    """Count the parameters that each token is multiplied with: all matrices and the head, but
    not the look-up in the embedding, and of experts only those that are active.
    """
    a = architecture
    block = _block_parameters(a)
    mlp = block["mlp"]
    if a.experts is not None:
        mlp = a.width * (a.experts.count + 3 * a.experts.active * a.experts.width)
    head = 1 if a.scores else a.vocabulary
    return head * a.width + a.layers * (block["attention"] + mlp)


def _mean_visible(length: int, window: int) -> float:
    """Mean over `t < length` of `min(t + 1, window)`, the keys that a query attends to."""
    window = min(window, length)
    return window - window * (window - 1) / (2 * length)


def forward_flops(architecture: Architecture, length: int) -> float:
    """FLOPs of the forward pass for one token of a sequence of `length` tokens.

    Two for each parameter of a matrix product, and `4 * heads * head_dim` for each key that is
    attended to, with causal masking and windows taken into account: what has to be computed, as
    model FLOPs utilisation counts it (PaLM, arXiv:2204.02311, appendix B; there without masking).
    """
    a = architecture
    keys = sum(
        _mean_visible(length, (a.window or length) if span == "local" else length)
        for span in a.spans
    )
    return 2.0 * matmul_parameters(a) + 4.0 * a.heads * a.head_dim * keys


def train_flops(architecture: Architecture, length: int) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass, without what
    rematerialisation repeats. Frozen matrices have no gradient of their own.
    """
    a = architecture
    if not a.adapters:
        return 3.0 * forward_flops(a, length)
    adapters = sum(adapter_parameters(a, each) for each in a.adapters)
    frozen = 2.0 * matmul_parameters(a)
    return 3.0 * forward_flops(a, length) - frozen + 6.0 * adapters


def kv_bytes_per_token(architecture: Architecture, bytes_per_value: int) -> int:
    """Bytes of the KV cache for each token of a slot; every layer keeps the whole length."""
    a = architecture
    return 2 * a.layers * a.kv_heads * a.head_dim * bytes_per_value


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
