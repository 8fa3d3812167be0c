"""The estimate of a step in a layout: its memory by parts, its FLOPs, and its seconds by causes.

Closed forms over counts: they rank layouts and rule out what cannot fit. Whether a layout fits is
for the compiler to say (`tune plan --compile`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from tunelang.compiler.costs.exchanges import Times, exchange_times
from tunelang.compiler.costs.judge_costs import with_judges
from tunelang.compiler.costs.model_sizes import ModelSizes, WeightShare, model_sizes, weight_share
from tunelang.compiler.costs.rollout_costs import with_rollout
from tunelang.compiler.costs.stage_costs import StageCost, cost_of
from tunelang.compiler.costs.step_memory import TokenShare, copied_weights, temporaries
from tunelang.compiler.layout.layout_query import LayoutQuery
from tunelang.compiler.layout.stage_layout import Remat, StageLayout, shards_of
from tunelang.compiler.models.parameter_counts import (
    forward_flops,
    matmul_parameters,
    parameter_count,
    trained_count,
)

_UPDATE_PASSES: dict[Remat, float] = {"none": 3.0, "dots": 3.2, "full": 4.0}
"""Forward passes that an update is worth."""
_UPDATE_PASSES_CPU: dict[Remat, float] = {"none": 3.3, "dots": 3.2, "full": 3.4}
"""The same for a CPU, where an activation costs as much to keep as to compute (measured)."""
_MICRO_BATCH_OVERHEAD = 0.02
"""Share of an update's time that each further micro-batch adds."""
_ARRAYS_IN_TRANSIT = 2
"""Arrays whose moments are in a device at once, where they are offloaded."""
_CACHE_MISSES = 1.15
"""Factor of the time of an update whose activations do not stay in a CPU's cache (measured)."""


def estimate_step(layout: StageLayout, query: LayoutQuery) -> StageLayout:
    """Fill in what a step of a stage takes in a layout: memory, FLOPs, seconds."""
    cost, a, devices = cost_of(query.stage), query.architecture, query.devices
    sizes = model_sizes(a, query.dtype_bytes, layout.length)
    weights = weight_share(a, sizes, layout)
    share = token_share(cost, layout)
    memory = {
        **_update_memory(query, layout, sizes, weights, share),
        **_other_models_memory(query, cost, layout, weights),
    }
    step_tokens = share.tokens * layout.micro_batches * shards_of(layout.mesh)
    step_tokens *= layout.mesh["context"]
    flops = _model_flops(cost, layout, sizes, step_tokens)
    work = _update_work(query, layout, sizes, step_tokens, memory["activations"])
    work = _step_work(query, cost, layout, sizes, step_tokens, work)
    times = _step_times(query, cost, layout, weights, share, memory, work)
    layout = replace(layout, memory=memory, flops=flops, seconds=times[1], times=times[0])
    request = cost.rollout
    if request is None:
        return layout
    layout = with_judges(layout, query.judges, request.completions, devices)
    return with_rollout(layout, query, request)


def token_share(cost: StageCost, layout: StageLayout) -> TokenShare:
    """Count the tokens of a device's micro-batch."""
    context = layout.mesh["context"]
    sequences = layout.rows // shards_of(layout.mesh) // layout.micro_batches
    tokens, scored = cost.micro_batch_tokens(sequences, layout.length)
    return TokenShare(sequences, tokens // context, scored // context)


# Memory.


def _update_memory(
    query: LayoutQuery,
    layout: StageLayout,
    sizes: ModelSizes,
    weights: WeightShare,
    share: TokenShare,
) -> dict[str, int]:
    """Return the bytes in a device of the trained model, and of what an update makes."""
    a, chip = query.architecture, query.devices.chip
    moments = query.stage.optimizer.moments
    memory = {"parameters": weights.bytes_here}
    if "optimizer" in layout.offload:
        in_transit = _ARRAYS_IN_TRANSIT * 4 * moments * sizes.largest_array // weights.shards
        memory["moments in transit"] = in_transit
    else:
        memory["optimizer"] = 4 * moments * weights.trained_here
    memory["gradients"] = 4 * weights.trained_here
    memory |= temporaries(a, sizes, layout, chip, share)
    if copied := copied_weights(a, sizes, layout, chip, weights.trained_here):
        memory["copies of weights"] = copied
    if layout.micro_batches > 1:
        memory["summed gradients"] = memory["gradients"]
    return memory


def _other_models_memory(
    query: LayoutQuery, cost: StageCost, layout: StageLayout, weights: WeightShare
) -> dict[str, int]:
    """Return the bytes in a device of the teacher, the critic and the reference."""
    memory: dict[str, int] = {}
    if query.teacher is not None:
        memory["teacher"] = 4 * parameter_count(query.teacher) // weights.shards
    if cost.critic is not None:
        moments = 0 if "optimizer" in layout.offload else cost.critic.moments
        gradients = 2 if layout.micro_batches > 1 else 1
        trained = 4 * (1 + moments + gradients) * _critic_trained(query, weights)
        frozen = 0
        if query.architecture.adapters and cost.critic.has_frozen_base:
            frozen = weights.stored_bytes
        memory["critic"] = (trained + frozen) // weights.shards
    if cost.holds_reference(query.architecture):
        name = "reference in transit" if "reference" in layout.offload else "reference"
        memory[name] = 4 * weights.model_parameters // weights.shards
    return memory


def _critic_trained(query: LayoutQuery, weights: WeightShare) -> int:
    """Count the trained numbers of a critic with weights of its own."""
    a = query.architecture
    return trained_count(replace(a, scores=True)) - (0 if a.adapters else weights.other_experts)


# FLOPs.


def _model_flops(
    cost: StageCost, layout: StageLayout, sizes: ModelSizes, update_tokens: int
) -> float:
    """Return the FLOPs that a step has to compute, whatever is computed again or only scores."""
    step_tokens = update_tokens * cost.minibatches
    flops = layout.branches * sizes.train_flops * update_tokens * cost.updates
    if cost.critic is not None:  # taken to be as large as the policy
        flops *= 2
    if cost.rollout is not None:
        flops += sizes.forward_flops * step_tokens
    return flops + cost.forward_passes.values * sizes.forward_flops * step_tokens


def _update_work(
    query: LayoutQuery,
    layout: StageLayout,
    sizes: ModelSizes,
    update_tokens: int,
    activations: int,
) -> float:
    """Return the FLOPs that an update is worth, with what is computed again and what delays it."""
    chip, context = query.devices.chip, layout.mesh["context"]
    passes = _UPDATE_PASSES if chip.cache is None else _UPDATE_PASSES_CPU
    work = sizes.forward_flops * update_tokens * passes[layout.remat]
    work *= layout.branches * sizes.train_flops / (3 * sizes.forward_flops)
    if context > 1:  # the device with the last tokens of sequences attends to all the others
        attention = 1 - 2 * matmul_parameters(query.architecture) / sizes.forward_flops
        work *= 1 + attention * (1 - 1 / context)
    work *= 1 + _MICRO_BATCH_OVERHEAD * (layout.micro_batches - 1)
    if chip.cache is not None and activations > chip.cache:
        work *= _CACHE_MISSES
    return work


def _step_work(
    query: LayoutQuery,
    cost: StageCost,
    layout: StageLayout,
    sizes: ModelSizes,
    update_tokens: int,
    update_work: float,
) -> float:
    """Return the FLOPs that a step is worth: its updates, and the passes that only score."""
    passes, step_tokens = cost.forward_passes, update_tokens * cost.minibatches
    update_work *= cost.computed_share(layout.micro_batches)
    if cost.critic is not None:
        update_work *= 2
    work = update_work * cost.updates
    if query.teacher is not None:
        work += forward_flops(query.teacher, layout.length) * update_tokens
    # Branches share the passes of a reference, as it is one model on the same batch.
    scoring = layout.branches * passes.policy + passes.reference + passes.values
    return work + scoring * sizes.forward_flops * step_tokens


# Seconds.


def _step_times(
    query: LayoutQuery,
    cost: StageCost,
    layout: StageLayout,
    weights: WeightShare,
    share: TokenShare,
    memory: dict[str, int],
    work: float,
) -> tuple[Times, float]:
    """Return the seconds of a step by what they are spent on, and those of all together."""
    chip = query.devices.chip
    tokens = layout.branches * share.tokens * layout.micro_batches
    hidden, exposed = exchange_times(query, layout, weights, tokens)
    if "optimizer" in layout.offload:
        moments = 4 * query.stage.optimizer.moments * weights.trained_here
        if cost.critic is not None:
            trained = _critic_trained(query, weights)
            moments += 4 * cost.critic.moments * trained // weights.shards
        exposed["bringing moments from the host, and back"] = 2 * moments / chip.host
    hidden, exposed = (
        {name: cost.updates * seconds for name, seconds in times.items()}
        for times in (hidden, exposed)
    )
    if "reference in transit" in memory:
        exposed["bringing the reference"] = memory["reference in transit"] / chip.host
    computing = work / (math.prod(layout.mesh.values()) * chip.peak * chip.efficiency)
    seconds = max(computing, sum(hidden.values())) + sum(exposed.values())
    return {"computing": computing, **hidden, **exposed}, seconds
