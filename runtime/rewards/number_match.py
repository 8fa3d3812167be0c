"""Reads numbers as people write them in answers, as exact fractions.

Fractions, so that 0.1 + 0.2 equals 0.3 without a tolerance.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# A completion may hold `1e999999999` or a million digits: few bytes, minutes of arithmetic.
_LONGEST = 300
_LARGEST_EXPONENT = 300

_SEPARATOR = "(?:,|\\{,\\}|\\\\,|[\u00a0\u2009\u202f])"
_PLAIN = rf"(?:(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"""
    (?: (?<![\w.)}}%]) (?P<sign>[-−+]) )?
    (?: \\?[$€£¥₹] \s? (?P<inner>[-−+])? )?
    (?:
        \\[dt]?frac \s* \{{ \s* (?P<top>[-−]?{_PLAIN}) \s* \}}
                    \s* \{{ \s* (?P<bottom>[-−]?{_PLAIN}) \s* \}}
      | (?<![\w.]) (?: (?P<ones>\d+) [ ]? )? (?P<vulgar>[¼½¾⅐-⅞])
      | (?<![\w.]) (?P<units>\d+) [ ] (?P<over>\d+) / (?P<under>\d+) (?![\d/.])
      | (?<![\w.]) (?P<plain>{_PLAIN})
        (?: [eE](?P<exponent>[-−+]?\d+)
          | \s* (?:×|\\times|\\cdot|\*) \s* 10 \s* \^ \s* \{{? (?P<power>[-−+]?\d+) \}}? )?
        (?: [ ]? / [ ]? (?P<divisor>{_PLAIN}) )?
    )
    (?P<percent> [ ]? \\? [%％] )?
    """,
    re.VERBOSE,
)


class ParsedNumber(NamedTuple):
    """A number and whether it was written as a percentage, in which case 50% is 1/2."""

    value: Fraction
    percent: bool


def last_number(text: str) -> ParsedNumber | None:
    r"""Read the last number in a text; None where there is none.

    Reads signs, thousands separators (commas, thin spaces, LaTeX's `{,}`), currency signs,
    decimals, powers of ten, fractions (`3/4`, `1 1/2`, `½`, `\frac{3}{4}`) and percentages.
    Digits inside a word (`x2`, `v1.2.3`) are not numbers of their own. Numbers of more than 300
    digits, or with a denominator of 0, are skipped.
    """
    for match in reversed(list(_NUMBER.finditer(text))):
        value = _value(match)
        if value is not None:
            negative = "-" in _ascii((match["sign"] or "") + (match["inner"] or ""))
            percent = match["percent"] is not None
            value = -value if negative else value
            return ParsedNumber(value / 100 if percent else value, percent)
    return None


def equal(answer: ParsedNumber, target: ParsedNumber, tolerance: float) -> bool:
    """Return whether two numbers are the same within a difference relative to the target.

    Where just one of them is a percentage it may also stand for its face value: `60%` answers
    both `0.6` and `60`, as references to "what percentage ...?" are written in either form.
    """
    readings = [answer.value]
    if answer.percent != target.percent:
        readings.append(answer.value * 100 if answer.percent else answer.value / 100)
    # By way of text: 1e-6 as it was written, not the binary fraction just below it.
    bound = Fraction(str(tolerance)) * abs(target.value)
    return any(abs(reading - target.value) <= bound for reading in readings)


def _value(match: re.Match[str]) -> Fraction | None:
    if match["top"]:
        return _divided(_plain(match["top"]), _plain(match["bottom"]))
    if match["vulgar"]:
        part = Fraction(unicodedata.numeric(match["vulgar"])).limit_denominator(10)
        ones = _plain(match["ones"] or "0")
        return None if ones is None else ones + part
    if match["over"]:
        units = _plain(match["units"])
        part_over = _divided(_plain(match["over"]), _plain(match["under"]))
        return None if units is None or part_over is None else units + part_over
    value = _plain(match["plain"])
    exponent = _ascii(match["exponent"] or match["power"] or "0")
    if value is None or len(exponent) > 5 or abs(int(exponent)) > _LARGEST_EXPONENT:
        return None
    value *= Fraction(10) ** int(exponent)
    return _divided(value, _plain(match["divisor"])) if match["divisor"] else value


def _plain(text: str) -> Fraction | None:
    if len(text) > _LONGEST:
        return None
    return Fraction(re.sub(_SEPARATOR, "", _ascii(text)))


def _divided(over: Fraction | None, under: Fraction | None) -> Fraction | None:
    return over / under if over is not None and under else None


def _ascii(text: str) -> str:
    return text.replace("−", "-")
