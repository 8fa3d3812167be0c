"""Rules for models and hardware: sizes that must divide, topologies that must exist."""

from __future__ import annotations

from math import prod

from tunelang.dsl.messages import conflicts
from tunelang.dsl.program import Declared
from tunelang.dsl.rules.book import Book
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import Reference


def check_transformer(book: Book, declared: Declared, model: models.Transformer) -> None:
    """Check that a new model has its sizes, and that its heads and experts fit them."""
    sizes = {name: getattr(model, name) for name in ("layers", "width", "heads")}
    missing = [name for name, size in sizes.items() if size is None]
    if model.preset is None and missing:
        none_given = len(missing) == len(sizes)
        book.report(conflicts.missing_sizes(book.span(declared), missing, none_given))
        return
    if model.heads and model.width and model.head_dim is None and model.width % model.heads:
        span = book.span(declared, "heads")
        book.report(conflicts.heads(span, model.heads, model.width, key=False))
    if model.heads and model.kv_heads and model.heads % model.kv_heads:
        span = book.span(declared, "kv_heads")
        book.report(conflicts.heads(span, model.kv_heads, model.heads, key=True))
    if model.experts is not None and model.experts.active > model.experts.count:
        span = book.span(declared, "experts.active")
        book.report(conflicts.too_many_active(span, model.experts.active, model.experts.count))


def check_topology(book: Book, declared: Declared, tpu: models.Tpu) -> None:
    """Check that a TPU slice of this shape exists."""
    generation, _, shape = tpu.topology.partition(":")
    if shape not in models.TOPOLOGIES.get(generation, ()):
        span = book.span(declared, "topology")
        book.report(conflicts.unknown_topology(span, tpu.topology, models.TOPOLOGIES))


def device_count(book: Book, hardware: Reference | None) -> tuple[int, Declared] | None:
    """Return the devices of a declared hardware; None if the spec does not say how many."""
    declared = book.declared(hardware.name) if hardware is not None else None
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
