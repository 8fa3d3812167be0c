"""Numbers with units: what is read, what is shown, and that the two agree."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelang.dsl.syntax import units
from tunelang.dsl.syntax.units import Quantity, parse, show

DIMENSIONS = [None, "%", "bytes", "s", *units.COUNTED]


@pytest.mark.parametrize(
    ("text", "value", "dimension"),
    [
        ("10_000", 10_000, None),
        ("1e-5", 1e-5, None),
        (".5", 0.5, None),
        ("4Ki", 4096, None),
        ("2.5k", 2500, None),
        ("1.1k", 1100, None),
        ("3B", 3_000_000_000, None),
        ("20%", 0.2, "%"),
        ("0.1%", 0.001, "%"),
        ("16 GiB", 16 * 2**30, "bytes"),
        ("1.5GB", 1_500_000_000, "bytes"),
        ("30m", 1800.0, "s"),
        ("2 epochs", 2, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.5 epochs", 0.5, "epochs"),
        ("10M tokens", 10_000_000, "tokens"),
        ("1.2 per device_hour", 1.2, "per device_hour"),
    ],
)
def test_numbers_parse_to_base_units(text: str, value: float, dimension: str | None) -> None:
    found = parse(text)
    assert (found.value, found.dimension) == (value, dimension)
    assert type(found.value) is type(value)


@pytest.mark.parametrize(
    "text", ["3 bananas", "3x", "2 epochs_", "5 GiB per device_hour", "3 per day"]
)
def test_unknown_unit_is_refused(text: str) -> None:
    with pytest.raises(units.UnknownUnit):
        parse(text)


def test_number_beyond_a_double_is_refused() -> None:
    with pytest.raises(units.NumberTooLarge):
        parse("1e301")


@given(st.integers(0, 10**18), st.sampled_from([None, "bytes", *units.COUNTED]))
def test_integers_survive_a_round_trip(value: int, dimension: str | None) -> None:
    assert parse(show(value, dimension)) == Quantity(value, dimension)


@given(st.floats(0, 1e12, allow_nan=False, allow_infinity=False), st.sampled_from([None, "%", "s"]))
def test_fractions_survive_a_round_trip(value: float, dimension: str | None) -> None:
    assert parse(show(value, dimension)).value == value


@given(st.integers(0, 10**9), st.sampled_from(list(units.SCALES)))
def test_scales_multiply(value: int, scale: str) -> None:
    assert parse(f"{value}{scale}").value == value * units.SCALES[scale]


@given(st.text(alphabet="0123456789._eE+-%kMGiB stokenpchdm", max_size=14))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(units.UnknownUnit, units.NumberTooLarge):
        parse(text)
