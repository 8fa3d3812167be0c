"""Comparison of two fingerprints: the changes that made a stage stale, in the words of the spec."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tunelang.compiler.fingerprint import Fingerprint

_SHOWN = 60
"""Longest value that a sentence shows."""


@dataclass(frozen=True)
class Change:
    """One cause of a changed fingerprint.

    `value`: an attribute has another value; `content`: a file or folder has other content; `input`:
    a stage that it reads has changed; `semantics`: this version computes the stage in another way.
    """

    kind: Literal["value", "content", "input", "semantics"]
    path: str
    """The key of the component: `optimizer.lr`, `data math: prompt`, `file data/math.jsonl`."""
    old: str | None
    """None if there was none."""
    new: str | None
    """None if there is none any more."""


def changes(old: Fingerprint, new: Fingerprint) -> tuple[Change, ...]:
    """Return the causes that changed a fingerprint: a changed file, but not the digest of the
    `data` that reads it. Empty if and only if the digests are equal.
    """
    if old.digest == new.digest:
        return ()
    before, after = _groups(old), _groups(new)
    causes = list(_attribute_changes("", before[""], after[""], old, new))
    for title, components in after.items():
        if title and title in before and old.components[title] != new.components[title]:
            causes += _part_changes(title, before[title], components, old, new)
    if not causes:
        causes = [
            Change("value", path, old.components.get(path), new.components.get(path))
            for path in {**after[""], **before[""]}
            if old.components.get(path) != new.components.get(path)
        ]
    return tuple(causes)


def wording(change: Change) -> str:
    """Return a change as a sentence without a full stop, on one line."""
    title, _, path = change.path.rpartition(": ")
    where = f"`{path}` of `{title}`" if title else f"`{path}`"
    if change.kind == "semantics":
        return f"this version computes it in another way ({change.old} → {change.new})"
    if change.kind == "input":
        return f"`{change.path.removeprefix('stage ')}` has changed"
    if change.kind == "content":
        name = change.path.removeprefix("tokenizer files ").partition(" ")
        return f"`{name[2] or name[0]}` has other content"
    if change.old is None:
        return f"{where} is new: {_value(change.new)}"
    if change.new is None:
        return f"{where} is gone: {_value(change.old)}"
    return f"{where}: {' → '.join(_pair(change.old, change.new))}"


def _groups(fingerprint: Fingerprint) -> dict[str, dict[str, str]]:
    """Return the components of each part by path, those of the stage itself under ``""``."""
    groups: dict[str, dict[str, str]] = {"": {}}
    for key, text in fingerprint.components.items():
        title, colon, path = key.partition(": ")
        if colon and title in groups:
            groups[title][path] = text
        elif " " in key:
            groups[key] = {}
        else:
            groups[""][key] = text
    return groups


def _attribute_changes(
    title: str, before: dict[str, str], after: dict[str, str], old: Fingerprint, new: Fingerprint
) -> Iterator[Change]:
    """Yield the changed attributes of a stage or declaration."""
    changed: list[str] = []
    empty = [path for path in {**after, **before} if "[]" in (before.get(path), after.get(path))]
    for path in dict.fromkeys([*empty, *after, *before]):
        was = _component(title, path, before, old.words)
        now = _component(title, path, after, new.words)
        if was == now or any(path.startswith((f"{parent}.", f"{parent}[")) for parent in changed):
            continue
        key = f"{title}: {path}" if title else path
        was_text, now_text = old.words.get(key, was), new.words.get(key, now)
        if was_text == now_text:
            continue
        changed.append(path)
        yield Change("semantics" if path == "semantics" else "value", key, was_text, now_text)


def _component(
    title: str, path: str, components: dict[str, str], words: dict[str, str]
) -> str | None:
    """Return a component; one that is a list as its items in brackets."""
    if path in components or f"{path}[0]" not in components:
        return components.get(path)
    prefix = f"{title}: " if title else ""
    items = (key for key in components if re.fullmatch(re.escape(path) + r"\[\d+\]", key))
    return f"[{', '.join(words.get(prefix + key, components[key]) for key in items)}]"


def _part_changes(
    title: str, before: dict[str, str], after: dict[str, str], old: Fingerprint, new: Fingerprint
) -> Iterator[Change]:
    noun = title.partition(" ")[0]
    was, now = old.components[title], new.components[title]
    if noun in ("file", "folder") or title.startswith("tokenizer files "):
        yield Change("content", title, was, now)
        return
    if title in old.words and title in new.words and old.words[title] != new.words[title]:
        yield Change("value", title, old.words[title], new.words[title])
    if noun == "stage":
        if before.get("branches") is None or before.get("branches") != after.get("branches"):
            yield Change("input", title, was, now)
        before = {path: text for path, text in before.items() if path == "keep"}
        after = {path: text for path, text in after.items() if path == "keep"}
        if not (before and after):
            return
    yield from _attribute_changes(title, before, after, old, new)


def _value(text: str | None) -> str:
    flat = " ".join((text or "").split())
    if flat.startswith("#"):
        return flat[:9]
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 1] + "…"


def _pair(old: str, new: str) -> tuple[str, str]:
    """Return two values for a sentence; long ones from a little before their first difference."""
    if max(len(old), len(new)) <= _SHOWN:
        return _value(old), _value(new)
    common = 0
    while common < min(len(old), len(new)) and old[common] == new[common]:
        common += 1
    start = max(common - _SHOWN // 3, 0)
    mark = "…" if start else ""
    return mark + _value(old[start:]), mark + _value(new[start:])
