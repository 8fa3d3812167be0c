"""Compare every kind of training with supervised tuning of the same model on the same rows.

`python benchmarks/methods.py [--width 256 --layers 4 --batch 4 --only 'dpo, live;kto']`. A row has
four segments, each a prompt and an answer; for pairs, two neighbouring segments form one. Steps of
all methods alternate in one process; times are medians. The expected share counts FLOPs: a trained
token takes three forward passes, and each model that only runs forward takes one; KTO runs
both models on mismatched answers too. PPO's is the update alone, on rows that are cut into prompt
and completion, where logits are computed for completions only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from tunelang.compiler.layout.stage_layout import CHUNK
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import forward_flops, parameter_count, train_flops
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.policy_stages import Ppo
from tunelang.dsl.vocabulary.preference_stages import Kto, Preference, RewardModel
from tunelang.dsl.vocabulary.supervised_stages import Distill
from tunelang.dsl.vocabulary.training import Critic, Sampling
from tunelang.runtime.loading.initial_weights import score_head
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.objectives.policy_gradient import PolicySettings
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.distill import DistillObjective
from tunelang.runtime.stages.kto import KtoExtras, KtoObjective, mismatch
from tunelang.runtime.stages.policy import CriticSetup, with_critic
from tunelang.runtime.stages.policy_step import PolicyBatch, policy_step
from tunelang.runtime.stages.ppo import GaeEstimator, learner_of
from tunelang.runtime.stages.preference import PairObjective
from tunelang.runtime.stages.reward_model import ScoreObjective
from tunelang.runtime.stages.supervised import Auxiliary
from tunelang.runtime.stages.teacher_cache import TeacherTokens
from tunelang.runtime.training.objective import Batch, Objective
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import random_state
from tunelang.runtime.training.train_step import train_step

SPEC = AdamW.unvalidated(lr=1e-4)
STEPS = 1000
SEGMENTS = 4
"""Of a row; the first quarter of each is the prompt."""
SFT = "sft"


@dataclass
class Method:
    """A step to repeat, and the FLOPs that it needs for a token."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    flops: float
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run a step and record its time."""
        start, busy = time.perf_counter(), time.process_time()
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - busy)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Training of every kind against plain tuning.")
    sizes = {
        "width": 256, "layers": 4, "heads": 4, "kv-heads": 4, "mlp": 704, "vocabulary": 4096,
        "length": 256, "batch": 4, "micro-batches": 1, "chunk": CHUNK, "calls": 10, "top-k": 32,
        "teacher-width": 512, "teacher-layers": 4,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=list(DTYPES), default="f32")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--only", help="measure these methods only, separated by semicolons")
    return parser.parse_args()


def architectures(args: argparse.Namespace) -> tuple[Architecture, Architecture]:
    """Return the model, and the teacher: with heads as large, and an mlp in proportion."""
    model = Architecture(
        vocabulary=args.vocabulary, layers=args.layers, width=args.width, heads=args.heads,
        kv_heads=args.kv_heads, head_dim=args.width // args.heads, mlp=args.mlp,
        context=args.length,
    )  # fmt: skip
    heads = args.teacher_width // model.head_dim
    teacher = replace(
        model, layers=args.teacher_layers, width=args.teacher_width, heads=heads, kv_heads=heads,
        mlp=args.mlp * args.teacher_width // args.width,
    )  # fmt: skip
    return model, teacher


def make_batch(args: argparse.Namespace) -> Batch:
    """Return random rows with trained answers."""
    random = np.random.default_rng(0)
    shape = args.batch, args.length
    place, segment_length = np.arange(args.length, dtype=np.int32), args.length // SEGMENTS
    plain = Batch(
        random.integers(0, args.vocabulary, shape, dtype=np.int32),
        np.broadcast_to(place % segment_length >= segment_length // SEGMENTS, shape),
        np.broadcast_to(place // segment_length + 1, shape),
        np.broadcast_to(place % segment_length, shape),
    )
    return jax.tree.map(lambda array: array[None], plain)


def reference_log_probs(args: argparse.Namespace) -> np.ndarray:
    """Return the log-probability of each answer by a reference that ran ahead."""
    random = np.random.default_rng(3)
    return random.normal(-600, 1, (1, args.batch, SEGMENTS)).astype(np.float32)


def kto_extras(args: argparse.Namespace) -> KtoExtras:
    """Return labels, and mismatched answers."""
    batch = jax.tree.map(lambda array: array[0], make_batch(args))
    labels = np.broadcast_to(np.arange(SEGMENTS, dtype=np.float32) % 2, (args.batch, SEGMENTS))
    extras = KtoExtras(labels, mismatch(batch, 0, 1))
    return jax.tree.map(lambda array: array[None], extras)


def top_k_of(args: argparse.Namespace) -> TeacherTokens:
    """Return ids that differ within a token, and their log-probabilities."""
    shape = (1, args.batch, args.length, args.top_k)
    random = np.random.default_rng(1)
    first = random.integers(0, args.vocabulary, shape[:-1], dtype=np.int32)[..., None]
    ids = (first + np.arange(args.top_k, dtype=np.int32)) % args.vocabulary
    return TeacherTokens(ids, np.full(shape, -np.log(2.0 * args.top_k), np.float32))


def supervised_methods(
    args: argparse.Namespace, config: StepConfig
) -> dict[str, Callable[[], Method]]:
    """Return a constructor for each method that trains on given sequences."""
    model, teacher = architectures(args)
    scoring = replace(model, scores=True)
    optimizer, schedule = build_optimizer(SPEC, STEPS), learning_rate(SPEC, STEPS)
    batch, length = make_batch(args), args.length
    trained, forward = (of(model, length) for of in (train_flops, forward_flops))
    distill = Distill.unvalidated(hard=0.1)

    def method(
        objective: Objective | None,
        flops: float,
        student: Architecture = model,
        aux_params: Architecture | None = None,
        extras: Any = None,
    ) -> Callable[[], Method]:
        def make() -> Method:
            state = random_state(student, optimizer, config, 0)
            if aux_params is not None:
                state = replace(
                    state, aux_params=random_state(aux_params, optimizer, config, 1).params
                )
            step = train_step(student, optimizer, schedule, config, objective)
            return Method(step, state, replace(batch, extras=extras), flops)

        return make

    def pairs(live: bool) -> Objective:
        return PairObjective(Preference.unvalidated(), SEGMENTS, Auxiliary(model, live))

    return {
        SFT: method(None, trained),
        "dpo, ahead": method(pairs(False), trained, extras=reference_log_probs(args)),
        "dpo, live": method(pairs(True), trained + forward, aux_params=model),
        "reward_model": method(
            ScoreObjective(RewardModel.unvalidated(), SEGMENTS, False),
            train_flops(scoring, length),
            scoring,
        ),
        "kto": method(
            KtoObjective(Kto.unvalidated(), SEGMENTS, Auxiliary(model, True)),
            trained + 3 * forward,
            aux_params=model,
            extras=kto_extras(args),
        ),
        "distill, live": method(
            DistillObjective(distill, model, teacher),
            trained + forward_flops(teacher, length),
            aux_params=teacher,
        ),
        "distill, top_k ahead": method(
            DistillObjective(distill.model_copy(update={"top_k": args.top_k}), model, teacher),
            trained,
            extras=top_k_of(args),
        ),
    }


def ppo_methods(args: argparse.Namespace, config: StepConfig) -> dict[str, Callable[[], Method]]:
    """Return a constructor for each method that trains on sampled completions."""
    model, _ = architectures(args)
    scoring = replace(model, scores=True)
    optimizer, schedule = build_optimizer(SPEC, STEPS), learning_rate(SPEC, STEPS)
    segment_length = args.length // SEGMENTS
    before, rows = segment_length // SEGMENTS, args.batch * SEGMENTS
    shape = rows, 1, segment_length - before
    random = np.random.default_rng(2)
    near = random.normal(-8, 0.1, (5, *shape)).astype(np.float32)
    batch = PolicyBatch(
        prompts=random.integers(0, args.vocabulary, (rows, before), dtype=np.int32),
        prompt_lengths=np.full(rows, before, np.int32),
        tokens=random.integers(0, args.vocabulary, shape, dtype=np.int32),
        mask=np.ones(shape, bool),
        sampler=near[0], old=near[1], advantages=near[2], values=near[3], returns=near[4],
    )  # fmt: skip
    spared = 6.0 * model.vocabulary * model.width * before / segment_length
    trained = train_flops(model, segment_length) - spared

    def method(trunk: str, flops: float) -> Callable[[], Method]:
        critic_settings = Critic.unvalidated(trunk=trunk, optimizer=SPEC)
        rollout = Sampling.unvalidated(max_tokens=shape[2])
        stage = Ppo.unvalidated(rollout=rollout, critic=critic_settings, passes=1, optimizer=SPEC)

        def make() -> Method:
            learner = learner_of(critic_settings, scoring, STEPS)
            if trunk == "separate":
                critic = random_state(scoring, optimizer, config, 1).params
            else:
                critic = score_head(model, jax.numpy.ones(model.width), config.layout)
            state = random_state(model, optimizer, config, 0)
            setup = CriticSetup(learner, scoring, critic, SPEC.lr, GaeEstimator)
            state = with_critic(state, setup, config)
            settings = PolicySettings.of(stage)
            step = policy_step(model, optimizer, schedule, settings, config, learner)
            return Method(step, state, batch, flops)

        return make

    return {
        "ppo, separate critic": method("separate", trained + train_flops(scoring, segment_length)),
        "ppo, shared critic": method("shared", trained),
    }


def main() -> None:
    """Print the table."""
    args = arguments()
    config = StepConfig(
        layout=make_layout(), dtype=DTYPES[args.dtype], micro_batches=args.micro_batches,
        remat=args.remat, chunk=args.chunk,
    )  # fmt: skip
    makers = {**supervised_methods(args, config), **ppo_methods(args, config)}
    wanted = [SFT, *args.only.split(";")] if args.only else list(makers)
    methods = {name: makers[name]() for name in dict.fromkeys(wanted)}
    for method in methods.values():
        method.run()  # compiles
        method.seconds.clear()
        method.cpu.clear()
    for _ in range(args.calls):
        for method in methods.values():
            method.run()
    model, teacher = architectures(args)
    print(
        f"{parameter_count(model) / 1e6:.1f} M parameters, a teacher of"
        f" {parameter_count(teacher) / 1e6:.1f} M, {args.batch} × {args.length} tokens\n"
    )
    print("| method | ms a step | tokens/s | of sft | of sft, by CPU time | expected | reached |")
    print("|---|---|---|---|---|---|---|")
    plain = methods[SFT]
    for name, method in methods.items():
        took = statistics.median(method.seconds)
        share = statistics.median(
            ours / other for ours, other in zip(plain.seconds, method.seconds, strict=True)
        )
        busy = statistics.median(
            ours / other for ours, other in zip(plain.cpu, method.cpu, strict=True)
        )
        theory = plain.flops / method.flops
        print(
            f"| {name} | {1000 * took:.0f} | {args.batch * args.length / took:,.0f}"
            f" | {share:.2f} | {busy:.2f} | {theory:.2f} | {share / theory:.0%} |"
        )


if __name__ == "__main__":
    main()
