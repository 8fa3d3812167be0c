"""Functions that a stage's attributes take: adapters, sampling, clipping, meshes."""

from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Flag,
    Function,
    MaybeCount,
    NonNegative,
    Positive,
    Share,
    Tokens,
    Words,
    observe,
    placement,
    result,
)
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer

TARGETS = ("attention", "mlp", "all", "q", "k", "v", "o", "gate", "up", "down", "embed", "head")


class Adapter(Function):
    """Base of the adapters, which are trained while the weights are frozen."""

    family = "adapter"
    word = ""


class Lora(Adapter):
    """Low-rank updates of frozen weights (arXiv:2106.09685). An adapter of the starting model stays
    frozen below the new one.
    """

    word = "lora"
    rank: Count = result("Rank of the update.", "rank = 16", 16)
    alpha: Positive = result("The update is scaled by `alpha / rank`.", "alpha = 32", 32.0)
    targets: Annotated[
        tuple[str, ...], types.ListOf(types.Either((types.Choice(TARGETS), types.Pattern())), low=1)
    ] = result(
        "The matrices to update, by role or by a regular expression over their paths, such as"
        " `blocks.attention.q`.",
        "targets = [attention, mlp]",
        ("attention", "mlp"),
    )
    dropout: Share = result(
        "Dropout on the adapter's input, in stages that train on given sequences; where a policy is"
        " trained, sampling and training have to agree.",
        "dropout = 5%",
        0.0,
    )
    rank_stabilized: Flag = result(
        "Scale by `alpha / sqrt(rank)` instead (arXiv:2312.03732).", "rank_stabilized = true", False
    )


class Dora(Lora):
    """LoRA on the directions of weights, with learned magnitudes (arXiv:2402.09353)."""

    word = "dora"


class Continued(Adapter):
    """Continue to train the adapter of the stage that this one starts from."""

    word = "continued"
    bare: ClassVar[bool] = True


class Sampling(Function):
    """Settings of sampling."""

    family = "sampling"
    word = "sampling"
    max_tokens: Tokens = result("The longest completion.", "max_tokens = 512", 256)
    max_prompt: Annotated[int | None, types.count("tokens")] = result(
        "Limit of the prompt; `on_long_row` of the data says what happens to longer ones."
        " Default: what the context leaves.",
        "max_prompt = 1Ki",
        None,
    )
    temperature: NonNegative = result(
        "Softmax temperature. At 0 the most likely token is taken.", "temperature = 0.7", 1.0
    )
    top_k: MaybeCount = result("Sample only from the k most likely tokens.", "top_k = 50", None)
    top_p: Annotated[float | None, types.Share()] = result(
        "Sample only from the most likely tokens that together have this probability.",
        "top_p = 95%",
        None,
    )
    min_p: Annotated[float | None, types.Share()] = result(
        "Exclude tokens whose probability is below this share of the most likely token's.",
        "min_p = 5%",
        None,
    )
    repetition_penalty: Positive = result(
        "Divide the logits of tokens that have occurred by this (arXiv:1909.05858).",
        "repetition_penalty = 1.1",
        1.0,
    )
    stop: Annotated[tuple[str, ...], types.ListOf(types.Text())] = result(
        "Texts that end a completion, besides the tokenizer's end token.",
        'stop = ["</answer>"]',
        (),
    )


class Clip(Function):
    """Clip the probability ratio to `[1 - low, 1 + high]` and take the lower objective (PPO,
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
    """Base of the estimators of the KL divergence from the reference (Schulman 2020).

    In the loss, the gradient is that of the divergence itself, whichever estimator is used
    (arXiv:2506.09477).
    """

    family = "kl"
    word = ""
    coefficient: NonNegative = result("Its weight.", "kl = k3(0.04)", positional=True)
    at: Annotated[str, types.Choice(("loss", "reward"))] = result(
        "Whether it is added to the loss or subtracted from the reward.",
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
    """Weight each token by the ratio of the trainer's to the sampler's probability, at most
    `limit` (truncated importance sampling).
    """

    family = "correction"
    word = "truncated"
    limit: Positive = result("Largest weight.", "correction = truncated(2.0)", 2.0, positional=True)


class Masked(Function):
    """Weight each token by the ratio of the trainer's to the sampler's probability; skip tokens
    with a ratio above `limit` or below its inverse.
    """

    family = "correction"
    word = "masked"
    limit: Positive = result("Largest weight.", "correction = masked(2.0)", 2.0, positional=True)


Weights = Annotated[tuple[float, ...] | None, types.ListOf(types.Number(), low=2)]


Part = Annotated[float, types.Share(above=0)]


class Merging(Function):
    """Base of the ways to combine the weights of models."""

    family = "merging"
    word = ""


class Linear(Merging):
    """The weighted mean (model soups, arXiv:2203.05482)."""

    word = "linear"
    weights: Weights = result(
        "The weight of each model, `from` first; they are normalised to sum to 1."
        " Default: equal weights.",
        "linear(weights = [2, 1])",
        None,
    )


class Slerp(Merging):
    """Spherical interpolation of two models, tensor by tensor (Shoemake 1985); linear
    if they are nearly parallel.
    """

    word = "slerp"
    share: Share = result(
        "How far from the first model to the second.", "slerp(30%)", 0.5, positional=True
    )


class Ties(Merging):
    """Keep the largest entries of each model's difference from the base, and of these the ones
    with the majority sign (TIES, arXiv:2306.01708).
    """

    word = "ties"
    density: Part = result("Share of the entries to keep.", "ties(density = 20%)", 0.2)
    weights: Weights = result(
        "Factor of each model's difference, applied before the majority sign is found. Default: 1.",
        "ties(weights = [1, 0.5])",
        None,
    )
    scale: Positive = result("Factor of the merged difference.", "ties(scale = 1.0)", 1.0)


class Dare(Merging):
    """Keep random entries of each model's difference from the base, scaled up to the same mean
    (arXiv:2311.03099).
    """

    word = "dare"
    density: Part = result("Share of the entries to keep.", "dare(density = 50%)", 0.5)
    weights: Weights = result(
        "Weight of each model's difference. Default: equal weights that sum to 1.",
        "dare(weights = [1, 0.5])",
        None,
    )


class Divergence(Function):
    """Base of the distances between the distributions of teacher and student."""

    family = "divergence"
    word = ""


class ForwardKl(Divergence):
    """KL(teacher || student): the student covers every mode of the teacher (arXiv:1503.02531)."""

    word = "forward_kl"


class ReverseKl(Divergence):
    """KL(student || teacher): the student stays in the teacher's modes (arXiv:2306.08543)."""

    word = "reverse_kl"


class JensenShannon(Divergence):
    """The generalised Jensen-Shannon divergence (arXiv:2306.13649): with the mixture
    `share * teacher + (1 - share) * student`, `share * KL(teacher || mixture) + (1 - share) *
    KL(student || mixture)`.
    """

    word = "jensen_shannon"
    share: Annotated[float, types.Share(above=0, below=1)] = result(
        "Share of the teacher in the mixture.", "jensen_shannon(0.5)", 0.5, positional=True
    )


LayerMap = Annotated[tuple[int, ...] | None, types.ListOf(types.Whole(low=0), low=1)]


class Maps(Function):
    """Match the teacher's attention maps, averaged over heads (arXiv:1612.03928)."""

    family = "attention"
    word = "maps"
    weight: Positive = result("Weight of this term in the loss.", "maps(weight = 0.5)", 1.0)
    distance: Annotated[str, types.Choice(("squared", "kl"))] = result(
        "The squared difference, or the KL divergence of each row.", "maps(distance = kl)", "kl"
    )
    layers: LayerMap = result(
        "The teacher's layer for each layer of the student, from 0. Default: evenly spaced.",
        "maps(layers = [1, 3])",
        None,
    )


class Hidden(Function):
    """Match the teacher's hidden states with a projection of the student's (arXiv:1412.6550)."""

    family = "features"
    word = "hidden"
    weight: Positive = result("Weight of this term in the loss.", "hidden(weight = 0.5)", 1.0)
    distance: Annotated[str, types.Choice(("squared", "cosine"))] = result(
        "The squared difference, or one minus the cosine similarity.",
        "hidden(distance = cosine)",
        "squared",
    )
    pooling: Annotated[str, types.Choice(("token", "mean", "last"))] = result(
        "What is compared: each token, the mean over a sequence, or its last token.",
        "hidden(pooling = mean)",
        "token",
    )
    layers: LayerMap = result(
        "The teacher's layer for each layer of the student, from 0. Default: evenly spaced.",
        "hidden(layers = [1, 3])",
        None,
    )


class Critic(Function):
    """The critic, which estimates values and is trained with the policy of a PPO stage."""

    family = "critic"
    word = "critic"
    trunk: Annotated[str, types.Choice(("separate", "shared"))] = result(
        "Whether it is a separate decoder, or a second head on the policy's.",
        "critic(trunk = shared)",
        "separate",
    )
    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "Optimizer of the critic; with a shared trunk, of its head.",
        "critic(optimizer = adamw(lr = 1e-5))",
        AdamW.unvalidated(lr=1e-5),
    )
    clip: Annotated[float | None, types.Number(above=0)] = result(
        "Limit of the change of a value in one step; `none` for no limit.",
        "critic(clip = 0.2)",
        0.2,
    )
    weight: Positive = result(
        "Weight of its loss if it shares the policy's trunk.", "critic(weight = 0.5)", 0.5
    )


class Axes(Function):
    """Sizes of the mesh axes; their product is the number of devices."""

    family = "mesh"
    word = "axes"
    data: Count = placement(
        "Number of copies of the model, each with a share of the batch.", "axes(data = 8)", 1
    )
    fsdp: Count = placement("Ways that parameters and batch are split.", "axes(fsdp = 8)", 1)
    tensor: Count = placement("Ways that matrices are split.", "axes(fsdp = 2, tensor = 4)", 1)
    expert: Count = placement("Ways that experts are split.", "axes(fsdp = 4, expert = 8)", 1)
    context: Count = placement(
        "Ways that sequences and parameters are split.", "axes(fsdp = 4, context = 2)", 1
    )


class Winner(Function):
    """Base of the ways to choose among the branches of a sweep."""

    family = "winner"
    word = ""


class Best(Winner):
    """The branch with the highest value of a metric."""

    word = "best"
    metric: Annotated[str, types.Metric()] = result(
        "The metric to compare.", "keep = best(accuracy)", positional=True
    )


class Lowest(Winner):
    """The branch with the lowest value of a metric."""

    word = "lowest"
    metric: Annotated[str, types.Metric()] = result(
        "The metric to compare.", "keep = lowest(loss)", positional=True
    )


class All(Winner):
    """Keep every branch: each stage that uses this one fans out too."""

    word = "all"
    bare: ClassVar[bool] = True


class TensorBoard(Function):
    """Event files for TensorBoard, in the store next to the metrics."""

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


FUNCTIONS: tuple[type[Function], ...] = (
    Lora, Dora, Continued, Sampling, Clip, ClipWeights, K1, K2, K3,
    Truncated, Masked, Linear, Slerp, Ties, Dare, ForwardKl, ReverseKl, JensenShannon, Maps, Hidden,
    Critic, Axes, Best, Lowest, All, TensorBoard, Wandb,
)  # fmt: skip
