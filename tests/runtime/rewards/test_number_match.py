"""Numbers in answers."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from tunelang.runtime.rewards.number_match import ParsedNumber, equal, last_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", "42"),
        ("0.7", "7/10"),
        (".5", "1/2"),
        ("first 3, then 4", "4"),
        ("1,234,567.89", "123456789/100"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("1\u202f234", "1234"),
        ("1{,}234", "1234"),
        ("$1,234", "1234"),
        ("-$5", "-5"),
        ("$-5$", "-5"),
        ("\\$18", "18"),
        ("€ 3.50", "7/2"),
        ("3 €", "3"),
        ("\u22127", "-7"),
        ("5-3", "3"),
        ("10 - 3", "3"),
        ("5%-10%", "1/10"),
        ("3/4", "3/4"),
        ("1 1/2 cups", "3/2"),
        ("is 1\n1/2", "1/2"),
        ("½", "1/2"),
        ("2½", "5/2"),
        ("⅓", "1/3"),
        (r"\frac{3}{4}", "3/4"),
        (r"-\dfrac{1}{2}", "-1/2"),
        (r"\boxed{42}", "42"),
        ("1.2e3", "1200"),
        ("1.2 × 10^5", "120000"),
        (r"1.2\times 10^{-2}", "3/250"),
        ("50%", "1/2"),
        ("12.5 \\%", "1/8"),
        ("٣", "3"),
        ("version v1.2.3 has 7 parts of H2O", "7"),
    ],
)
def test_last_number_is_read_exactly(text, value):
    number = last_number(text)
    assert number is not None
    assert number.value == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "x2", "5/0", "1e999999999", "9" * 1000, "-", "..."])
def test_text_without_number_gives_none(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("answer", "target", "tolerance", "same"),
    [
        ("0.30", "3/10", 0.0, True),
        ("0.333", "1/3", 0.0, False),
        ("0.333", "1/3", 1e-2, True),
        ("60%", "0.6", 0.0, True),
        ("60%", "60", 0.0, True),
        ("60", "60%", 0.0, True),
        ("60%", "60%", 0.0, True),
        ("60%", "0.6%", 0.0, False),
        ("1000001", "1000000", 1e-6, True),
        ("1000002", "1000000", 1e-6, False),
        ("-5", "5", 0.0, False),
        ("0.0", "-0", 0.0, True),
    ],
)
def test_equality_allows_tolerance_and_percentages(answer, target, tolerance, same):
    left, right = last_number(answer), last_number(target)
    assert isinstance(left, ParsedNumber)
    assert isinstance(right, ParsedNumber)
    assert equal(left, right, tolerance) is same


@pytest.mark.parametrize(
    "unit", ["1", "1,", "111,", "-", "1 ", " ", "\\frac{", "$ ", "1 1/", "1/", "1e", "1 × 10^"]
)
def test_long_texts_take_linear_time(unit):
    start = time.perf_counter()
    last_number(unit * 30_000)
    assert time.perf_counter() - start < 5
