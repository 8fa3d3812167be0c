"""Run one case in google-tunix's environment; also the meters that both sides measure with.

    python benchmarks/tunix_side.py train '{"layers": 4, ...}'

`against_tunix.py` calls it. Prints one line of JSON. The library is called as in its own examples:
`PeftTrainer.train` with its default loss, `Sampler.__call__`, `GRPOLearner.train` with a separate
reference model.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from flax import nnx

PAD, START = 0, 1
MIB = 2**20

Settings = dict[str, Any]
Measurements = dict[str, float]


# How both sides measure.


class Meter:
    """Measures wall and CPU time of windows, and memory beyond that of the imports."""

    def __init__(self) -> None:
        jax.block_until_ready(jax.numpy.zeros(()))
        self._imported = resident("VmRSS")
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def window(self, run: Callable[[], object], times: int = 1) -> None:
        """Time a function that does something `times` times, and returns when it is done."""
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        self.add((time.perf_counter() - wall) / times, (time.process_time() - cpu) / times)

    def add(self, wall: float, cpu: float) -> None:
        """Take down the time of one."""
        self._wall.append(wall)
        self._cpu.append(cpu)

    def measurements(self, unit: str, amount: float) -> Measurements:
        """Compute rates of the median window, which has `amount` of a unit, and memory in MiB."""
        peak = resident("VmHWM")
        return {
            f"{unit}_per_s": amount / statistics.median(self._wall),
            f"{unit}_per_cpu_s": amount / statistics.median(self._cpu),
            "peak_mib": peak,
            "own_mib": peak - self._imported,
        }


def resident(name: str) -> float:
    """Read this process's memory in MiB: `VmRSS`, or `VmHWM` for the highest it was."""
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def random_batches(settings: Settings, count: int, seed: int = 0) -> np.ndarray:
    """Return random tokens, `[count, batch, length]`."""
    shape = (count, settings["batch"], settings["length"])
    return np.random.default_rng(seed).integers(2, settings["vocabulary"], shape, np.int32)


def reward_of(tokens: np.ndarray) -> float:
    """Return the share of even tokens: cheap, and different for the completions of a prompt."""
    return float(np.mean(np.asarray(tokens) % 2 == 0))


def examples_of(settings: Settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenised examples: flat ids, flat mask of what is trained, and offsets `[examples + 1]`."""
    with np.load(settings["examples"]) as arrays:
        return arrays["ids"], arrays["mask"], arrays["offsets"]


def report(cases: dict[str, Callable[[Settings], Measurements]]) -> None:
    """Run the case that the command line names and print its figures."""
    name, text = sys.argv[1:3]
    settings = json.loads(text)
    np.random.seed(0)
    print(json.dumps(cases[name](settings)), flush=True)


# What tunix does.


class IntTokenizer:
    """Encodes text that consists of token ids and spaces. No id ends a text: all are drawn."""

    def __init__(self, vocabulary: int) -> None:
        self._end = vocabulary

    def encode(self, text: str, **_: Any) -> list[int]:
        """Read numbers."""
        return [int(each) for each in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        """Write numbers."""
        return " ".join(str(int(each)) for each in ids)

    def bos_id(self) -> int:
        """Return the start token."""
        return START

    def eos_id(self) -> int:
        """Return an id past the vocabulary."""
        return self._end

    def pad_id(self) -> int:
        """Return the padding token."""
        return PAD


def make_model(settings: Settings, seed: int = 0) -> Any:
    """Return tunix's Qwen3 with random parameters; its own initialisation zeroes the MLP."""
    from tunix.models.qwen3 import model as qwen3

    config = qwen3.ModelConfig(
        num_layers=settings["layers"], vocab_size=settings["vocabulary"],
        embed_dim=settings["width"],
        hidden_dim=settings["mlp"], num_heads=settings["heads"], head_dim=settings["head_dim"],
        num_kv_heads=settings["kv_heads"], rope_theta=1_000_000, norm_eps=1e-6,
        use_tied_embedding=False,
        remat_config=qwen3.RematConfig[settings.get("tunix_remat", "NONE")],
    )  # fmt: skip
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param) and not np.asarray(variable[...]).any():
            value = rng.normal(scale=0.02, size=variable.shape).astype(np.float32)
            variable.set_value(jax.numpy.asarray(value))
    return model


def parameters(model: Any) -> int:
    """Count the parameters of a model."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def one_device() -> jax.sharding.Mesh:
    """Return the one-device mesh that the library's trainer needs."""
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def make_trainer(settings: Settings, mesh: jax.sharding.Mesh) -> Any:
    """Return the library's trainer, which stays open between calls of `train`."""
    from tunix.rl import reshard
    from tunix.sft import peft_trainer, utils

    def model_input(batch: Any) -> dict[str, Any]:
        real = batch.input_tokens != PAD
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(real),
            "attention_mask": utils.make_causal_attn_mask(real),
        }

    model = reshard.reshard_model_to_mesh(make_model(settings), mesh)
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4), config)
    trainer.is_managed_externally = True
    return trainer.with_gen_model_input_fn(model_input)


def inputs(tokens: np.ndarray, masks: np.ndarray | None = None) -> list[Any]:
    """Give batches `[count, batch, length]` to the trainer."""
    from tunix.sft.peft_trainer import TrainingInput

    masks = np.ones_like(tokens) if masks is None else masks
    return [TrainingInput(input_tokens=a, input_mask=b) for a, b in zip(tokens, masks, strict=True)]


def train(settings: Settings) -> Measurements:
    """Train all parameters on full sequences."""
    from tunix.sft import peft_trainer  # noqa: F401  so that the meter starts behind imports

    meter, mesh, steps = Meter(), one_device(), settings["steps"]
    with mesh:
        trainer = make_trainer(settings, mesh)
        trainer.train(inputs(random_batches(settings, 2)))
        for window in range(settings["windows"]):
            data = inputs(random_batches(settings, steps, window + 1))
            meter.window(lambda data=data: trainer.train(data), steps)
    measurements = meter.measurements("tokens", settings["batch"] * settings["length"])
    return {**measurements, "parameters": parameters(trainer.model)}


def compile_time(settings: Settings) -> Measurements:
    """Time the first step of training for several depths, less a later one."""
    measurements: Measurements = {}
    mesh = one_device()
    for layers in settings["depths"]:
        with mesh:
            trainer = make_trainer({**settings, "layers": layers}, mesh)
            times = []
            for batch in inputs(random_batches(settings, 3)):
                start = time.perf_counter()
                trainer.train([batch])
                times.append(time.perf_counter() - start)
        measurements[f"compile_s_{layers}"] = times[0] - times[-1]
    return measurements


def real_lengths(settings: Settings) -> Measurements:
    """Train on examples of natural lengths, each padded to that of the longest one."""
    from tunix.sft import peft_trainer  # noqa: F401

    meter, mesh, steps, batch = Meter(), one_device(), settings["steps"], settings["batch"]
    ids, trained, offsets = examples_of(settings)
    order = np.random.default_rng(0).permutation(len(offsets) - 1)
    count = 1 + steps * settings["windows"]
    tokens = np.full((count, batch, settings["length"]), PAD, np.int32)
    masks = np.zeros_like(tokens)
    useful = np.zeros(count)
    for at, example in enumerate(order[: count * batch]):
        start, end = offsets[example], offsets[example + 1]
        place = (*divmod(at, batch), slice(0, end - start))
        tokens[place], masks[place] = ids[start:end], trained[start:end]
        useful[at // batch] += end - start
    with mesh:
        trainer = make_trainer(settings, mesh)
        trainer.train(inputs(tokens[:1], masks[:1]))
        for window in range(settings["windows"]):
            part = slice(1 + window * steps, 1 + (window + 1) * steps)
            data = inputs(tokens[part], masks[part])
            meter.window(lambda data=data: trainer.train(data), steps)
    return {
        **meter.measurements("useful_tokens", float(useful[1:].mean())),
        "useful_share": float(useful[1:].mean() / (batch * settings["length"])),
    }


def make_sampler(settings: Settings) -> tuple[Any, Callable[[int], list[str]]]:
    """Return the library's sampler, and what makes its prompts from a seed."""
    from tunix.generate import sampler

    class Skewed(sampler.Sampler):
        """Ends every other completion after a quarter of the tokens, where it is asked to."""

        def _sample(self, logits: Any, eos: Any, cache: Any, sampler_state: Any) -> Any:
            state = super()._sample(logits, eos, cache, sampler_state)
            if "short" not in settings:
                return state
            drawn = state.decoding_step + 1 - settings["prompt"]
            odd = jax.numpy.arange(state.done.shape[0]) % 2 == 1
            return sampler.dataclasses.replace(
                state, done=state.done | (odd & (drawn >= settings["short"]))
            )

    made = Skewed(
        make_model(settings),
        IntTokenizer(settings["vocabulary"]),
        sampler.CacheConfig(
            cache_size=settings["prompt"] + settings["tokens"], num_layers=settings["layers"],
            num_kv_heads=settings["kv_heads"], head_dim=settings["head_dim"],
        ),
    )  # fmt: skip

    def prompts(seed: int) -> list[str]:
        shape = (settings["prompts"], settings["prompt"] - 1)  # the start token goes before them
        rows = np.random.default_rng(seed).integers(2, settings["vocabulary"], shape)
        return [" ".join(map(str, row)) for row in rows]

    return made, prompts


def sample(settings: Settings) -> Measurements:
    """Sample all prompts in calls of as many completions as there are slots."""
    from tunix.generate import sampler  # noqa: F401

    meter = Meter()
    sampler_, prompts = make_sampler(settings)
    group, slots = settings.get("group", 1), settings["slots"]
    sampling = {}
    if settings["temperature"]:
        sampling = {"temperature": settings["temperature"], "top_p": settings["top_p"] or 1.0}

    def call(seed: int) -> None:
        rows = [prompt for prompt in prompts(seed) for _ in range(group)]
        for start in range(0, len(rows), slots):
            out = sampler_(
                rows[start : start + slots],
                max_generation_steps=settings["tokens"],
                max_prompt_length=settings["prompt"],
                seed=seed,
                **sampling,
            )
            assert all(len(tokens) == settings["tokens"] for tokens in out.tokens)

    call(0)
    call(1)
    for window in range(settings["windows"]):
        meter.window(lambda seed=window + 2: call(seed))
    completions = settings["prompts"] * group
    unit, per_completion = (
        ("completions", 1) if "short" in settings else ("tokens", settings["tokens"])
    )
    return meter.measurements(unit, completions * per_completion)


def grpo(settings: Settings) -> Measurements:
    """Sample, score by the reference, reward, update."""
    from tunix.rl import reshard, rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    meter, mesh, role = Meter(), one_device(), rl_cluster.Role
    total = 3 + settings["steps"]
    rng = np.random.default_rng(0)

    def rewards(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        del prompts
        return [reward_of(np.array(text.split(), int)) for text in completions]

    marks: list[tuple[float, float]] = []

    def steps() -> Any:
        shape = (settings["prompts"], settings["prompt"] - 1)
        for _ in range(total):
            rows = rng.integers(2, settings["vocabulary"], shape)
            marks.append((time.perf_counter(), time.process_time()))
            yield {"prompts": np.array([" ".join(map(str, row)) for row in rows])}

    cluster = rl_cluster.RLCluster(
        actor=reshard.reshard_model_to_mesh(make_model(settings), mesh),
        reference=reshard.reshard_model_to_mesh(make_model(settings), mesh),
        tokenizer=IntTokenizer(settings["vocabulary"]),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            offload_to_cpu=False,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-5), eval_every_n_steps=10**9, max_steps=total
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=settings["tokens"],
                max_prompt_length=settings["prompt"],
                kv_cache_size=settings["prompt"] + settings["tokens"],
                temperature=settings["temperature"],
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    config = grpo_learner.GRPOConfig(
        num_generations=settings["group"], num_iterations=1, beta=settings["beta"], epsilon=0.2
    )
    learner = grpo_learner.GRPOLearner(cluster, config, rewards)
    with mesh:
        learner.train(steps())
    # The batch is asked for once before the first step and then at the start of each.
    for (wall, cpu), (next_wall, next_cpu) in pairwise(marks[2:]):
        meter.add(next_wall - wall, next_cpu - cpu)
    return {**meter.measurements("steps", 1), "parameters": parameters(cluster.actor_trainer.model)}


CASES = {
    "train": train, "compile": compile_time, "lengths": real_lengths, "sample": sample,
    "grpo": grpo,
}  # fmt: skip

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    report(CASES)
