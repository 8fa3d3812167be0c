"""Plans for hardware that is not here against the snapshots of `tests/plans`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_ui import assert_output
from tunelang.dsl.check import check_file
from tunelang.runtime.commands import plan_text
from tunelang.runtime.planning.prepare import prepare
from tunelang.runtime.store.run_store import Store

ROOT = Path(__file__).parent.parent
HEAD = """\
tokenizer letters : bytes {{}}
model m : transformer {{
  preset = "{preset}", tokenizer = letters, context = {context}, dtype = bf16
}}
run {{ on = pod }}
hardware pod : {hardware}
"""
SMALL = 'gpu { kind = "h200", devices = 8, price = 3.5 per device_hour }'
NODES = 'gpu { kind = "h200", nodes = 8, devices = 8 }'
POLICY = """\
data d : jsonl { path = "d.jsonl", prompt = "{q}", target = "{a}" }
reward correct = exact("{completion}", "{target}")
stage rl : grpo { from = m, data = d, reward = correct, batch = 128 prompts, group = 8
  length = 300 steps, rollout = sampling(max_tokens = 1024, max_prompt = 1024) }
"""
LONG = """\
data d : jsonl { path = "d.jsonl", text = "{q}{a}" }
stage long : pretrain { from = m, data = d, batch = 4 sequences, length = 100 steps }
"""
PREFERENCES = """\
data pairs : jsonl { path = "d.jsonl", prompt = "{q}", chosen = "{a}", rejected = "{q}" }
stage preferred : dpo { from = m, data = pairs, batch = 64 sequences, length = 100 steps
  mesh = axes(fsdp = 8) }
"""


def spec_text(stages: str, **words: str) -> str:
    """Write a spec of a preset, hardware and stages."""
    return HEAD.format(**words) + stages


PLANS = {
    "llama-70b-grpo-v5p": spec_text(
        POLICY, preset="llama-3.1-70b", context="4096", hardware='tpu { topology = "v5p:8x8x8" }'
    ),
    "llama-70b-grpo-h200": spec_text(
        POLICY, preset="llama-3.1-70b", context="4096", hardware=NODES
    ),
    "long-context-h200": spec_text(LONG, preset="llama-3.1-8b", context="128Ki", hardware=SMALL),
    "dpo-pinned-h200": spec_text(
        PREFERENCES, preset="llama-3.1-8b", context="4096", hardware=SMALL
    ),
}


@pytest.mark.parametrize("name", [*PLANS, "gemma-three-sessions-v5e"])
def test_plan_text_matches_the_snapshot(name: str, tmp_path: Path, bless: bool) -> None:
    sets: list[str] = []
    spec = tmp_path / "spec.tune"
    if name in PLANS:
        spec.write_text(PLANS[name])
        (tmp_path / "d.jsonl").write_text('{"q": "1+1=", "a": "2"}\n')
    else:
        spec = ROOT / "specs/gemma_three_sessions.tune"
        sets = [
            'hardware.pod.topology="v5e:4x4"',
            "hardware.pod.price=1.2 per device_hour",
        ]
    program = check_file(spec, sets).program
    assert program is not None
    prepared = prepare(program, Store(tmp_path / "store"))
    output = plan_text.show(prepared, verbose=True, width=100)
    text = re.sub(r"fingerprint [0-9a-f]{32}", "fingerprint ...", output)
    assert_output(Path(__file__).parent / "plans" / f"{name}.txt", text, bless)
    narrow = plan_text.show(prepared, width=60)
    assert max(map(len, output.splitlines())) <= 100
    assert max(map(len, narrow.splitlines()[:-1])) <= 60  # the last line is a summary
