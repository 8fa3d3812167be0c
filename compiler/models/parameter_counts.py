"""Counts that follow from an architecture: parameters, FLOPs and bytes of the KV cache."""

from __future__ import annotations

from tunelang.compiler.models.adapters import matrices
from tunelang.compiler.models.architecture import Adapter, Architecture


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
    """Count the numbers of a model without its adapters; a tied head is counted once."""
    a = architecture
    head = 1 if a.scores else a.vocabulary * (not a.tied)
    tables = a.vocabulary + head + (a.context if a.position == "learned" else 0)
    final_norm = a.width * (2 if a.norm == "layer" else 1)
    return tables * a.width + final_norm + a.layers * sum(_block_parameters(a).values())


def expert_count(architecture: Architecture) -> int:
    """Count the numbers in the matrices of all experts."""
    a = architecture
    return 0 if a.experts is None else a.layers * a.experts.count * 3 * a.width * a.experts.width


def trained_count(architecture: Architecture) -> int:
    """Count the numbers that are trained: those of the last adapter, or all."""
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
    """Return the mean over `t < length` of `min(t + 1, window)`, the keys that a query attends
    to.
    """
    window = min(window, length)
    return window - window * (window - 1) / (2 * length)


def forward_flops(architecture: Architecture, length: int) -> float:
    """Return the FLOPs of the forward pass for one token of a sequence of `length` tokens.

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
    """Return the bytes of the KV cache for each token of a slot; every layer has the full
    length.
    """
    a = architecture
    return 2 * a.layers * a.kv_heads * a.head_dim * bytes_per_value


def adapter_parameters(architecture: Architecture, adapter: Adapter) -> int:
    """Count the numbers of an adapter."""
    total = 0
    for path, (inputs, outputs) in matrices(architecture).items():
        if path in adapter.matrices:
            times = architecture.layers if path.startswith("blocks") else 1
            total += times * (adapter.rank * (inputs + outputs) + adapter.magnitudes * outputs)
    return total


def off_width(architecture: Architecture, adapter: Adapter) -> int:
    """Count the numbers of an adapter that are not along the width, which alone is split by fully
    sharded data parallelism.
    """
    total = 0
    for path, (inputs, outputs) in matrices(architecture).items():
        if path in adapter.matrices:
            times = architecture.layers if path.startswith("blocks") else 1
            total += times * adapter.rank * (inputs + outputs - architecture.width)
    return total
