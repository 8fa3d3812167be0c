"""The `run` block and the kinds of stages."""

from typing import Annotated, Any, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Data,
    Evals,
    Flag,
    Function,
    HardwareRef,
    Kind,
    Measure,
    ModelRef,
    NonNegative,
    Reference,
    Reward,
    observe,
    placement,
    result,
)
from tunelang.dsl.vocabulary.training import (
    AdamW,
    Adapter,
    Axes,
    Clip,
    ClipWeights,
    KlTerm,
    Optimizer,
    Sampling,
    TensorBoard,
)

Amount = Annotated[Measure, types.count("steps", "epochs", "tokens")]


class Run(Kind):
    """Settings of the whole spec."""

    name: Annotated[str | None, types.Text()] = observe(
        "The run's name in reports; without it, the file's name.", 'name = "three-sessions"', None
    )
    seed: Annotated[int, types.Whole(low=0)] = result(
        "The seed from which all others are drawn.", "seed = 17", 0
    )
    track: Annotated[tuple[SerializeAsAny[Function], ...], types.ListOf(types.Of("tracker"))] = (
        observe(
            "Where metrics go beside the store.", "track = [tensorboard()]", (TensorBoard.fixed(),)
        )
    )
    on: HardwareRef = placement(
        "The hardware of all stages; without it, the devices that are there.", "on = pod", None
    )


class Stage(Kind):
    """Base of all stages."""

    metrics: ClassVar[dict[str, str]] = {}
    """Metrics that the stage itself yields, beside its evals."""
    needs: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Roles that its data must have: one of these sets."""


class Training(Stage):
    """Base of the stages that update weights."""

    metrics = {"loss": "mean training loss of a token, in nats"}

    from_: ModelRef = result(
        "The model to start from: a `model`, or the stage that yields it.",
        "from = gemma",
        alias="from",
    )
    data: Data = result("What to train on.", "data = math")
    length: Amount = result("How long to train.", "length = 2 epochs")
    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.",
        "optimizer = adamw(lr = 2e-4, warmup = 3%)",
        AdamW.fixed(lr=1e-5, warmup=Measure.fixed(value=0.03, unit="%"), decay="cosine"),
    )
    adapter: Annotated[SerializeAsAny[Adapter] | None, types.Of("adapter")] = result(
        "Train an adapter and leave the weights frozen; without it, all weights are trained, those"
        " of an adapter that the stage starts from merged into them.",
        "adapter = lora(rank = 16, alpha = 32)",
        None,
    )
    seed: Annotated[int | None, types.Whole(low=0)] = result(
        "A seed of its own; without it, one drawn from the run's.", "seed = 1", None
    )
    evals: Evals = result(
        "What to measure before the first step, every `eval_every`, and at the end.",
        "evals = [accuracy]",
        (),
    )
    eval_every: Annotated[int | None, types.count("steps")] = result(
        "Steps between evaluations; without it, only at the start and the end.",
        "eval_every = 100 steps",
        None,
    )
    keep: Annotated[SerializeAsAny[Function] | None, types.Of("winner")] = result(
        "Which branch of a sweep goes on.", "keep = best(accuracy)", None
    )
    checkpoint_every: Annotated[int | None, types.count("steps")] = placement(
        "Steps between checkpoints; without it, about every five minutes.",
        "checkpoint_every = 50 steps",
        None,
    )
    log_every: Annotated[int, types.count("steps")] = observe(
        "Steps between lines of metrics.", "log_every = 1 step", 10
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)
    mesh: Annotated[Axes | None, types.Of("mesh")] = placement(
        "The mesh, in place of the one that the plan would choose.",
        "mesh = axes(fsdp = 8, tensor = 4)",
        None,
    )
    micro_batch: Annotated[int | None, types.count("sequences")] = placement(
        "Sequences that a device handles at once, in place of what the plan would choose.",
        "micro_batch = 8 sequences",
        None,
    )
    remat: Annotated[str, types.Choice(("auto", "none", "dots", "full"))] = placement(
        "What the backward pass computes again instead of keeping:"
        " nothing, all but matrix products,"
        " everything.",
        "remat = full",
        "auto",
    )


class Supervised(Training):
    """Base of the stages whose batch is made of given sequences."""

    batch: Annotated[Measure, types.count("sequences", "tokens")] = result(
        "What one step trains on.", "batch = 64 sequences"
    )
    packing: Flag = result(
        "Whether several short examples share one sequence, without seeing each other.",
        "packing = false",
        True,
    )


class Pretrain(Supervised):
    """Next-token training on plain text, every token counted."""

    needs = (("text",),)

    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.",
        "optimizer = muon(lr = 2e-3, decay = cosine)",
        AdamW.fixed(
            lr=1e-3,
            b2=0.95,
            weight_decay=0.1,
            warmup=Measure.fixed(value=0.03, unit="%"),
            decay="cosine",
        ),
    )


class Sft(Supervised):
    """Supervised tuning: the loss is on the responses only."""

    needs = (("prompt", "response"), ("messages",))


class Policy(Training):
    """Base of policy optimisation: each step samples groups of completions, scores them, and
    updates.
    """

    needs = (("prompt",),)
    metrics = {
        "loss": "policy loss",
        "reward": "mean reward of all completions",
        "kl": "divergence from the reference",
        "entropy": "mean entropy of a token, in nats",
        "length": "mean number of tokens of a completion",
    }

    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.", "optimizer = adamw(lr = 3e-6)", AdamW.fixed(lr=1e-6)
    )
    length: Annotated[Measure, types.count("steps", "epochs")] = result(
        "How long to train.", "length = 300 steps"
    )
    reward: Reward = result("What to increase.", "reward = correct")
    batch: Annotated[int, types.count("prompts")] = result(
        "Prompts of one step.", "batch = 64 prompts"
    )
    group: Annotated[int, types.Whole(low=1)] = result(
        "Completions for each prompt.", "group = 8", 8
    )
    rollout: Annotated[Sampling, types.Of("sampling")] = result(
        "How completions are sampled.", "rollout = sampling(max_tokens = 512)", Sampling.fixed()
    )
    advantage: Annotated[str, types.Choice(("group_mean_std", "group_mean", "leave_one_out"))] = (
        result(
            "The reward less its group's mean, divided by the group's"
            " deviation or not; or less the mean"
            " of the others.",
            "advantage = group_mean",
            "group_mean_std",
        )
    )
    ratio: Annotated[str, types.Choice(("token", "sequence", "sequence_token"))] = result(
        "The probability ratio of each token, or of the sequence (its geometric mean); the last has"
        " the sequence's value and each token's gradient.",
        "ratio = sequence",
        "token",
    )
    clip: Annotated[SerializeAsAny[Function] | None, types.Of("clip")] = result(
        "How far the policy may move in one step.",
        "clip = clip(low = 0.2, high = 0.28)",
        Clip.fixed(),
    )
    aggregate: Annotated[str, types.Choice(("token_mean", "sequence_mean", "fixed_length"))] = (
        result(
            "The mean over all tokens of the step; over sequences, of each"
            " one's mean; or the sum over"
            " tokens divided by sequences times `max_tokens`.",
            "aggregate = sequence_mean",
            "token_mean",
        )
    )
    kl: Annotated[SerializeAsAny[KlTerm] | None, types.Of("kl")] = result(
        "A penalty on the divergence from the reference.", "kl = k3(0.04)", None
    )
    reference: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "What `kl` measures from; without it, the model that the stage starts from.",
        "reference = gemma",
        None,
    )
    correction: Annotated[SerializeAsAny[Function] | None, types.Of("correction")] = result(
        "Correct for the difference between the sampler's probabilities and the trainer's.",
        "correction = truncated(2.0)",
        None,
    )
    entropy: NonNegative = result("Weight of an entropy bonus.", "entropy = 1e-3", 0.0)
    minibatches: Count = result(
        "Updates that a step's completions are divided over.", "minibatches = 4", 1
    )
    passes: Count = result("How often a step's completions are gone through.", "passes = 2", 1)
    refill: Flag = result(
        "Sample on until the batch is full of groups whose rewards differ (dynamic sampling).",
        "refill = true",
        False,
    )
    overlong: Annotated[str, types.Choice(("keep", "mask"))] = result(
        "Whether completions cut off at `max_tokens` are trained on.", "overlong = mask", "keep"
    )
    show: Annotated[int, types.Whole(low=0)] = observe(
        "Completions of a step to keep for reading.", "show = 4", 2
    )


class Export(Stage):
    """Write a model in the form that `transformers` loads: weights, configuration, tokenizer."""

    from_: ModelRef = result("What to write.", "from = generalist", alias="from")
    path: Annotated[str, types.Path("output")] = result(
        "The folder; files in it that the stage did not write are left alone.", 'path = "out/model"'
    )
    format: Annotated[str, types.Choice(("safetensors",))] = result(
        "The form of the weights.", "format = safetensors", "safetensors"
    )
    adapter: Annotated[str, types.Choice(("merged", "apart"))] = result(
        "Whether an adapter is merged into the weights, or written by itself in PEFT's form.",
        "adapter = apart",
        "merged",
    )
    dtype: Annotated[str, types.Choice(("f32", "bf16", "f16"))] = result(
        "The precision of the weights.", "dtype = f32", "bf16"
    )
    shard: Annotated[int, types.Memory()] = result("The largest file.", "shard = 2 GB", 5 * 10**9)


SUPERVISED: dict[str, type[Stage]] = {"pretrain": Pretrain, "sft": Sft, "export": Export}

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": (
        "Group relative policy optimisation (arXiv:2402.03300), with the"
        " loss averaged over all tokens"
        " and no KL term; the paper's own is `aggregate = sequence_mean, kl = k3(0.04)`.",
        {},
    ),
    "dr_grpo": (
        "GRPO without its biases: no division by the deviation or by"
        " the length (arXiv:2503.20783).",
        {"advantage": "group_mean", "aggregate": "fixed_length"},
    ),
    "dapo": (
        "GRPO with a higher upper clip, and groups without a difference"
        " sampled anew (arXiv:2503.14476).",
        {"clip": Clip.fixed(low=0.2, high=0.28), "refill": True},
    ),
    "gspo": (
        "GRPO with one ratio for the whole sequence (arXiv:2507.18071).",
        {
            "ratio": "sequence",
            "clip": Clip.fixed(low=3e-4, high=4e-4),
            "aggregate": "sequence_mean",
        },
    ),
    "gspo_token": (
        "GSPO whose advantages may differ between tokens (arXiv:2507.18071, section 4.3).",
        {
            "ratio": "sequence_token",
            "clip": Clip.fixed(low=3e-4, high=4e-4),
            "aggregate": "sequence_mean",
        },
    ),
    "cispo": (
        "Clipped importance weights, with a gradient from every token (arXiv:2506.13585).",
        {"clip": ClipWeights.fixed(high=5.0)},
    ),
    "rloo": (
        "REINFORCE with the mean of the other completions as the baseline (arXiv:2402.14740).",
        {"advantage": "leave_one_out", "clip": None, "aggregate": "fixed_length"},
    ),
}
"""Kind -> documentation, and the attributes in which it differs from `Policy`'s defaults."""
