"""Changes that would make a stage fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.compiler.layout.queries import LLAMA, lay_out, query, stage
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.layout_query import (
    DoesNotFitError,
)
from tunelang.compiler.search.layout_search import MARGIN
from tunelang.compiler.search.remedies import remedies


def test_remedies_are_the_smallest_changes_that_fit(folder: Path) -> None:
    one = Devices(replace(CHIPS["a100"], memory=80 << 30), 1, False)
    asked = stage(folder, batch="batch = 16 sequences"), LLAMA, 2, one
    found = dict(remedies(query(*asked)))
    assert list(found) == [
        "`batch = 4 sequences`", "2 × a100", "`adapter = lora()`", "a context of 1024",
    ]  # fmt: skip
    assert all(size <= MARGIN * one.chip.memory for size in found.values())
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage(folder, batch="batch = 8 sequences"), *asked[1:])
    assert next(remedies(caught.value.query))[0] == "`batch = 4 sequences`"
    smaller = lay_out(stage(folder, batch="batch = 4 sequences"), *asked[1:])
    assert smaller.total == found["`batch = 4 sequences`"]


def test_pinned_mesh_that_does_not_fit_is_a_remedy(folder: Path) -> None:
    there = Devices(CHIPS["v5p"], 16, False)
    asked = stage(folder, "mesh = axes(data = 16)"), LLAMA, 2, there
    what, size = next(remedies(query(*asked)))
    assert what == "`mesh` left to the plan"
    assert size == lay_out(stage(folder), *asked[1:]).total


def test_fused_branches_that_do_not_fit_may_be_trained_in_turn(folder: Path) -> None:
    there = Devices(CHIPS["v5p"], 4, False)
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage(folder), LLAMA, 2, there, branches=16)
    assert [what for what, _ in remedies(caught.value.query)] == ["`sweep = in_turn`"]
