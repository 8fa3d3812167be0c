"""Rules for models and hardware: sizes that must divide, topologies that must exist."""

from __future__ import annotations

from math import prod

from tunelang.dsl.messages import declaration_conflicts
from tunelang.dsl.program import Declared
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import Reference


def check_transformer(context: RuleContext, declared: Declared, model: models.Transformer) -> None:
    """Check that a new model has its sizes, and that its heads and experts fit them."""
    sizes = {name: getattr(model, name) for name in ("layers", "width", "heads")}
    missing = [name for name, size in sizes.items() if size is None]
    if model.preset is None and missing:
        none_given = len(missing) == len(sizes)
        context.report(
            declaration_conflicts.missing_sizes(context.span(declared), missing, none_given)
        )
        return
    if model.heads and model.width and model.head_dim is None and model.width % model.heads:
        span = context.span(declared, "heads")
        context.report(declaration_conflicts.heads(span, model.heads, model.width, key=False))
    if model.heads and model.kv_heads and model.heads % model.kv_heads:
        span = context.span(declared, "kv_heads")
        context.report(declaration_conflicts.heads(span, model.kv_heads, model.heads, key=True))
    if model.experts is not None and model.experts.active > model.experts.count:
        span = context.span(declared, "experts.active")
        context.report(
            declaration_conflicts.too_many_active(span, model.experts.active, model.experts.count)
        )


def check_topology(context: RuleContext, declared: Declared, tpu: models.Tpu) -> None:
    """Check that a TPU slice of this shape exists."""
    generation, _, shape = tpu.topology.partition(":")
    if shape not in models.TOPOLOGIES.get(generation, ()):
        span = context.span(declared, "topology")
        context.report(
            declaration_conflicts.unknown_topology(span, tpu.topology, models.TOPOLOGIES)
        )


def device_count(context: RuleContext, hardware: Reference | None) -> tuple[int, Declared] | None:
    """Return the devices of a declared hardware; None if the spec does not say how many."""
    declared = context.declared(hardware.name) if hardware is not None else None
    if declared is None:
        return None
    match declared.value:
        case models.Tpu(topology=topology, slices=slices):
            shape = topology.partition(":")[2].split("x")
            if not all(part.isdigit() for part in shape):
                return None
            # A chip of the seventh generation has two devices.
            per_chip = 2 if topology.startswith("tpu7x") else 1
            return slices * prod(int(part) for part in shape) * per_chip, declared
        case models.Gpu(nodes=nodes, devices=devices):
            return nodes * devices, declared
        case models.Local(devices=int(devices)):
            return devices, declared
    return None
