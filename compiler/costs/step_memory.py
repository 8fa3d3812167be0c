"""Bytes in a device that an update makes and frees again: activations, the loss, the backward pass.

Each part is counted as the compiled programs hold it at the peak; `factors.py` says how often.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunelang.compiler.costs.factors import FACTORS, Factors
from tunelang.compiler.costs.model_sizes import (
    ModelSizes,
    is_quantised,
    key_shards,
    table_parameters,
)
from tunelang.compiler.layout.hardware import Chip
from tunelang.compiler.layout.stage_layout import CHUNK, StageLayout
from tunelang.compiler.models.architecture import Architecture

LANES = 128
"""Numbers that TPUs pad the last axis of an array to, such as that of a narrow attention head. A
table whose part in a device is not a multiple of it along the width is transposed as it is
gathered: a frozen one is there twice."""
_RETILED = frozenset({"tpu7x"})
"""Chips for which XLA tiles frozen arrays in bfloat16 anew: it copies those of all layers ahead of
them, and the head as it is gathered."""


@dataclass(frozen=True)
class TokenShare:
    """The tokens of one device in a micro-batch."""

    sequences: int
    tokens: int
    """Tokens of a branch, where sequences are split those of their part."""
    scored: int
    """Positions of a sequence that have logits."""


@dataclass(frozen=True)
class _LayerNumbers:
    """Numbers that a layer makes for each token in a device."""

    queries: float
    keys: float
    mlp: float
    hidden: float
    """Hidden units, with those of the gate."""
    scores: float
    """Logits of attention, where the kernel holds them."""
    padding: float
    """Factor by which narrow heads are padded."""

    @property
    def heads(self) -> float:
        """Queries, keys and values."""
        return self.queries + 2 * self.keys


def temporaries(
    a: Architecture, sizes: ModelSizes, layout: StageLayout, chip: Chip, share: TokenShare
) -> dict[str, int]:
    """Return the bytes in a device of what an update makes and frees again, by part."""
    factors = FACTORS[chip.platform]
    numbers = _layer_numbers(a, layout, chip)
    tokens = layout.branches * share.tokens
    head = _gathered_head_bytes(a, sizes, layout)
    activations = tokens * sizes.dtype_bytes * a.layers * _kept_numbers(a, layout, numbers, chip)
    backward = tokens * sizes.dtype_bytes * _backward_numbers(a, layout, numbers, chip)
    backward += _gathered_weight_bytes(a, sizes, layout, factors, head)
    loss = factors["hidden_states"] * tokens * sizes.dtype_bytes * a.width
    loss += _loss_bytes(a, sizes, layout, chip, share, head)
    if chip.vmem:  # holds what is small and soon used; of the loss that is mostly logits
        backward = max(0.0, backward - factors["vector_memory"] * chip.vmem)
        loss = max(0.0, loss - factors["vector_memory"] * chip.vmem / 2)
    return {"activations": int(activations), "loss": int(loss), "backward": int(backward)}


def copied_weights(
    a: Architecture, sizes: ModelSizes, layout: StageLayout, chip: Chip, trained: int
) -> int:
    """Return the bytes in a device of the weights that XLA copies ahead of the layers; `trained`
    numbers of a device are trained.
    """
    mesh = layout.mesh
    shards = mesh["fsdp"] * mesh["context"] * mesh["tensor"]
    copied = 0.0
    if chip.platform == "tpu" and sizes.dtype_bytes == 2:
        tables = 0 if a.adapters else layout.branches * table_parameters(a)
        copied += FACTORS["tpu"]["cast_weights"] * 2 * (trained - tables / shards)
    if _is_retiled(a, sizes, chip) and a.storage == "bf16":
        copied += (sizes.stored_bytes - 2 * table_parameters(a)) / shards
        if a.head_dim == LANES:  # their tiles are those of queries, keys and values already
            heads = a.heads + 2 * a.kv_heads
            copied -= 2 * a.layers * a.width * heads * a.head_dim / shards
    if chip.platform == "gpu" and a.adapters and a.storage == "bf16" and shards > mesh["tensor"]:
        # Matrices that write to the residual stream are split along their last axis: transposed.
        down = a.layers * a.mlp * a.width if a.experts is None else sizes.experts / 3
        copied += 2 * (a.layers * a.heads * a.head_dim * a.width + down) / shards
    return int(copied)


def _layer_numbers(a: Architecture, layout: StageLayout, chip: Chip) -> _LayerNumbers:
    tensor = layout.mesh["tensor"]
    mlp: float = a.mlp / tensor
    if a.experts is not None:  # the tokens of each expert, and what it makes of them
        mlp = a.experts.active * (a.experts.width / tensor + a.width)
    keys = a.kv_heads * a.head_dim / key_shards(a, tensor)
    return _LayerNumbers(
        queries=a.heads * a.head_dim / tensor,
        keys=keys * layout.mesh["context"],  # gathered
        mlp=mlp,
        hidden=mlp * (2 if a.gated else 1),
        # The only kernel that holds all logits of attention.
        scores=a.heads / tensor * layout.length if layout.kernel == "xla" else 0.0,
        padding=max(1.0, LANES / a.head_dim) if chip.platform == "tpu" else 1.0,
    )


def _kept_numbers(
    a: Architecture, layout: StageLayout, numbers: _LayerNumbers, chip: Chip
) -> float:
    """Return the numbers of a token that each layer keeps for the backward pass."""
    adapters = sum(adapter.rank * len(adapter.matrices) for adapter in a.adapters)
    match layout.remat:
        case "full":
            return a.width
        case "dots" if is_quantised(a):
            return a.width + adapters  # products with quantised matrices are computed again
        case "dots":
            # A norm behind a product needs it in the backward pass.
            products = 2 if a.norm_placement == "pre" else 3
            return numbers.heads + products * a.width + numbers.hidden + adapters
    norms = 6 if a.norm_placement == "both" else 4  # inputs and outputs
    kept = norms * a.width + _attended_numbers(a, numbers, chip) + numbers.hidden + numbers.mlp
    return kept + adapters + 3 * numbers.scores  # logits, float32, and their softmax


def _attended_numbers(a: Architecture, numbers: _LayerNumbers, chip: Chip) -> float:
    """Return the numbers of a token that attention keeps: queries, keys, values and its result."""
    attended = 2 * (numbers.queries + numbers.keys) * numbers.padding
    if chip.platform == "tpu":  # the result is transposed for the product that follows
        attended += numbers.queries
    if a.qk_norm:
        attended += numbers.queries + numbers.keys
    if a.rope_local_base is not None:  # sines and cosines, float32, differ by layer
        attended += 2 * a.head_dim
    return attended


def _backward_numbers(
    a: Architecture, layout: StageLayout, numbers: _LayerNumbers, chip: Chip
) -> float:
    """Return the numbers of a token that the backward pass of one layer works with."""
    factors, form = FACTORS[chip.platform], _form(a)
    activation = factors.get(f"{a.activation}_on_{chip.name}", factors.get(a.activation, 1.0))
    mask = factors["attention_mask"] * layout.length if layout.kernel == "cudnn" else 0
    return (
        factors[f"{form}_width"] * a.width
        + factors["attention_heads"] * numbers.heads * numbers.padding
        + factors[f"{form}_hidden"] * numbers.hidden * activation
        + factors["attention_scores"] * numbers.scores
        + mask
    )


def _gathered_weight_bytes(
    a: Architecture, sizes: ModelSizes, layout: StageLayout, factors: Factors, head: float
) -> float:
    """Return the bytes of the weights that a layer's backward pass reads, gathered or dequantised,
    and of the head that is still there.
    """
    ways, form = _gathering_ways(layout), _form(a)
    gathered = 0.0
    if ways > 1 or is_quantised(a):
        copies = _head_copies(a, layout)
        block = (sizes.parameters - table_parameters(a)) / a.layers
        block_bytes = sizes.dtype_bytes * copies * block / layout.mesh["tensor"]
        gathered += factors[f"{form}_gathered_block"] * block_bytes
    if ways * layout.mesh["data"] > 1:
        gathered += factors[f"{form}_head_copies_in_backward"] * head
    return gathered


def _loss_bytes(
    a: Architecture,
    sizes: ModelSizes,
    layout: StageLayout,
    chip: Chip,
    share: TokenShare,
    head: float,
) -> float:
    """Return the bytes of the logits of a chunk, and of the head with its gradient."""
    factors, tensor = FACTORS[chip.platform], layout.mesh["tensor"]
    logits = factors["frozen_head_logits" if a.adapters else "logits"]
    sequences = layout.branches * share.sequences
    loss = logits * 4 * sequences * min(CHUNK, share.scored) * a.vocabulary / tensor
    loss += _transposed_table_bytes(a, sizes, layout, chip)
    gradient = 0.0
    if not a.adapters:
        gradient = 4 * layout.branches * a.vocabulary * a.width / tensor
    summed = "summed_head_gradient" if layout.micro_batches > 1 else "head_gradient"
    return loss + factors["gathered_head"] * head + factors[summed] * gradient


def _gathered_head_bytes(a: Architecture, sizes: ModelSizes, layout: StageLayout) -> float:
    """Return the bytes of the output head in the activations' dtype, where it is gathered or
    cast.
    """
    is_cast = sizes.dtype_bytes == 2 and sizes.table_number_bytes > sizes.dtype_bytes
    if _gathering_ways(layout) == 1 and not is_cast:
        return 0.0
    table = a.vocabulary * a.width
    return _head_copies(a, layout) * table * sizes.dtype_bytes / layout.mesh["tensor"]


def _transposed_table_bytes(
    a: Architecture, sizes: ModelSizes, layout: StageLayout, chip: Chip
) -> float:
    """Return the bytes of the table that XLA for TPUs transposes or tiles anew as it gathers it."""
    ways = _gathering_ways(layout)
    table = a.vocabulary * a.width * sizes.dtype_bytes / layout.mesh["tensor"]
    is_narrow = chip.platform == "tpu" and ways > 1 and a.width // ways % LANES > 0
    if _is_retiled(a, sizes, chip) or (is_narrow and a.adapters):
        return table
    return FACTORS["tpu"]["transposed_table"] * table if is_narrow else 0.0


def _gathering_ways(layout: StageLayout) -> int:
    """Return over how many devices parameters are split that are gathered before use."""
    return layout.mesh["fsdp"] * layout.mesh["context"]


def _head_copies(a: Architecture, layout: StageLayout) -> int:
    """Return how many branches have weights of their own outside adapters."""
    return 1 if a.adapters else layout.branches


def _is_retiled(a: Architecture, sizes: ModelSizes, chip: Chip) -> bool:
    """Return whether XLA tiles the frozen arrays anew that are not quantised."""
    return bool(a.adapters) and sizes.table_number_bytes == 2 and chip.name in _RETILED


def _form(a: Architecture) -> str:
    """Return the prefix of the factors for the model's weights."""
    if is_quantised(a):
        return "qlora"
    return "lora" if a.adapters else "trained"
