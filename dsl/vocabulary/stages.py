"""The `run` block and the kinds of stages."""

from typing import Annotated, Any, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Data,
    Evals,
    Flag,
    Function,
    HardwareRef,
    Kind,
    MaybeCount,
    MaybeReward,
    Measure,
    ModelRef,
    NonNegative,
    Positive,
    Reference,
    Reward,
    Share,
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
    Critic,
    Divergence,
    ForwardKl,
    Hidden,
    KlTerm,
    Linear,
    Maps,
    Merging,
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
            "Where metrics go beside the store.",
            "track = [tensorboard()]",
            (TensorBoard.unvalidated(),),
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


OFFLOADS = ("auto", "none", "optimizer", "reference", "both")
"""What a stage may leave in the memory of the host."""
SWEEPS = ("auto", "fused", "in_turn")
"""How the branches of a stage are trained."""


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
        AdamW.unvalidated(
            lr=1e-5, warmup=Measure.unvalidated(value=0.03, unit="%"), decay="cosine"
        ),
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
    offload: Annotated[str, types.Choice(OFFLOADS)] = placement(
        "What lies in the memory of the host until it is needed: the moments of the optimizer, the"
        " reference of a policy, or both. Without it (`auto`), what has to so that the stage fits;"
        " on a CPU, whose memory is the host's, nothing.",
        "offload = optimizer",
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
    sweep: Annotated[str, types.Choice(SWEEPS)] = placement(
        "Whether branches that differ in nothing but the learning rate are trained side by side in"
        " one program, which reads frozen weights, a reference and a teacher once for all of them;"
        " or one after another. Without it (`auto`), side by side where that fits and takes a"
        " twentieth less time at least, but never on a CPU. Answers of their own (`on_policy`) and"
        " moments at the host are of one branch at a time.",
        "sweep = fused",
        "auto",
    )


class Likelihood(Supervised):
    """Base of the stages whose loss is of single tokens."""

    loss: Annotated[
        SerializeAsAny[Function] | None,
        types.Code(
            (),
            {
                "logits": "float32 `[..., vocabulary]`",
                "targets": "int32 `[...]`, the tokens to predict",
            },
            "the loss of each token, `[...]`: JAX operations, differentiated.",
        ),
    ] = result(
        "A loss of your own in place of the cross entropy. It is called on chunks of the batch, and"
        " the step's loss is the mean over the trained tokens.",
        'loss = python("losses.py:focal")',
        None,
    )


class Pretrain(Likelihood):
    """Next-token training on plain text, every token counted."""

    needs = (("text",),)

    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.",
        "optimizer = muon(lr = 2e-3, decay = cosine)",
        AdamW.unvalidated(
            lr=1e-3,
            b2=0.95,
            weight_decay=0.1,
            warmup=Measure.unvalidated(value=0.03, unit="%"),
            decay="cosine",
        ),
    )


class Sft(Likelihood):
    """Supervised tuning: the loss is on the responses only."""

    needs = (("prompt", "response"), ("messages",))


PAIRS = (("prompt", "chosen", "rejected"), ("messages", "chosen", "rejected"))


class Compared(Supervised):
    """Base of the stages that learn which answers are better, by how their probabilities move from
    a reference.
    """

    optimizer: Annotated[SerializeAsAny[Optimizer], types.Of("optimizer")] = result(
        "The optimizer and its schedule.",
        "optimizer = adamw(lr = 5e-7)",
        AdamW.unvalidated(lr=1e-6, warmup=Measure.unvalidated(value=0.1, unit="%"), decay="linear"),
    )
    beta: Positive = result(
        "Scale of the rewards: how closely the policy keeps to the reference.", "beta = 0.1", 0.1
    )
    reference: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "What the policy is measured from; without it, the model that the stage starts from.",
        "reference = baseline",
        None,
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference."""
        return True


class Preference(Compared):
    """Base of learning from pairs of answers, one better than the other."""

    needs = PAIRS
    metrics = {
        "loss": "mean loss of a pair",
        "accuracy": "share of pairs whose chosen answer has the higher reward",
        "margin": "mean reward of chosen answers less that of rejected ones",
        "chosen_reward": "mean reward of chosen answers",
        "rejected_reward": "mean reward of rejected answers",
        "chosen_log_prob": "mean log-probability of a chosen answer, in nats",
        "rejected_log_prob": "mean log-probability of a rejected answer, in nats",
        "drift": "mean log-probability of an answer less the reference's, in nats",
    }

    loss: Annotated[
        str | SerializeAsAny[Function],
        types.Code(
            ("sigmoid", "hinge", "ipo", "robust", "odds_ratio"),
            {
                "chosen": "float32 `[...]`, the reward of each better answer: `beta` times its"
                " log-ratio to the reference",
                "rejected": "the same of the worse answer",
                "chosen_tokens": "`[...]`, its number of tokens",
                "rejected_tokens": "the same of the worse answer",
                "beta": "the attribute",
            },
            "the loss of each pair, `[...]`: JAX operations, differentiated.",
        ),
    ] = result(
        "What becomes of the margin `m` between the two rewards: `-log sigmoid(m)`;"
        " `max(0, 1 - m)`; the squared distance of `m / beta`, of answers' means over their"
        " tokens, from `1 / (2 beta)` (IPO, arXiv:2310.12036); the sigmoid loss, unbiased"
        " where a share `label_smoothing` of the labels is wrong (arXiv:2403.00409); or, with"
        " log-odds for rewards, `-beta log sigmoid(m)` (ORPO, arXiv:2403.07691).",
        "loss = hinge",
        "sigmoid",
    )
    label_smoothing: Annotated[float, types.Share()] = result(
        "Share of the labels that are taken to be wrong, below a half.",
        "label_smoothing = 10%",
        0.0,
    )
    length_normalised: Flag = result(
        "Whether rewards are of the mean over an answer's tokens in place of the sum.",
        "length_normalised = true",
        False,
    )
    target_margin: NonNegative = result(
        "Margin that the loss asks for, in units of the reward (SimPO's gamma).",
        "target_margin = 0.5",
        0.0,
    )
    supervised: NonNegative = result(
        "Weight of the supervised loss on the chosen answers, a mean over their tokens.",
        "supervised = 1.0",
        0.0,
    )
    reference_free: Flag = result(
        "Whether rewards are of the log-probabilities themselves, without a reference.",
        "reference_free = true",
        False,
    )

    reference_log_probs: Annotated[str, types.Choice(("ahead", "live"))] = placement(
        "Whether the reference scores all answers once before the first step, and is then let go,"
        " or those of each step beside it.",
        "reference_log_probs = live",
        "ahead",
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference."""
        return not self.reference_free and self.loss != "odds_ratio"


class Kto(Compared):
    """Learning from answers that are each good or bad (Kahneman-Tversky optimisation,
    arXiv:2402.01306). The reference runs beside the policy, since each step matches prompts with
    answers to others.
    """

    needs = (("prompt", "response", "label"), ("messages", "response", "label"), *PAIRS)
    metrics = {
        "loss": "mean loss of an answer",
        "chosen_reward": "mean reward of desirable answers",
        "rejected_reward": "mean reward of undesirable answers",
        "margin": "the first less the second",
        "kl": "the reference point: divergence from the reference over mismatched answers",
    }

    desirable: NonNegative = result("Weight of desirable answers.", "desirable = 1.33", 1.0)
    undesirable: NonNegative = result("Weight of undesirable answers.", "undesirable = 1.33", 1.0)


class RewardModel(Supervised):
    """A model that scores answers, from pairs of them (Bradley-Terry, arXiv:2203.02155): the
    decoder with one number for a head, read at an answer's last token.
    """

    needs = PAIRS
    yields = "scores"
    reads = {"from": ("model", "scores")}
    metrics = {
        "loss": "mean loss of a pair, in nats",
        "accuracy": "share of pairs whose chosen answer scores higher",
        "margin": "mean score of chosen answers less that of rejected ones",
        "chosen_reward": "mean score of chosen answers",
        "rejected_reward": "mean score of rejected answers",
    }

    centring: NonNegative = result(
        "Weight of the squared sum of a pair's scores, which keeps their mean at 0"
        " (arXiv:2312.09244).",
        "centring = 0.01",
        0.0,
    )


class Distill(Supervised):
    """A student that learns to predict what a teacher does (arXiv:1503.02531), on given answers or
    on its own (generalised knowledge distillation, arXiv:2306.13649).
    """

    needs = (("prompt", "response"), ("messages",), ("text",))
    metrics = {
        "loss": "mean loss of a token",
        "divergence": "mean divergence of a token from the teacher, in nats",
        "cross_entropy": "mean loss of a token on the data itself, in nats",
        "retention": "the student's share of the teacher's score, for the first of the evals",
    }

    teacher: ModelRef = result("Who is to be matched.", "teacher = large")
    divergence: Annotated[SerializeAsAny[Divergence], types.Of("divergence")] = result(
        "How far the student is from the teacher at a token.",
        "divergence = reverse_kl()",
        ForwardKl.unvalidated(),
    )
    temperature: Positive = result(
        "Softens both distributions; the divergence is scaled by its square.",
        "temperature = 2.0",
        1.0,
    )
    hard: Share = result(
        "Share of the loss that is on the data itself, as in supervised tuning.",
        "hard = 10%",
        0.0,
    )
    top_k: MaybeCount = result(
        "Compare only the teacher's likeliest tokens, and all others as one.", "top_k = 64", None
    )
    teacher_log_probs: Annotated[str, types.Choice(("live", "ahead"))] = placement(
        "Whether the teacher runs beside the student, or once over all examples before the first"
        " step, which stores its `top_k`.",
        "teacher_log_probs = ahead",
        "live",
    )
    attention: Annotated[Maps | None, types.Of("attention")] = result(
        "Match attention maps too.", "attention = maps(weight = 0.5)", None
    )
    features: Annotated[Hidden | None, types.Of("features")] = result(
        "Match hidden states too.", "features = hidden(weight = 0.5)", None
    )
    on_policy: Share = result(
        "Share of the steps whose answers the student samples itself.", "on_policy = 50%", 0.0
    )
    rollout: Annotated[Sampling, types.Of("sampling")] = result(
        "How the student samples.", "rollout = sampling(max_tokens = 128)", Sampling.unvalidated()
    )


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
        "The optimizer and its schedule.",
        "optimizer = adamw(lr = 3e-6)",
        AdamW.unvalidated(lr=1e-6),
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
        "How completions are sampled.",
        "rollout = sampling(max_tokens = 512)",
        Sampling.unvalidated(),
    )
    advantage: Annotated[
        str | SerializeAsAny[Function],
        types.Code(
            ("group_mean_std", "group_mean", "leave_one_out"),
            {"rewards": "float32 `[prompts, group]`"},
            "the advantage of each completion, `[prompts, group]`: JAX operations. A group whose"
            " advantages are all 0 is left out.",
        ),
    ] = result(
        "The reward less its group's mean, divided by the group's deviation or not; or less the"
        " mean of the others.",
        "advantage = group_mean",
        "group_mean_std",
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
        Clip.unvalidated(),
    )
    loss: Annotated[
        SerializeAsAny[Function] | None,
        types.Code(
            (),
            {
                "ratio": "float32 `[completions, length]`, the probability ratio of each token as"
                " `ratio` says",
                "advantages": "`[completions, length]`, of each token",
                "log_probs": "`[completions, length]`, by the policy, in nats",
                "mask": "bool `[completions, length]`, where there are tokens",
            },
            "the term of each token, to be made smaller, `[completions, length]`: JAX operations,"
            " differentiated.",
        ),
    ] = result(
        "A term of your own in place of the clipped ratio times the advantage; `clip` has to be"
        " `none`. `kl`, `entropy`, `correction` and `aggregate` apply as usual.",
        'loss = python("losses.py:smooth")',
        None,
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
    decode_mesh: Annotated[Axes | None, types.Of("mesh")] = placement(
        "The mesh of the rollout, over the devices of the update, in place of what the plan would"
        " choose: groups of `tensor` devices that each hold all weights, `data` of them.",
        "decode_mesh = axes(data = 4, tensor = 2)",
        None,
    )
    slots: Annotated[int | None, types.Whole(low=1)] = placement(
        "Completions that are sampled at once, over all devices, in place of what the plan would"
        " choose: as many as their keys and values have room for, and 256 in a group of devices.",
        "slots = 256",
        None,
    )
    overlong: Annotated[str, types.Choice(("keep", "mask"))] = result(
        "Whether completions cut off at `max_tokens` are trained on.", "overlong = mask", "keep"
    )
    show: Annotated[int, types.Whole(low=0)] = observe(
        "Completions of a step to keep for reading.", "show = 4", 2
    )


class Ppo(Policy):
    """Proximal policy optimisation with a learned critic (arXiv:1707.06347): the advantage of each
    token is estimated from values (GAE, arXiv:1506.02438).
    """

    metrics = {
        **Policy.metrics,
        "loss": "policy loss, with a shared trunk that of the values too",
        "value_loss": "mean squared error of the values, halved",
        "explained_variance": "share of the variance of the returns that the values explain",
    }

    group: Annotated[int, types.Whole(low=1)] = result(
        "Completions for each prompt.", "group = 4", 1
    )
    advantage: Annotated[str, types.Choice(("gae",))] = result(
        "The discounted sum of how much better each step was than its value.",
        "advantage = gae",
        "gae",
    )
    discount: Annotated[float, types.Number(above=0, high=1)] = result(
        "Worth of a reward one token later (gamma).", "discount = 0.99", 1.0
    )
    trace: Annotated[float, types.Number(low=0, high=1)] = result(
        "How far advantages look ahead (lambda of GAE).", "trace = 0.95", 0.95
    )
    whiten: Flag = result(
        "Whether the advantages of a step are made to have mean 0 and deviation 1.",
        "whiten = false",
        True,
    )
    kl_target: Annotated[float | None, types.Number(above=0)] = result(
        "Adapt the coefficient of `kl` so that the divergence of a completion, in nats, stays near"
        " this (arXiv:1909.08593).",
        "kl_target = 6.0",
        None,
    )
    kl_horizon: Annotated[int, types.Whole(low=1)] = result(
        "Completions over which the coefficient of `kl` moves by a fifth at most.",
        "kl_horizon = 2000",
        10_000,
    )
    critic: Annotated[Critic, types.Of("critic")] = result(
        "The model of values.",
        "critic = critic(optimizer = adamw(lr = 1e-5))",
        Critic.unvalidated(),
    )
    value_model: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "What a critic with a trunk of its own starts from; without it, the model that the stage"
        " starts from.",
        "value_model = judge",
        None,
    )
    minibatches: Count = result(
        "Updates that a step's completions are divided over.", "minibatches = 4", 1
    )
    passes: Count = result("How often a step's completions are gone through.", "passes = 2", 4)

    reads = {"value_model": ("model", "scores")}


class Sample(Stage):
    """Completions of prompts, scored and chosen, as data for later stages: `sampled`."""

    needs = (("prompt",), ("messages",))
    yields = "rows"
    metrics = {
        "score": "mean score of all completions",
        "kept": "share of completions that were kept",
        "solved": "share of prompts with a completion that was kept",
    }

    from_: ModelRef = result("What to sample from.", "from = baseline", alias="from")
    data: Data = result("The prompts; each is used once.", "data = math")
    limit: MaybeCount = result("Use only the first few prompts.", "limit = 200", None)
    samples: Count = result("Completions for each prompt.", "samples = 8", 1)
    rollout: Annotated[Sampling, types.Of("sampling")] = result(
        "How completions are sampled.",
        "rollout = sampling(max_tokens = 512)",
        Sampling.unvalidated(),
    )
    score: MaybeReward = result("What scores a completion.", "score = correct", None)
    keep: MaybeReward = result(
        "Keep the completions for which this holds, or is above 0.", "keep = correct > 0.5", None
    )
    distinct: Flag = result(
        "Keep one of several equal completions of a prompt.", "distinct = false", True
    )
    most: MaybeCount = result(
        "Keep at most so many completions of a prompt, the best first.", "most = 2", None
    )
    seed: Annotated[int | None, types.Whole(low=0)] = result(
        "A seed of its own; without it, one drawn from the run's.", "seed = 1", None
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)


class Merge(Stage):
    """One model from the weights of several that have a common origin."""

    from_: ModelRef = result("The first model.", "from = math", alias="from")
    others: Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("model", "stage")), low=1)] = (
        result("The other models.", "others = [code, chat]")
    )
    method: Annotated[SerializeAsAny[Merging], types.Of("merging")] = result(
        "How weights are combined.", "method = ties(density = 20%)", Linear.unvalidated()
    )
    base: Annotated[Reference | None, types.Ref(("model", "stage"))] = result(
        "Their common origin, from which differences are taken; without it, the model at the start"
        " of `from`.",
        "base = gemma",
        None,
    )
    evals: Evals = result("What to measure of the merged model.", "evals = [accuracy]", ())
    seed: Annotated[int | None, types.Whole(low=0)] = result(
        "A seed of its own, for what is dropped at random.", "seed = 1", None
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)


class Evaluate(Stage):
    """Evals of several models, side by side."""

    yields = "figures"
    reads = {"models": ("model", "scores")}

    models: Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("model", "stage")), low=1)] = (
        result("What to measure.", "models = [baseline, specialist]")
    )
    evals: Annotated[tuple[Reference, ...], types.ListOf(types.Ref(("eval",)), low=1)] = result(
        "The evals.", "evals = [accuracy]"
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)


class Export(Stage):
    """Write a model in the form that `transformers` loads: weights, configuration, tokenizer."""

    yields = "files"

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


STAGES: dict[str, type[Stage]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "kto": Kto,
    "reward_model": RewardModel,
    "ppo": Ppo,
    "distill": Distill,
    "sample": Sample,
    "merge": Merge,
    "evaluate": Evaluate,
    "export": Export,
}

PREFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": (
        "Direct preference optimisation (arXiv:2305.18290): the log-ratio to the reference is the"
        " reward.",
        {},
    ),
    "simpo": (
        "DPO without a reference, by the mean log-probability of a token and with a margin"
        " (arXiv:2405.14734).",
        {
            "reference_free": True,
            "length_normalised": True,
            "beta": 2.0,
            "target_margin": 1.0,
        },
    ),
    "orpo": (
        "Supervised tuning on the chosen answers with a penalty on the odds of the rejected ones;"
        " no reference (arXiv:2403.07691).",
        {
            "loss": "odds_ratio",
            "reference_free": True,
            "length_normalised": True,
            "supervised": 1.0,
        },
    ),
}
"""Kind -> documentation, and the attributes in which it differs from `Preference`'s defaults."""

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
        {"clip": Clip.unvalidated(low=0.2, high=0.28), "refill": True},
    ),
    "gspo": (
        "GRPO with one ratio for the whole sequence (arXiv:2507.18071).",
        {
            "ratio": "sequence",
            "clip": Clip.unvalidated(low=3e-4, high=4e-4),
            "aggregate": "sequence_mean",
        },
    ),
    "gspo_token": (
        "GSPO whose advantages may differ between tokens (arXiv:2507.18071, section 4.3).",
        {
            "ratio": "sequence_token",
            "clip": Clip.unvalidated(low=3e-4, high=4e-4),
            "aggregate": "sequence_mean",
        },
    ),
    "cispo": (
        "Clipped importance weights, with a gradient from every token (arXiv:2506.13585).",
        {"clip": ClipWeights.unvalidated(high=5.0)},
    ),
    "rloo": (
        "REINFORCE with the mean of the other completions as the baseline (arXiv:2402.14740).",
        {"advantage": "leave_one_out", "clip": None, "aggregate": "fixed_length"},
    ),
}
"""Kind -> documentation, and the attributes in which it differs from `Policy`'s defaults."""
