"""Tokenizers, models and hardware."""

from typing import Annotated

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Data,
    Flag,
    Function,
    Kind,
    MaybeCount,
    NonNegative,
    Positive,
    Share,
    TokenizerRef,
    placement,
    result,
)

NAMED_CHAT_TEMPLATES = ("chatml", "llama3", "gemma", "plain")
DTYPES = ("f32", "bf16")


class TokenizerKind(Kind):
    """Text to token ids and back, with special tokens and a chat template."""

    chat: Annotated[
        str | None,
        types.Either((types.Choice(NAMED_CHAT_TEMPLATES), types.Text())),
    ] = result(
        "The chat template: a named one, or Jinja as text. Default: the tokenizer's own, else"
        " `plain`: the messages one after another, with the end token after an answer and a line"
        " end after any other message.",
        "chat = chatml",
        None,
    )
    special: Annotated[tuple[str, ...], types.ListOf(types.Text())] = result(
        "More special tokens; each becomes one id, and the embeddings grow.",
        'special = ["<think>", "</think>"]',
        (),
    )


class SentencePiece(TokenizerKind):
    """A SentencePiece model file."""

    path: Annotated[str, types.Path("file", (".model",))] = result(
        "The `.model` file.", 'path = "tokenizer.model"'
    )


class HuggingFace(TokenizerKind):
    """A `tokenizer.json` of the tokenizers library, with its configuration."""

    path: Annotated[str, types.Path("model")] = result(
        "The folder, or an id on the hub.", 'path = "Qwen/Qwen3-0.6B"'
    )


class Bytes(TokenizerKind):
    """One token for each byte of UTF-8, and the special tokens."""


class Trained(TokenizerKind):
    """A SentencePiece model that is trained before the first stage that needs it."""

    data: Data = result("The data to train it on.", "data = corpus")
    vocabulary: Annotated[int, types.Whole(low=16)] = result(
        "Number of tokens, special ones included; an upper limit for the algorithm `char`.",
        "vocabulary = 4Ki",
        4096,
    )
    algorithm: Annotated[str, types.Choice(("unigram", "bpe", "char"))] = result(
        "How the tokens are chosen.", "algorithm = bpe", "unigram"
    )
    byte_fallback: Flag = result(
        "Whether characters without a token become bytes instead of the unknown token.",
        "byte_fallback = false",
        True,
    )
    split_digits: Flag = result(
        "Whether each digit is a token of its own.", "split_digits = true", True
    )


class ModelKind(Kind):
    """Initial weights, and their architecture."""

    dtype: Annotated[str, types.Choice(DTYPES)] = result(
        "The precision of activations and matrix products; trained parameters stay in f32.",
        "dtype = bf16",
        "f32",
    )
    attention: Annotated[str, types.Choice(("auto", "xla", "cudnn", "splash"))] = placement(
        "The attention kernel. `auto` takes the fastest that the hardware supports.",
        "attention = cudnn",
        "auto",
    )


class Pretrained(ModelKind):
    """Weights from safetensors: a folder as `transformers` writes it, or an id on the hub."""

    path: Annotated[str, types.Path("model")] = result(
        "The folder, or the id on the hub.", 'path = "google/gemma-2b"'
    )
    revision: Annotated[str | None, types.Text()] = result(
        "The branch, tag or commit on the hub.", 'revision = "main"', None
    )
    context: Annotated[int | None, types.count("tokens")] = result(
        "The longest sequence. Default: that of the model's configuration.",
        "context = 2Ki",
        None,
    )
    tokenizer: Annotated[TokenizerRef | None, types.Ref(("tokenizer",))] = result(
        "A tokenizer that replaces the model's own.", "tokenizer = llama", None
    )
    weights: Annotated[str | None, types.Choice(("nf4", "int8"))] = result(
        "Quantize the frozen weights; only for stages that train an adapter (QLoRA).",
        "weights = nf4",
        None,
    )


PRESETS = (
    "gemma-2b",
    "gemma-3-1b",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "qwen3-0.6b",
)


class Experts(Function):
    """A mixture of experts with a router that picks the `active` best for each token."""

    family = "experts"
    word = "experts"
    count: Count = result("Number of experts.", "count = 64")
    active: Count = result("Experts for each token.", "active = 8")
    width: MaybeCount = result("Hidden size of an expert. Default: `mlp`.", "width = 768", None)
    balance: NonNegative = result("Weight of the load-balance loss.", "balance = 1e-2", 1e-2)


class Transformer(ModelKind):
    """A decoder with random weights, of the sizes of a preset or of the attributes."""

    tokenizer: TokenizerRef = result("The tokenizer; it sets the vocabulary.", "tokenizer = pieces")
    preset: Annotated[str | None, types.Text(among=PRESETS)] = result(
        "The sizes of a well-known model; attributes override them.",
        'preset = "qwen3-0.6b"',
        None,
    )
    layers: MaybeCount = result("Number of blocks.", "layers = 4", None)
    width: MaybeCount = result("Size of the residual stream.", "width = 128", None)
    heads: MaybeCount = result("Number of query heads.", "heads = 4", None)
    kv_heads: MaybeCount = result(
        "Number of key and value heads. Default: as many as query heads.", "kv_heads = 1", None
    )
    head_dim: MaybeCount = result(
        "Size of a head. Default: `width / heads`.", "head_dim = 64", None
    )
    mlp: MaybeCount = result(
        "Hidden size of the feed-forward layer. Default: `4 * width`, or `8/3 * width` for gated"
        " activations, rounded up to a multiple of 32.",
        "mlp = 512",
        None,
    )
    context: Annotated[int, types.count("tokens")] = result(
        "The longest sequence.", "context = 256", 1024
    )
    activation: Annotated[str, types.Choice(("swiglu", "geglu", "gelu", "relu"))] = result(
        "The activation of the feed-forward layer; the first two are gated.",
        "activation = gelu",
        "swiglu",
    )
    norm: Annotated[str, types.Choice(("rms", "layer"))] = result(
        "The normalisation before each sub-layer.", "norm = layer", "rms"
    )
    position: Annotated[str, types.Choice(("rope", "learned"))] = result(
        "How positions are encoded: rotary embeddings, or learned vectors.",
        "position = learned",
        "rope",
    )
    rope_base: Positive = result("The base of the rotary frequencies.", "rope_base = 1e6", 10_000.0)
    tied: Flag = result("Whether the head shares the embedding's weights.", "tied = false", True)
    qk_norm: Flag = result("Whether queries and keys are normalised.", "qk_norm = true", False)
    window: MaybeCount = result(
        "Attend only to this many tokens, the current one included. Default: all.",
        "window = 512",
        None,
    )
    logit_cap: Annotated[float | None, types.Number(above=0)] = result(
        "Soft cap of the logits, `cap * tanh(logits / cap)`.", "logit_cap = 30", None
    )
    experts: Annotated[Experts | None, types.Of("experts")] = result(
        "A mixture of experts in place of each feed-forward layer.",
        "experts = experts(count = 8, active = 2)",
        None,
    )
    dropout: Share = result("Dropout while training.", "dropout = 10%", 0.0)


class HardwareKind(Kind):
    """A set of devices. A plan for them needs no access to them."""

    price: Annotated[float | None, types.Price()] = placement(
        "Price of a device, for the estimate of the plan.", "price = 1.2 per device_hour", None
    )


class Local(HardwareKind):
    """The devices of this machine."""

    devices: MaybeCount = placement(
        "Use only this many devices, the first ones.", "devices = 4", None
    )


class Tpu(HardwareKind):
    """One or more slices of TPU chips."""

    topology: Annotated[str, types.Text()] = placement(
        "The generation and the shape of a slice.", 'topology = "v5e:4x8"'
    )
    slices: Count = placement("Number of slices.", "slices = 2", 1)


class Gpu(HardwareKind):
    """Nodes of NVIDIA GPUs."""

    kind: Annotated[str, types.Text(among=("a100", "h100", "h200", "b200"))] = placement(
        "The model of the GPU.", 'kind = "h200"'
    )
    nodes: Count = placement("Number of nodes.", "nodes = 8", 1)
    devices: Count = placement("GPUs in a node.", "devices = 8", 8)


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": _CUBES,
}
"""TPU generation -> shapes of a slice (Google Cloud's documentation of each)."""


TOKENIZERS: dict[str, type[TokenizerKind]] = {
    "sentencepiece": SentencePiece,
    "huggingface": HuggingFace,
    "bytes": Bytes,
    "trained": Trained,
}
MODELS: dict[str, type[ModelKind]] = {"pretrained": Pretrained, "transformer": Transformer}
HARDWARE: dict[str, type[HardwareKind]] = {"local": Local, "tpu": Tpu, "gpu": Gpu}
FUNCTIONS: tuple[type[Function], ...] = (Experts,)
