"""Problems of reasoning-gym: generated once, in a process of their own, and cached on disk.

Of the generators of reasoning-gym 0.1.25, five (`isomorphic_strings`, `knight_swap`,
`polynomial_multiplication`, `ransom_note`, `word_ladder`) give other problems in another process
for the same seed: they go through sets of strings, whose order depends on the process's hash seed.
A child process with a fixed hash seed makes all of them the same on every host and after every
restart. Keeping them also spares making slow ones (seconds for a `knight_swap`) at every step.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.data import Procedural
from tunelang.runtime.data.text_templates import Row
from tunelang.runtime.store.atomic_files import replacing


@dataclass(eq=False)
class GeneratorError(TuneError):
    """A generator refused its settings or failed: its `task`, and the `reason` it gave."""

    code = "generator-fails"
    task: str
    reason: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.generator_failed(self.task, self.reason)


class Problems:
    """Generated problems as rows: `question`, `answer` (may be None) and `metadata`."""

    def __init__(self, task: str, settings: Mapping[str, object], path: Path, digest: str) -> None:
        self.digest = digest
        self._task = task
        self._settings = settings
        self._offsets = np.load(path.with_suffix(".npy"))
        self._file = path.open("rb")
        self._scorer: Any = None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(row)
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        # The cache is our own: JSON would turn the tuples that verifiers compare with into lists.
        problem: Row = pickle.loads(os.pread(self._file.fileno(), end - start, start))
        return problem

    def place(self, row: int) -> str:
        """Return where the row stands, for a report."""
        return f"{self._task}: problem {row + 1}"

    def content(self, row: Row) -> object:
        """Return the problem without its number, so that equal problems count as one."""
        return [row["question"], row["answer"]]

    def score(self, answer: str, row: Row) -> float:
        """Return the generator's own score of an answer, from 0 to 1; raises what the generator
        raises.
        """
        if self._scorer is None:
            # Heavy: a second, and only rewards need it.
            import reasoning_gym  # type: ignore[import-untyped]

            self._scorer = reasoning_gym.create_dataset(self._task, **self._settings)
        return float(self._scorer.score_answer(answer, row))

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            self._file.close()


def generate(kind: Procedural, cache: Path) -> Problems:
    """Return the problems of a declaration, from the cache or new; raises `GeneratorError`."""
    stated = {} if kind.settings is None else dict(kind.settings.values)
    settings = {**stated, "size": kind.size, "seed": kind.seed}
    key = {
        "task": kind.task,
        "settings": settings,
        "version": version("reasoning-gym"),
        "python": sys.version_info[:2],
    }
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = cache / f"problems-{digest}.pickle"
    if not path.with_suffix(".npy").exists():
        _make(kind.task, settings, path)
    return Problems(kind.task, settings, path, digest)


def _make(task: str, settings: Mapping[str, object], path: Path) -> None:
    """Write the problems, then the table of their offsets, whose file marks them as complete."""
    with replacing(path) as problems:
        order = json.dumps({"task": task, "settings": settings, "path": str(problems)})
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=order,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
        )
        if child.returncode != 0:
            lines = child.stderr.strip().splitlines()
            raise GeneratorError(task, lines[-1] if lines else "it stopped without a word")
    with replacing(path.with_suffix(".npy")) as table:
        np.save(table, np.array(json.loads(child.stdout.splitlines()[-1]), np.int64))


# Settings that are lists arrive as lists; the random module is seeded for generators that use it.
_CHILD = """\
import json, pickle, random, sys
import numpy, reasoning_gym
order = json.load(sys.stdin)
random.seed(0)
numpy.random.seed(0)
problems = reasoning_gym.create_dataset(order["task"], **order["settings"])
offsets = [0]
with open(order["path"], "wb") as file:
    for row in range(order["settings"]["size"]):
        problem = problems[row]
        file.write(pickle.dumps(problem))
        offsets.append(file.tell())
print()
print(json.dumps(offsets))
"""
