"""Stages, and the functions that their attributes take: optimizers, adapters, sampling, ..."""

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
    MaybeCount,
    Measure,
    ModelRef,
    NonNegative,
    Positive,
    Reference,
    Reward,
    Share,
    Tokens,
    Words,
    observe,
    placement,
    result,
)

Amount = Annotated[Measure, types.count("steps", "epochs", "tokens")]
Warmup = Annotated[Measure, types.count("steps", low=0, share=True)]


class Optimizer(Function):
    """Base of the optimizers: the learning rate and its schedule."""

    family = "optimizer"
    word = ""
    lr: Positive = result("The peak learning rate.", "lr = 1e-5")
    warmup: Warmup = result(
        "Linear rise from 0: a share of the run, or steps.",
        "warmup = 3%",
        Measure.fixed(value=0.0, unit="%"),
    )
    decay: Annotated[str, types.Choice(("constant", "linear", "cosine"))] = result(
        "How the rate falls after the warm-up.", "decay = cosine", "constant"
    )
    final: Share = result("The rate at the end, as a share of the peak.", "final = 10%", 0.0)
    clip_norm: Annotated[float | None, types.Number(above=0)] = result(
        "Scale the gradient down to this global norm.", "clip_norm = 0.5", 1.0
    )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    word = "adamw"
    b1: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the first moment.", "b1 = 0.9", 0.9
    )
    b2: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the second moment.", "b2 = 0.95", 0.999
    )
    eps: Positive = result("Added to the root of the second moment.", "eps = 1e-8", 1e-8)
    weight_decay: NonNegative = result(
        "Decoupled decay, on matrices only.", "weight_decay = 0.1", 0.0
    )


class Muon(Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al. 2024), AdamW for all else."""

    word = "muon"
    momentum: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the momentum.", "momentum = 0.95", 0.95
    )
    iterations: Count = result("Newton-Schulz iterations.", "iterations = 5", 5)
    weight_decay: NonNegative = result(
        "Decoupled decay, on matrices only.", "weight_decay = 0.1", 0.0
    )
    adam_lr: Annotated[float | None, types.Number(above=0)] = result(
        "Peak rate of the AdamW part; without it, `lr`.", "adam_lr = 3e-4", None
    )


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum."""

    word = "sgd"
    momentum: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the momentum.", "momentum = 0.9", 0.0
    )
    nesterov: Flag = result("Nesterov's variant.", "nesterov = true", False)
    weight_decay: NonNegative = result("Decay, on matrices only.", "weight_decay = 1e-4", 0.0)


class Lion(Optimizer):
    """Sign of the interpolated momentum (arXiv:2302.06675)."""

    word = "lion"
    b1: Annotated[float, types.Number(low=0, below=1)] = result(
        "Interpolation for the update.", "b1 = 0.9", 0.9
    )
    b2: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the momentum.", "b2 = 0.99", 0.99
    )
    weight_decay: NonNegative = result(
        "Decoupled decay, on matrices only.", "weight_decay = 0.1", 0.0
    )


TARGETS = ("attention", "mlp", "all", "q", "k", "v", "o", "gate", "up", "down", "embed", "head")


class Lora(Function):
    """Low-rank updates beside frozen weights (arXiv:2106.09685)."""

    family = "adapter"
    word = "lora"
    rank: Count = result("Rank of the update.", "rank = 16", 16)
    alpha: Positive = result("The update is scaled by `alpha / rank`.", "alpha = 32", 32.0)
    targets: Annotated[
        tuple[str, ...], types.ListOf(types.Either((types.Choice(TARGETS), types.Pattern())), low=1)
    ] = result(
        "The matrices that get an update, by role or by a pattern over their paths.",
        "targets = [attention, mlp]",
        ("attention", "mlp"),
    )
    dropout: Share = result("Dropout on the adapter's input.", "dropout = 5%", 0.0)
    rank_stabilized: Flag = result(
        "Scale by `alpha / sqrt(rank)` instead (arXiv:2312.03732).", "rank_stabilized = true", False
    )


class Dora(Lora):
    """LoRA on directions, with learned magnitudes (arXiv:2402.09353)."""

    word = "dora"


class Sampling(Function):
    """How completions are sampled."""

    family = "sampling"
    word = "sampling"
    max_tokens: Tokens = result("The longest completion.", "max_tokens = 512", 256)
    max_prompt: Annotated[int | None, types.count("tokens")] = result(
        "Longer prompts are handled as the data's `on_long_row` says;"
        " without it, what the context leaves.",
        "max_prompt = 1Ki",
        None,
    )
    temperature: NonNegative = result(
        "Softmax temperature; 0 takes the likeliest token.", "temperature = 0.7", 1.0
    )
    top_k: MaybeCount = result("Sample from this many likeliest tokens.", "top_k = 50", None)
    top_p: Annotated[float | None, types.Share()] = result(
        "Sample from the likeliest tokens that make up this probability.", "top_p = 95%", None
    )
    min_p: Annotated[float | None, types.Share()] = result(
        "Drop tokens less likely than this share of the likeliest.", "min_p = 5%", None
    )
    repetition_penalty: Positive = result(
        "Divide the logits of tokens that occurred by this (arXiv:1909.05858).",
        "repetition_penalty = 1.1",
        1.0,
    )
    stop: Annotated[tuple[str, ...], types.ListOf(types.Text())] = result(
        "Texts that end a completion beside the tokenizer's own end token.",
        'stop = ["</answer>"]',
        (),
    )


class Clip(Function):
    """Clip the probability ratio to `[1 - low, 1 + high]`, pessimistically (PPO,
    arXiv:1707.06347).
    """

    family = "clip"
    word = "clip"
    low: NonNegative = result("Distance below 1.", "clip(low = 0.2, high = 0.28)", 0.2)
    high: NonNegative = result("Distance above 1.", "clip(low = 0.2, high = 0.28)", 0.2)


class ClipWeights(Function):
    """Clip the importance weight and keep every token's gradient (CISPO, arXiv:2506.13585)."""

    family = "clip"
    word = "clip_weights"
    low: Annotated[float | None, types.Number(low=0, high=1)] = result(
        "Distance below 1; without it, no lower bound.", "clip_weights(low = 0.2, high = 5)", None
    )
    high: NonNegative = result("Distance above 1.", "clip_weights(high = 5)", 5.0)


class KlTerm(Function):
    """Base of the estimators of the divergence from the reference (Schulman 2020).

    In the loss the gradient is the divergence's own, whichever estimator measures it
    (arXiv:2506.09477).
    """

    family = "kl"
    word = ""
    coefficient: NonNegative = result("Its weight.", "kl = k3(0.04)", positional=True)
    at: Annotated[str, types.Choice(("loss", "reward"))] = result(
        "Whether it is added to the loss or taken off the reward.",
        "kl = k1(0.05, at = reward)",
        "loss",
    )


class K1(KlTerm):
    """The log-ratio itself: unbiased, noisy."""

    word = "k1"


class K2(KlTerm):
    """Half the squared log-ratio: biased, low variance."""

    word = "k2"


class K3(KlTerm):
    """`r - 1 - log r`: unbiased, never negative."""

    word = "k3"


class Truncated(Function):
    """Weight each token by the sampler's mismatch, cut off at `limit` (truncated importance
    sampling).
    """

    family = "correction"
    word = "truncated"
    limit: Positive = result("Largest weight.", "correction = truncated(2.0)", 2.0, positional=True)


class Masked(Function):
    """Weight each token by the sampler's mismatch; leave out those beyond `limit` or below its
    inverse.
    """

    family = "correction"
    word = "masked"
    limit: Positive = result("Largest weight.", "correction = masked(2.0)", 2.0, positional=True)


class Axes(Function):
    """Sizes of the mesh axes; their product is the number of devices."""

    family = "mesh"
    word = "axes"
    data: Count = placement(
        "Copies of the model, each with a share of the batch.", "axes(data = 8)", 1
    )
    fsdp: Count = placement("Parameters and batch split.", "axes(fsdp = 8)", 1)
    tensor: Count = placement("Matrices split.", "axes(fsdp = 2, tensor = 4)", 1)
    expert: Count = placement("Experts split.", "axes(fsdp = 4, expert = 8)", 1)
    context: Count = placement("Sequences split.", "axes(fsdp = 4, context = 2)", 1)


class Best(Function):
    """The branch with the highest value of a metric."""

    family = "winner"
    word = "best"
    metric: Annotated[str, types.Metric()] = result(
        "What to compare.", "keep = best(accuracy)", positional=True
    )


class Lowest(Function):
    """The branch with the lowest value of a metric."""

    family = "winner"
    word = "lowest"
    metric: Annotated[str, types.Metric()] = result(
        "What to compare.", "keep = lowest(loss)", positional=True
    )


class All(Function):
    """Every branch: each stage that uses this one fans out too."""

    family = "winner"
    word = "all"
    bare: ClassVar[bool] = True


class TensorBoard(Function):
    """Event files for TensorBoard, in the store beside the metrics."""

    family = "tracker"
    word = "tensorboard"


class Wandb(Function):
    """Weights & Biases; needs the extra `[wandb]`."""

    family = "tracker"
    word = "wandb"
    project: Words = observe("The project.", 'project = "three-sessions"')
    entity: Annotated[str | None, types.Text()] = observe(
        "The team or user.", 'entity = "us"', None
    )


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
    adapter: Annotated[SerializeAsAny[Lora] | None, types.Of("adapter")] = result(
        "Train an adapter and leave the weights frozen; without it, all weights are trained.",
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

FUNCTIONS: tuple[type[Function], ...] = (
    AdamW, Muon, Sgd, Lion, Lora, Dora, Sampling, Clip, ClipWeights, K1, K2, K3, Truncated, Masked,
    Axes, Best, Lowest, All, TensorBoard, Wandb,
)  # fmt: skip
