"""Numbers with units: `20%`, `4Ki`, `16 GiB`, `2 epochs`, `10M tokens`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal

SCALES: dict[str, int] = {
    "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30,
}  # fmt: skip
"""Factors that may stand before a unit or alone: `4Ki` is 4096."""

BYTES: dict[str, int] = {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip

SECONDS: dict[str, int] = {"s": 1, "m": 60, "h": 3600, "d": 86400}

COUNTED = ("tokens", "steps", "epochs", "prompts", "sequences")
"""Units that an amount may count, each a dimension of its own. The singular is accepted too."""

RATES = ("device_hour",)
"""Units that a price may be for."""

UNITS: dict[str, tuple[str, Decimal]] = {
    "%": ("%", Decimal("0.01")),
    **{unit: ("bytes", Decimal(size)) for unit, size in BYTES.items()},
    **{unit: ("s", Decimal(length)) for unit, length in SECONDS.items()},
    **{unit: (unit, Decimal(1)) for unit in COUNTED},
    **{unit.removesuffix("s"): (unit, Decimal(1)) for unit in COUNTED},
}
"""Unit word -> (dimension, factor)."""

DIMENSION_NAMES: dict[str | None, str] = {
    None: "a plain number",
    "%": "a percentage",
    "bytes": "an amount of memory",
    "s": "a time",
    **{unit: f"a number of {unit}" for unit in COUNTED},
    **{f"per {rate}": f"a price per {rate}" for rate in RATES},
}
"""Dimension -> how a message calls it."""

_PARTS = re.compile(
    r"(?P<digits>(?:\d[\d_]*(?:\.\d[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?)"
    r"(?:[ \t]*(?P<percent>%)|(?P<suffix>[^\W\d]\w*))?"
    r"(?:[ \t]+(?!per\b)(?P<word>[^\W\d]\w*))?(?:[ \t]+per[ \t]+(?P<rate>[^\W\d]\w*))?"
)
_MAX_EXPONENT = 300


class UnknownUnit(ValueError):
    """A number is followed by a word that is no scale and no unit; `args[0]` is the word."""


class NumberTooLarge(ValueError):
    """A number does not fit in a double."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number in base units (bytes, seconds, a fraction for `%`) and its dimension."""

    value: int | float
    dimension: str | None = None
    written: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.written or show(self.value, self.dimension)


def parse(text: str) -> Quantity:
    """Parse a number token as a quantity.

    Raises `UnknownUnit` for an unknown scale or unit and `NumberTooLarge` beyond 1e300.
    """
    match = _PARTS.fullmatch(text)
    if match is None:
        raise UnknownUnit(text)
    digits, suffix, word, rate = match.group("digits", "suffix", "word", "rate")
    suffix = suffix or match.group("percent")
    number = Decimal(digits.replace("_", ""))
    if number and number.adjusted() > _MAX_EXPONENT:
        raise NumberTooLarge(text)
    is_whole = "." not in digits and "e" not in digits.lower()
    dimension: str | None = None
    if suffix is not None:
        if suffix in SCALES:
            number *= SCALES[suffix]
            is_whole = is_whole or number == number.to_integral_value()
        elif suffix in UNITS:
            dimension, factor = UNITS[suffix]
            number *= factor
            is_whole = dimension == "bytes"
        else:
            raise UnknownUnit(suffix)
    if word is not None:
        if word not in UNITS or dimension is not None:
            raise UnknownUnit(word)
        dimension, factor = UNITS[word]
        number *= factor
        is_whole = dimension in COUNTED and number == number.to_integral_value()
        is_whole = is_whole or dimension == "bytes"
    if rate is not None:
        if rate not in RATES or dimension is not None:
            raise UnknownUnit(rate)
        dimension = f"per {rate}"
    value = int(number) if is_whole else float(number)
    return Quantity(value, dimension, tidy(text))


def tidy(text: str) -> str:
    """Return a number as the formatter writes it: `20%`, `2 epochs`, `16 GiB`; a space is kept."""
    text = re.sub(r"[ \t]+", " ", text).replace(" %", "%")
    return re.sub(rf"(?<=[\dkMBTGi])({'|'.join(COUNTED)})\b", r" \1", text)


def show(value: int | float, dimension: str | None = None) -> str:
    """Return a value in base units as it would be written in a spec, exact: `parse(show(x))
    == x`.
    """
    if dimension == "%":
        percent = (Decimal(repr(value)) * 100).normalize()
        return f"{percent:f}%"
    if dimension == "bytes":
        divisors = [unit for unit in BYTES if value and value % BYTES[unit] == 0]
        if divisors:
            unit = min(divisors, key=lambda unit: value // BYTES[unit])
            return f"{int(value) // BYTES[unit]} {unit}"
        return f"{Decimal(repr(value)) / 1000:f} KB"
    if dimension == "s":
        for unit in ("d", "h", "m"):
            if value and value % SECONDS[unit] == 0:
                return f"{int(value // SECONDS[unit])}{unit}"
        return f"{_plain(value)}s"
    if dimension is None:
        return _plain(value)
    if dimension in COUNTED and value == 1:
        return f"1 {dimension.removesuffix('s')}"
    return f"{_plain(value)} {dimension}"


def _plain(value: int | float) -> str:
    if isinstance(value, int):
        return str(value)
    text = repr(value).replace("e-0", "e-").replace("e+", "e")
    return text.removesuffix(".0") if "e" not in text else text
