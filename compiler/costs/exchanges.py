"""Seconds that devices spend on exchanging parameters, gradients and activations in an update."""

from __future__ import annotations

from tunelang.compiler.costs.model_sizes import WeightShare, key_shards
from tunelang.compiler.layout.layout_query import LayoutQuery
from tunelang.compiler.layout.stage_layout import StageLayout

LATENCY = 5e-6
"""Seconds that a small exchange takes at least."""

Times = dict[str, float]


def exchange_times(
    query: LayoutQuery, layout: StageLayout, weights: WeightShare, tokens: int
) -> tuple[Times, Times]:
    """Return the seconds of an update's exchanges, by name: those that can be hidden behind
    computing, and those that cannot. `tokens` are a device's, of all branches.
    """
    return _weight_exchanges(query, layout, weights), _activation_exchanges(query, layout, tokens)


def _weight_exchanges(query: LayoutQuery, layout: StageLayout, weights: WeightShare) -> Times:
    """Parameters are gathered for each pass of each micro-batch; gradients are summed over copies
    once.
    """
    a, mesh, devices = query.architecture, layout.mesh, query.devices
    tensor, data = mesh["tensor"], mesh["data"]
    fsdp = mesh["fsdp"] * mesh["context"]  # parameters are split over both
    stride = tensor * mesh["expert"]
    times: Times = {}
    if fsdp > 1:
        # The head is gathered for one pass only, the embedding never (`Decoder._embed`).
        copies = 1 if a.adapters else layout.branches
        gathered = weights.parameters - copies * a.vocabulary * a.width * (0.5 if a.tied else 1.5)
        moved = layout.micro_batches * (2 * query.dtype_bytes * gathered + 4 * weights.trained)
        moved = moved / tensor * (fsdp - 1) / fsdp
        times["gathering parameters over `fsdp`"] = moved / devices.bandwidth(fsdp, stride)
    if data > 1:
        moved = 2 * 4 * weights.trained / (fsdp * tensor) * (data - 1) / data
        times["summing gradients over `data`"] = moved / devices.bandwidth(data, stride * fsdp)
    return times


def _activation_exchanges(query: LayoutQuery, layout: StageLayout, tokens: int) -> Times:
    """Activations are summed over the tensor axis twice in a block for each pass."""
    a, mesh, devices = query.architecture, layout.mesh, query.devices
    tensor, context, expert = mesh["tensor"], mesh["context"], mesh["expert"]
    passes = 3 if layout.remat == "full" else 2
    layer_tokens = a.layers * tokens
    times: Times = {}
    if tensor > 1:
        moved = passes * 2 * layer_tokens * a.width * query.dtype_bytes * 2 * (tensor - 1) / tensor
        times["summing activations over `tensor`"] = moved / devices.bandwidth(tensor, 1)
    if context > 1:
        keys = 2 * a.kv_heads * a.head_dim / key_shards(a, tensor)
        moved = passes * layer_tokens * (context - 1) * keys * query.dtype_bytes
        times["gathering keys over `context`"] = moved / devices.bandwidth(context, tensor)
    if expert > 1 and a.experts is not None:
        moved = 4 * layer_tokens * a.experts.active * a.width * query.dtype_bytes
        times["sending tokens over `expert`"] = moved / devices.bandwidth(expert, tensor)
    return times
