"""Time `tune check` as a whole process: `python benchmarks/language.py`.

Prints the median, minimum and maximum of several runs for the three-session spec and for made-up
specs of 200, 2,000 and 20,000 declarations, and the ratios between them. Runs alternate, so that a
machine whose speed drifts does not favour one of them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE_UP = """\
let rate{i} = {n}e-6 * 2
data part{i} = 50% * base.skip({i}).take(100) + 50% * base.shuffle(seed = {i})
reward shaped{i} = 0.8 * correct + 0.2 * matches("{{completion}}", /<a>.*{i}<\\/a>/)
stage tuned{i} : grpo {{
  from      = {start}
  data      = part{i}
  reward    = shaped{i}
  group     = 8
  batch     = 64 prompts
  length    = 300 steps
  rollout   = sampling(max_tokens = 512, temperature = 1.0)
  optimizer = adamw(lr = rate{i}, warmup = 3%, decay = cosine)
}}
"""
HEAD = """\
model gemma : pretrained { path = "google/gemma-2b" }
data base : jsonl {
  path     = "rows.jsonl"
  prompt   = "{question}"
  response = "{answer}"
  target   = "{answer}"
}
reward correct = numeric_match()
"""


def random_spec(declarations: int) -> str:
    """Return a spec of that many declarations in which each stage starts from the one before."""
    parts = [HEAD]
    for i in range(declarations // 4):
        start = f"tuned{i - 1}" if i else "gemma"
        parts.append(MADE_UP.format(i=i, n=i + 1, start=start))
    return "".join(parts)


def seconds(spec: Path) -> float:
    """Return the wall time of one `tune check`, interpreter included."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tunelang.runtime", "check", str(spec)],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
        specs = {"three sessions": (ROOT / "specs/gemma_three_sessions.tune", 10)}
        for size, runs in ((200, 5), (2000, 5), (20_000, 3)):
            path = folder / f"{size}.tune"
            path.write_text(random_spec(size))
            specs[f"{size:,} declarations"] = (path, runs)
        for path, _ in specs.values():
            seconds(path)  # byte code and the parser's tables
        taken: dict[str, list[float]] = {title: [] for title in specs}
        for round_ in range(10):
            for title, (path, runs) in specs.items():
                if round_ < runs:
                    taken[title].append(seconds(path))
    print(f"{'spec':22} {'median':>8} {'min':>8} {'max':>8}  runs")
    for title, values in taken.items():
        middle = statistics.median(values)
        print(f"{title:22} {middle:7.2f}s {min(values):7.2f}s {max(values):7.2f}s  {len(values)}")
    for small, large in (("200", "2,000"), ("2,000", "20,000")):
        a, b = (statistics.median(taken[f"{size} declarations"]) for size in (small, large))
        print(f"{large} take {b / a:.1f} times as long as {small}")


if __name__ == "__main__":
    main()
