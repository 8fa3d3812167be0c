"""Functions that all messages share: a diagnostic, suggestions, lists and names of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Edit, Label, Severity
from tunelang.dsl.syntax import units
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import data
from tunelang.dsl.vocabulary.base import (
    Condition,
    DataExpression,
    Function,
    Reference,
    RewardExpression,
    TextExpression,
)
from tunelang.dsl.vocabulary.raw_values import RegexValue, Word

SHORT_LIST = 8
KNOWN_AFTER = "a measured value is known only after the run, so it cannot be a setting"
_LONGEST_COMPARED = 60


def error(
    code: str,
    title: str,
    span: Span,
    label: str = "",
    *,
    seconds: Iterable[Label] = (),
    notes: Iterable[str] = (),
    help: str | None = None,
    fix: Edit | tuple[Edit, ...] = (),
    severity: Severity = "error",
) -> Diagnostic:
    """Return a diagnostic; `help` is advice, `fix` an edit that follows it."""
    edits = (fix,) if isinstance(fix, Edit) else fix
    others = tuple(second for second in seconds if second.span != span)
    return Diagnostic(code, title, Label(span, label), others, tuple(notes), help, edits, severity)


def quoted(text: str, longest: int = 40) -> str:
    """Return a user's text in backticks, on one line, shortened in the middle if it is long."""
    text = " ".join(text.split())
    if len(text) > longest:
        half = (longest - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return f"`{text}`"


def distance(a: str, b: str, limit: int) -> int:
    """Count the edits (insert, delete, replace, swap neighbours) from `a` to `b`; beyond
    `limit`, return `limit + 1`.
    """
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        if min(row) > limit:
            return limit + 1
    return row[-1]


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant: within a third of the length of the word, or
    of equal parts.
    """
    if len(word) > _LONGEST_COMPARED:
        return None
    limit = max(1, len(word) // 3)
    lowered = word.lower()
    ranked = []
    for index, name in enumerate(names):
        if name == word:
            continue
        apart = distance(lowered, name.lower(), limit)
        if apart <= limit and apart < max(len(word), len(name)):
            ranked.append((apart, index, name))
    if ranked:
        return min(ranked)[2]
    parts = sorted(lowered.replace("-", "_").split("_"))
    return next(
        (n for n in names if len(parts) > 1 and sorted(n.lower().split("_")) == parts), None
    )


def listed(names: Sequence[str], last: str = "and") -> str:
    """Return words as `a`, `b` and `c`."""
    marked = [f"`{name}`" for name in names]
    if len(marked) < 2:
        return "".join(marked)
    return f"{', '.join(marked[:-1])} {last} {marked[-1]}"


def choose(word: str, names: Sequence[str], what: str) -> str | None:
    """Return the help for an unknown word: the nearest name, or all names if they are few."""
    near = nearest(word, names)
    if near is not None:
        return f"did you mean `{near}`?"
    if 0 < len(names) <= SHORT_LIST:
        return f"{what} {listed(list(names))}"
    return None


def replace_fix(span: Span, word: str, names: Iterable[str]) -> tuple[Edit, ...]:
    """Return the edit that replaces a word by the nearest name."""
    near = nearest(word, names)
    return (Edit(span, near),) if near is not None else ()


def plural(count: int, one: str) -> str:
    """Return a count with its noun: `1 row`, `2 rows`."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def describe(value: object) -> str:
    """Return the name of a value in a message: `text`, `a percentage`, `a reward`."""
    match value:
        case units.Quantity():
            return units.DIMENSION_NAMES.get(value.dimension, "a number")
        case bool():
            return "`true`" if value else "`false`"
        case None:
            return "`none`"
        case str():
            return "text"
        case Word():
            return f"the word `{value.text}`"
        case RegexValue():
            return "a regular expression"
        case tuple():
            return "a list"
        case Reference():
            return article(str(value.noun))
        case data.Split() if value.part is None:
            return "a split, of which no part is named"
        case data.Weighted():
            return f"{units.show(value.weight, '%')} of some data"
        case DataExpression():
            return "data"
        case RewardExpression():
            return "a reward"
        case TextExpression():
            return "text"
        case Condition():
            return "a condition"
        case Function():
            return f"{article(value.family)}" if value.family != "winner" else "a choice of winner"
    return "something else"


def article(word: str) -> str:
    """Return a noun with its article: `an eval`, `a stage`; `data` and `hardware` have none."""
    if word in ("data", "hardware", "settings", "experts", "text", "sampling"):
        return word
    spoken_with_vowel = word in ("sft", "rloo", "sgd") or word[0] in "aeiou"
    return f"{'an' if spoken_with_vowel else 'a'} {word}"
