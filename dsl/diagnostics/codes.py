"""The registry of diagnostic codes: what each means, with a wrong and a right example.

The texts stand in `codes.md`. Examples may use what `PRELUDE` declares; the tests check every one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

PRELUDE = """\
model gemma : pretrained { path = "google/gemma-2b", context = 2Ki }

data math : jsonl {
  path     = "math.jsonl"
  prompt   = "{question}"
  response = "{answer}"
  target   = after("####", "{answer}")
}

data logic : procedural { task = "knights_knaves" }
data prose : text { path = "prose.txt" }

reward correct = numeric_match()

eval accuracy : generate { data = logic, score = exact() }

stage baseline : sft { from = gemma, data = math, length = 100 steps, batch = 8 sequences }
"""
"""Declarations that the examples rely on; `math.jsonl` has the fields `question` and `answer`."""


@dataclass(frozen=True)
class Code:
    """A kind of diagnostic."""

    name: str
    text: str
    wrong: str = ""
    right: str = ""
    arguments: tuple[str, ...] = ()
    """`--set` overrides of the wrong example."""

    @property
    def needs_run(self) -> bool:
        """Return whether only planning or running finds the error, so that no spec can show it."""
        return self.text.startswith(("While planning:", "While running:"))


@cache
def _read() -> dict[str, Code]:
    text = resources.files("tunelang.dsl.diagnostics").joinpath("codes.md").read_text("utf-8")
    entries: dict[str, Code] = {}
    for part in re.split(r"^# ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        prose, *blocks = re.split(r"^(Wrong|Right)(.*):\n", body, flags=re.MULTILINE)
        examples: dict[str, str] = {}
        arguments: tuple[str, ...] = ()
        for label, extra, block in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
            lines = [line.removeprefix("    ") for line in block.strip("\n").split("\n")]
            examples[label] = "\n".join(lines).strip("\n") + "\n"
            arguments += tuple(re.findall(r"--set '([^']*)'", extra))
        entries[name.strip()] = Code(
            name.strip(),
            prose.strip(),
            examples.get("Wrong", ""),
            examples.get("Right", ""),
            arguments,
        )
    return entries


def codes() -> dict[str, Code]:
    """Return every code by its name, in the order of the registry."""
    return _read()
