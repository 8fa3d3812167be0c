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
    """Base of what may be trained beside frozen weights."""

    family = "adapter"
    word = ""


class Lora(Adapter):
    """Low-rank updates beside frozen weights (arXiv:2106.09685). An adapter that the stage starts
    from stays as it is, below the new one.
    """

    word = "lora"
    rank: Count = result("Rank of the update.", "rank = 16", 16)
    alpha: Positive = result("The update is scaled by `alpha / rank`.", "alpha = 32", 32.0)
    targets: Annotated[
        tuple[str, ...], types.ListOf(types.Either((types.Choice(TARGETS), types.Pattern())), low=1)
    ] = result(
        "The matrices that get an update, by role or by a pattern over their paths, such as"
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
    """LoRA on directions, with learned magnitudes (arXiv:2402.09353)."""

    word = "dora"


class Continued(Adapter):
    """The adapter of the stage that this one starts from, trained on."""

    word = "continued"
    bare: ClassVar[bool] = True


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
        "The weight of each model, the first that of `from`; they are made to add to 1. Without"
        " them, all are equal.",
        "linear(weights = [2, 1])",
        None,
    )


class Slerp(Merging):
    """A point on the arc between two models, tensor by tensor (Shoemake 1985); on the straight line
    where they are nearly parallel.
    """

    word = "slerp"
    share: Share = result(
        "How far from the first model to the second.", "slerp(30%)", 0.5, positional=True
    )


class Ties(Merging):
    """Of each model's difference from the base its largest entries, and of these those with the
    sign that prevails (arXiv:2306.01708).
    """

    word = "ties"
    density: Part = result("Share of the entries that is kept.", "ties(density = 20%)", 0.2)
    weights: Weights = result(
        "A factor of each model's difference, before signs are elected; without them, all are 1.",
        "ties(weights = [1, 0.5])",
        None,
    )
    scale: Positive = result("Factor of the merged difference.", "ties(scale = 1.0)", 1.0)


class Dare(Merging):
    """Of each model's difference from the base random entries, scaled up to the same mean
    (arXiv:2311.03099).
    """

    word = "dare"
    density: Part = result("Share of the entries that is kept.", "dare(density = 50%)", 0.5)
    weights: Weights = result(
        "The weight of each model's difference; without them, they share 1 equally.",
        "dare(weights = [1, 0.5])",
        None,
    )


class Divergence(Function):
    """Base of the distances between the distributions of teacher and student."""

    family = "divergence"
    word = ""


class ForwardKl(Divergence):
    """KL(teacher || student): the student covers all that the teacher does (arXiv:1503.02531)."""

    word = "forward_kl"


class ReverseKl(Divergence):
    """KL(student || teacher): the student keeps to what the teacher does (arXiv:2306.08543)."""

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
    """The attention maps of the teacher, averaged over heads (arXiv:1612.03928)."""

    family = "attention"
    word = "maps"
    weight: Positive = result("Weight beside the other losses.", "maps(weight = 0.5)", 1.0)
    distance: Annotated[str, types.Choice(("squared", "kl"))] = result(
        "The squared difference, or the KL divergence of each row.", "maps(distance = kl)", "kl"
    )
    layers: LayerMap = result(
        "The teacher's layer for each of the student's, from 0; without it, evenly spread.",
        "maps(layers = [1, 3])",
        None,
    )


class Hidden(Function):
    """The hidden states of the teacher, to which the student's are projected (arXiv:1412.6550)."""

    family = "features"
    word = "hidden"
    weight: Positive = result("Weight beside the other losses.", "hidden(weight = 0.5)", 1.0)
    distance: Annotated[str, types.Choice(("squared", "cosine"))] = result(
        "The squared difference, or one less the cosine.", "hidden(distance = cosine)", "squared"
    )
    pooling: Annotated[str, types.Choice(("token", "mean", "last"))] = result(
        "Whether each token is compared, the mean of a sequence or its last token.",
        "hidden(pooling = mean)",
        "token",
    )
    layers: LayerMap = result(
        "The teacher's layer for each of the student's, from 0; without it, evenly spread.",
        "hidden(layers = [1, 3])",
        None,
    )


class Critic(Function):
    """The model of values that a PPO stage trains beside its policy."""

    family = "critic"
    word = "critic"
    trunk: Annotated[str, types.Choice(("separate", "shared"))] = result(
        "Whether it has weights of its own, or is one more head on the policy.",
        "critic(trunk = shared)",
        "separate",
    )
    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "Its own optimizer; with a shared trunk, that of its head.",
        "critic(optimizer = adamw(lr = 1e-5))",
        AdamW.unvalidated(lr=1e-5),
    )
    clip: Annotated[float | None, types.Number(above=0)] = result(
        "How far a value may move from the one before the step; without it, any distance.",
        "critic(clip = 0.2)",
        0.2,
    )
    weight: Positive = result(
        "Weight of its loss, where it shares the policy's trunk.", "critic(weight = 0.5)", 0.5
    )


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
    context: Count = placement("Sequences and parameters split.", "axes(fsdp = 4, context = 2)", 1)


class Winner(Function):
    """Base of the ways to choose among the branches of a sweep."""

    family = "winner"
    word = ""


class Best(Winner):
    """The branch with the highest value of a metric."""

    word = "best"
    metric: Annotated[str, types.Metric()] = result(
        "What to compare.", "keep = best(accuracy)", positional=True
    )


class Lowest(Winner):
    """The branch with the lowest value of a metric."""

    word = "lowest"
    metric: Annotated[str, types.Metric()] = result(
        "What to compare.", "keep = lowest(loss)", positional=True
    )


class All(Winner):
    """Every branch: each stage that uses this one fans out too."""

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


FUNCTIONS: tuple[type[Function], ...] = (
    Lora, Dora, Continued, Sampling, Clip, ClipWeights, K1, K2, K3,
    Truncated, Masked, Linear, Slerp, Ties, Dare, ForwardKl, ReverseKl, JensenShannon, Maps, Hidden,
    Critic, Axes, Best, Lowest, All, TensorBoard, Wandb,
)  # fmt: skip
