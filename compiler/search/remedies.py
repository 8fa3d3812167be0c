"""Changes that would make a stage fit that does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.layout_query import DoesNotFitError, LayoutQuery, NoLayoutError
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Storage
from tunelang.compiler.search.layout_search import SHORTEST, best_layout, pins, unpinned
from tunelang.dsl.vocabulary.training import Lora

_FACTORS = (2, 4, 8, 16)
"""By how much a batch or a context is made smaller, and devices more."""


@dataclass(frozen=True)
class _Change:
    """A change in the words of a spec, and the query with it."""

    words: str
    query: LayoutQuery


def remedies(query: LayoutQuery) -> Iterator[tuple[str, int]]:
    """Give changes that would each make a stage fit, in words, with the bytes that a device would
    then need by the estimate. Of each kind of change the smallest that suffices is given.
    """
    for changes in _changes(query):
        smallest: tuple[str, int] | None = None
        for change in reversed(changes):
            try:
                smallest = change.words, best_layout(change.query).total
            except NoLayoutError:
                continue
            except DoesNotFitError:  # then no smaller change suffices
                break
        if smallest is not None:
            yield smallest


def _changes(query: LayoutQuery) -> Iterator[list[_Change]]:
    """Give the changes that may help, by kind; those of a kind from the smallest."""
    if query.branches > 1:
        yield [_Change("`sweep = in_turn`", replace(query, branches=1))]
        return
    stage, a, devices = query.stage, query.architecture, query.devices
    cost = cost_of(stage)
    if pinned := pins(stage):
        names = ", ".join(f"`{name}`" for name in pinned)
        yield [_Change(f"{names} left to the plan", replace(query, stage=unpinned(stage)))]
    batches = filter(None, map(cost.smaller_batch, _FACTORS))
    yield [_Change(words, replace(query, stage=smaller)) for words, smaller in batches]
    if devices.chip.platform != "cpu":  # simulated devices share one memory
        larger = (replace(devices, count=times * devices.count) for times in _FACTORS)
        yield [_Change(str(more), replace(query, devices=more)) for more in larger]
    if not a.adapters:
        lora = "`adapter = lora()`"
        yield [
            _Change(lora, _with_adapter(query, "bf16" if query.dtype_bytes == 2 else "f32")),
            _Change(f"{lora}, `weights = nf4` of the model", _with_adapter(query, "nf4")),
        ]
    if cost.context_is_adjustable:
        contexts = (a.context // by for by in _FACTORS if a.context // by >= SHORTEST)
        yield [
            _Change(f"a context of {n}", replace(query, architecture=replace(a, context=n)))
            for n in contexts
        ]


def _with_adapter(query: LayoutQuery, storage: Storage) -> LayoutQuery:
    adapter = (Lora.unvalidated(),)
    return replace(query, architecture=adapted(query.architecture, adapter, storage))
