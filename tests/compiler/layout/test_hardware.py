"""Chips by the names that JAX gives them, and hardware in a few words."""

from __future__ import annotations

import pytest

from tunelang.compiler.layout.hardware import chip_of, declared, named


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v4", "v4"),
        ("TPU v5p", "v5p"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("cpu", None),
    ],
)
def test_chip_is_found_by_its_device_kind(kind: str, name: str | None) -> None:
    found = chip_of(kind)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("text", "count", "groups"),
    [("v5e:4x4", 16, 1), ("tpu7x:2x2x1", 8, 1), ("h200:8", 8, 1), ("a100:4x8", 32, 4)],
)
def test_short_form_names_hardware(text: str, count: int, groups: int) -> None:
    found = declared(named(text))
    assert found is not None
    assert (found.chip.name, found.count, found.groups) == (text.split(":")[0], count, groups)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e:3x3", "2x4, 4x4"),
        ("h200", "how many"),
        ("h200:0", "how many"),
        ("h200:8x", "how many"),
        ("pod", "h100"),
        ("local:2", "h100"),
    ],
)
def test_unknown_short_form_is_refused_with_the_known_ones(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        named(text)
    assert declared(named("local")) is None
