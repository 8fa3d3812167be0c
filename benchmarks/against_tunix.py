"""Compare training and sampling with google-tunix 0.1.7 on this machine's CPU.

    python3 -m venv tunix-env && tunix-env/bin/pip install google-tunix==0.1.7
    python benchmarks/against_tunix.py tunix-env/bin/python \
        --data ../shared/data/gsm8k/train.jsonl \
        --tokenizer ../shared/data/llama2-tokenizer/tokenizer.model

Every measured run is a process of its own: ours, tunix's, ours, tunix's, ... Both have the same
decoder (Qwen3's form, random float32 parameters), the same optimizer and the same shapes. A rate is
that of the median window of a run; printed is the median over runs, and as a ratio the median over
pairs of neighbouring runs, by wall time and by processor time. Memory is the highest resident set
of a process (VmHWM): as a whole (`peak_mib`), and on top of the imports (`own_mib`). `--only train`
runs one case; `--json FILE` writes down every run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from rollout import skewed
from tunix_side import Measurements, Meter, Settings, examples_of, random_batches, report, reward_of

from tunelang.compiler.layout.layout_query import LayoutQuery
from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.search.layout_search import best_layout
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Sft
from tunelang.dsl.vocabulary.training import K3, Sampling
from tunelang.runtime.data.row_errors import BadRows
from tunelang.runtime.data.sample_order import Order
from tunelang.runtime.generation.engine import make_engine
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt
from tunelang.runtime.objectives.advantages import group_advantages
from tunelang.runtime.objectives.policy_gradient import PolicySettings
from tunelang.runtime.planning.local_devices import local_devices
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.policy_step import (
    batch_of,
    in_parts,
    placed,
    policy_step,
    score_program,
)
from tunelang.runtime.tokenize import packing
from tunelang.runtime.tokenize.token_cache import Corpus, Items, SegmentTokens
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import TrainState, random_state
from tunelang.runtime.training.train_step import train_step

TIMEOUT = 180
SIDES = ("ours", "tunix")

MODEL = {
    "layers": 4, "vocabulary": 4096, "width": 256, "mlp": 768, "heads": 4, "kv_heads": 2,
    "head_dim": 64,
}  # fmt: skip
DECODE = {"prompts": 16, "slots": 16, "prompt": 64, "tokens": 128, "windows": 5}
DEPTHS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Figure:
    """One measured figure of a case, and the goal for the ratio of ours to tunix's."""

    name: str
    goal: float | None = None
    more: bool = True
    """Whether more is better."""


@dataclass(frozen=True)
class Case:
    """One comparison: the settings that both sides run with, and the figures that they report."""

    what: str
    settings: Settings
    figures: tuple[Figure, ...]


def rates(unit: str, goal: float, *others: Figure) -> tuple[Figure, ...]:
    """List the rate by wall time, which has the goal, the one by processor time, and the rest."""
    return (Figure(f"{unit}_per_s", goal), Figure(f"{unit}_per_cpu_s"), *others)


CASES = {
    "train": Case(
        "train",
        {"batch": 8, "length": 256, "steps": 4, "windows": 4},
        rates(
            "tokens", 1.2, Figure("peak_mib", 0.65, more=False), Figure("own_mib", more=False)
        ),
    ),
    "greedy": Case("sample", {**DECODE, "temperature": 0.0, "top_p": None}, rates("tokens", 1.25)),
    "top-p": Case("sample", {**DECODE, "temperature": 0.9, "top_p": 0.95}, rates("tokens", 3.5)),
    "skewed": Case(
        "sample",
        {
            **DECODE, "group": 8, "slots": 32, "short": 32, "temperature": 0.9, "top_p": None,
            "windows": 3,
        },
        rates("completions", 2.0),
    ),
    "grpo": Case(
        "grpo",
        {
            "prompts": 4, "group": 4, "slots": 16, "prompt": 64, "tokens": 64, "beta": 0.04,
            "temperature": 0.9, "steps": 8,
        },
        rates("steps", 1.5),
    ),
    "lengths": Case(
        "lengths",
        {"vocabulary": 32_000, "batch": 4, "steps": 2, "windows": 3},
        rates("useful_tokens", 2.5, Figure("useful_share")),
    ),
    "compile": Case(
        "compile",
        {"batch": 1, "length": 32, "depths": DEPTHS},
        tuple(Figure(f"compile_s_{depth}", more=False) for depth in DEPTHS),
    ),
}  # fmt: skip


# What we do, in a process of its own. It follows `supervised` and `policy` in `runtime/stages/`.


def architecture_of(settings: Settings) -> Architecture:
    """Return the architecture of tunix's Qwen3."""
    sizes = {name: settings[name] for name in MODEL}
    context = settings.get("length") or settings["prompt"] + settings["tokens"]
    return Architecture(**sizes, context=context, qk_norm=True, rope_base=1e6, tied=False)


def adamw(lr: float) -> tuple[Any, Any]:
    """Return our equivalent of `optax.adamw(lr)`, and its schedule."""
    spec = AdamW(lr=lr, weight_decay=1e-4, clip_norm=None)
    return build_optimizer(spec, 1000), learning_rate(spec, 1000)


def program_of(settings: Settings) -> StepConfig:
    """Return the training program as the planner lays it out on this machine."""
    stage: Training
    if "group" in settings and "beta" in settings:
        stage = policy_of(settings)
    else:
        rows = Measure(value=float(settings.get("batch", 1)), unit="sequences")
        stage = Sft.model_construct(batch=rows, optimizer=AdamW(lr=1e-4))
    with tempfile.TemporaryDirectory() as folder:
        devices = local_devices(Path(folder), 1)
    layout = best_layout(
        LayoutQuery(
            stage=stage, architecture=architecture_of(settings), dtype_bytes=4, devices=devices
        )
    )
    return StepConfig(
        layout=make_layout(),
        micro_batches=settings.get("micro_batches", layout.micro_batches),
        remat=settings.get("remat", layout.remat),
        chunk=CHUNK,
    )


class Trainer:
    """The train step, called as the training loop calls it."""

    def __init__(self, settings: Settings) -> None:
        architecture, program = architecture_of(settings), program_of(settings)
        optimizer, schedule = adamw(1e-4)
        self.parameters = parameter_count(architecture)
        self._state = random_state(architecture, optimizer, program, 0)
        self._step = train_step(architecture, optimizer, schedule, program)

    def train(self, batches: Sequence[Batch]) -> None:
        """Make a step of each batch; metrics are fetched while the next step runs."""
        before = None
        for batch in batches:
            self._state, metrics = self._step(self._state, batch)
            if before is not None:
                jax.device_get(before)
            before = metrics
        jax.device_get(before)


def inputs(tokens: np.ndarray) -> list[Batch]:
    """Give batches `[count, batch, length]` to the trainer: all tokens are trained."""
    return [Batch(rows[None], np.ones((1, *rows.shape), bool)) for rows in tokens]


def train(settings: Settings) -> Measurements:
    """Train all parameters on full sequences."""
    meter, trainer, steps = Meter(), Trainer(settings), settings["steps"]
    trainer.train(inputs(random_batches(settings, 2)))
    for window in range(settings["windows"]):
        data = inputs(random_batches(settings, steps, window + 1))
        meter.window(lambda data=data: trainer.train(data), steps)
    measurements = meter.measurements("tokens", settings["batch"] * settings["length"])
    return {**measurements, "parameters": trainer.parameters}


def compile_time(settings: Settings) -> Measurements:
    """Time the first step of training for several depths, less a later one."""
    measurements: Measurements = {}
    for layers in settings["depths"]:
        trainer = Trainer({**settings, "layers": layers})
        times = []
        for batch in inputs(random_batches(settings, 3)):
            start = time.perf_counter()
            trainer.train([batch])
            times.append(time.perf_counter() - start)
        measurements[f"compile_s_{layers}"] = times[0] - times[-1]
    return measurements


def real_lengths(settings: Settings) -> Measurements:
    """Train on examples of natural lengths, packed into sequences as long as the longest one."""
    meter, trainer, steps = Meter(), Trainer(settings), settings["steps"]
    ids, trained, offsets = examples_of(settings)
    items = Items((SegmentTokens(ids, trained, np.stack([offsets[:-1], offsets[1:]], 1)),))
    order = Order((len(items.spans),), (1.0,), seed=0)
    corpus = Corpus((items,), order, settings["length"], 0, BadRows())
    length = Measure(value=float(1 + steps * settings["windows"]), unit="steps")
    table = packing.plan(corpus, length, batch=settings["batch"], packed=True)
    batches = [packing.batch_of(table, corpus, step) for step in range(table.steps)]
    useful = np.array([(batch.segments > 0).sum() for batch in batches])
    data = [
        Batch(*(each[None] for each in (batch.tokens, batch.mask, batch.segments, batch.positions)))
        for batch in batches
    ]
    trainer.train(data[:1])
    for window in range(settings["windows"]):
        part = data[1 + window * steps : 1 + (window + 1) * steps]
        meter.window(lambda part=part: trainer.train(part), steps)
    return {
        **meter.measurements("useful_tokens", float(useful[1:].mean())),
        "useful_share": float(useful[1:].mean() / (settings["batch"] * settings["length"])),
    }


def prompts_of(settings: Settings, seed: int) -> list[Prompt]:
    """Return random prompts."""
    rows = np.random.default_rng(seed).integers(
        2, settings["vocabulary"], (settings["prompts"], settings["prompt"])
    )
    return [Prompt(row.tolist(), index) for index, row in enumerate(rows)]


def sampling_of(settings: Settings) -> Sampling:
    """Return the sampling settings of a case."""
    return Sampling(
        max_tokens=settings["tokens"],
        temperature=settings["temperature"],
        top_p=settings.get("top_p"),
        max_prompt=settings["prompt"],
    )


def sample(settings: Settings) -> Measurements:
    """Sample all prompts."""
    meter, architecture, program = Meter(), architecture_of(settings), program_of(settings)
    params = random_state(architecture, adamw(1.0)[0], program, 0).params
    engine = make_engine(
        architecture,
        slots=settings["slots"],
        capacity=architecture.context,
        layout=program.layout,
    )
    if "short" in settings:
        engine = skewed(engine, settings["short"], settings["tokens"])
    group = settings.get("group", 1)

    sampler = Sampler(engine, sampling_of(settings), stop_ids=(), pad=0)

    def call(seed: int) -> None:
        sampler.sample(params, prompts_of(settings, seed), group=group, seed=seed)

    call(0)
    call(1)
    for window in range(settings["windows"]):
        meter.window(lambda seed=window + 2: call(seed))
    completions = settings["prompts"] * group
    unit, per_completion = (
        ("completions", 1) if "short" in settings else ("tokens", settings["tokens"])
    )
    return meter.measurements(unit, completions * per_completion)


def policy_of(settings: Settings) -> Policy:
    """Return a stage with the GRPO of the paper, which is tunix's default."""
    return Policy.model_construct(
        rollout=sampling_of(settings),
        kl=K3(coefficient=settings["beta"]),
        aggregate="sequence_mean",
        group=settings["group"],
        batch=settings["prompts"],
        optimizer=AdamW(lr=1e-5),
    )


def grpo(settings: Settings) -> Measurements:
    """Sample, score by the reference, reward, update."""
    meter, architecture, program = Meter(), architecture_of(settings), program_of(settings)
    group, sampling = settings["group"], sampling_of(settings)
    policy = policy_of(settings)
    optimizer, schedule = adamw(1e-5)
    engine = make_engine(
        architecture,
        slots=settings["slots"],
        capacity=architecture.context,
        layout=program.layout,
    )
    sampler = Sampler(engine, sampling, stop_ids=(), pad=0)
    update = policy_step(architecture, optimizer, schedule, PolicySettings.of(policy), program)
    score = score_program(architecture, program, settings["temperature"])
    advantages = jax.jit(group_advantages, static_argnames="baseline")
    part = math.gcd(group, settings["prompts"] * group // program.micro_batches)
    state = random_state(architecture, optimizer, program, 0)
    reference = jax.tree.map(jnp.copy, state.params)

    def step(state: TrainState, index: int) -> TrainState:
        episodes = sampler.sample(
            state.params, prompts_of(settings, index), group=group, seed=0, step=index
        )
        batch = in_parts(batch_of(episodes, settings["prompt"], settings["tokens"]), part)
        scored = score(reference, batch.prompts, batch.prompt_lengths, batch.tokens)
        rewards = np.array([reward_of(episode.tokens) for episode in episodes])
        result = advantages(rewards.reshape(-1, group), baseline="group_mean_std")
        values = np.asarray(result.values, np.float32).reshape(-1, part)
        batch = dataclasses.replace(batch, advantages=values, reference=scored)
        state, metrics = update(state, placed(batch, program))
        jax.device_get(metrics)
        return state

    for index in range(2):
        state = step(state, index)
    for index in range(2, 2 + settings["steps"]):
        wall, cpu = time.perf_counter(), time.process_time()
        state = step(state, index)
        meter.add(time.perf_counter() - wall, time.process_time() - cpu)
    return {**meter.measurements("steps", 1), "parameters": parameter_count(architecture)}


OURS = {
    "train": train, "compile": compile_time, "lengths": real_lengths, "sample": sample,
    "grpo": grpo,
}  # fmt: skip


# Both in turn.


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ours against google-tunix 0.1.7.")
    parser.add_argument("python", help="the interpreter of an environment with google-tunix==0.1.7")
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl, for the case `lengths`")
    parser.add_argument(
        "--tokenizer", type=Path, help="a SentencePiece model, for the case `lengths`"
    )
    parser.add_argument("--only", choices=CASES, action="append", help="run this case; repeatable")
    parser.add_argument("--runs", type=int, default=3, help="number of runs of each side")
    parser.add_argument(
        "--set", default="{}", help="JSON object with settings of the cases to change"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures of every run to")
    return parser.parse_args()


def tokenised(data: Path, tokenizer: Path, rows: int, into: Path) -> int:
    """Write the tokens of questions and answers for both sides; returns the longest's length."""
    model = sentencepiece.SentencePieceProcessor(str(tokenizer))
    ids: list[int] = []
    mask: list[bool] = []
    offsets = [0]
    for line in data.read_text().splitlines()[:rows]:
        row = json.loads(line)
        question = [model.bos_id(), *model.encode(row["question"] + "\n")]
        answer = [*model.encode(row["answer"]), model.eos_id()]
        ids += question + answer
        mask += [False] * len(question) + [True] * len(answer)
        offsets.append(len(ids))
    np.savez(into, ids=np.array(ids, np.int32), mask=np.array(mask), offsets=np.array(offsets))
    return int(np.diff(offsets).max())


def measured(python: str, script: str, case: Case) -> Measurements:
    """Run one side once."""
    command = [python, script, *(["--"] if script == __file__ else []), case.what]
    here = Path(__file__).parent
    done = subprocess.run(
        [*command, json.dumps(case.settings)],
        cwd=here,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    measurements: Measurements = json.loads(done.stdout.splitlines()[-1])
    return measurements


def compare(python: str, name: str, case: Case, runs: int) -> dict[str, list[Measurements]]:
    """Run both sides in turn and print a row for each figure."""
    runs_by_side: dict[str, list[Measurements]] = {side: [] for side in SIDES}
    sides = ((SIDES[0], sys.executable, __file__),
             (SIDES[1], python, str(Path(__file__).with_name("tunix_side.py"))))  # fmt: skip
    for _ in range(runs):
        for side, interpreter, script in sides:
            runs_by_side[side].append(measured(interpreter, script, case))
    sizes = {
        run["parameters"] for runs in runs_by_side.values() for run in runs if "parameters" in run
    }
    assert len(sizes) < 2, f"models of {sizes} parameters"
    for figure in case.figures:
        a, b = ([run[figure.name] for run in runs_by_side[side]] for side in SIDES)
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        goal = reached = ""
        if figure.goal is not None:
            goal = f"{'>=' if figure.more else '<='} {figure.goal}"
            good = ratio >= figure.goal if figure.more else ratio <= figure.goal
            reached = "yes" if good else "no"
        print(
            f"{name:8} {figure.name:24} {statistics.median(a):10.2f} {statistics.median(b):10.2f}"
            f" {ratio:7.2f}  {goal:8} {reached:3}",
            flush=True,
        )
    return runs_by_side


def main() -> None:
    """Run the cases and print the table."""
    args = arguments()
    everything = {}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'case':8} {'figure':24} {'ours':>10} {'tunix':>10} {'ratio':>7}  goal     reached")
        for name in args.only or CASES:
            case = CASES[name]
            settings = {**MODEL, **case.settings, **json.loads(args.set)}
            if case.what == "lengths":
                if not (args.data and args.tokenizer):
                    print(f"{name:8} needs --data and --tokenizer")
                    continue
                examples = Path(folder, "examples.npz")
                longest = tokenised(args.data, args.tokenizer, 2000, examples)
                settings |= {"examples": str(examples), "length": -(-longest // 16) * 16}
            case = replace(case, settings=settings)
            everything[name] = compare(args.python, name, case, args.runs)
    if args.json:
        args.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--":
        del sys.argv[1]
        report(OURS)
    else:
        main()
