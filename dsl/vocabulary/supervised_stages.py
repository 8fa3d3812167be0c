"""Stages that train on given sequences: pre-training, supervised tuning, distillation."""

from typing import Annotated

from pydantic import SerializeAsAny
from typing_extensions import override

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Flag,
    Function,
    MaybeCount,
    Measure,
    ModelRef,
    Positive,
    Reference,
    Share,
    placement,
    result,
)
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.training import Divergence, ForwardKl, Hidden, Maps, Sampling

SWEEPS = ("auto", "fused", "in_turn")
"""How the branches of a stage are trained."""


class Supervised(Training):
    """Base of the stages whose batch is made of given sequences."""

    batch: Annotated[Measure, types.count("sequences", "tokens")] = result(
        "Sequences or tokens that one step trains on.", "batch = 64 sequences"
    )
    packing: Flag = result(
        "Whether short examples are packed into one sequence, without attending to each other.",
        "packing = false",
        True,
    )
    sweep: Annotated[str, types.Choice(SWEEPS)] = placement(
        "Whether branches that differ only in the learning rate are trained side by side in"
        " one program, which reads frozen weights, reference and teacher once for all of them,"
        " or one after another. `auto` trains them side by side if that fits and saves at least"
        " 5% of the time, but never on a CPU. With `on_policy`, or moments offloaded to the host,"
        " branches always train one after another.",
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
            "the loss of each token, `[...]`, by differentiable JAX operations.",
        ),
    ] = result(
        "A custom loss in place of the cross entropy. It is called on chunks of the batch, and"
        " the step's loss is the mean over the trained tokens.",
        'loss = python("losses.py:focal")',
        None,
    )


class Pretrain(Likelihood):
    """Next-token prediction on plain text, with a loss on every token."""

    semantics = ("pretrain", 1)
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
    """Supervised fine-tuning, with a loss on the responses only."""

    semantics = ("sft", 1)
    needs = (("prompt", "response"), ("messages",))


class Distill(Supervised):
    """A student that learns to predict what a teacher does (arXiv:1503.02531), on given answers or
    on its own (generalised knowledge distillation, arXiv:2306.13649).
    """

    semantics = ("distill", 1)
    needs = (("prompt", "response"), ("messages",), ("text",))
    metrics = {
        "loss": "mean loss of a token",
        "divergence": "mean divergence of a token from the teacher, in nats",
        "cross_entropy": "mean loss of a token on the data itself, in nats",
        "retention": "the student's score as a share of the teacher's, for the first eval",
    }

    teacher: ModelRef = result("The model to imitate.", "teacher = large")
    divergence: Annotated[SerializeAsAny[Divergence], types.Of("divergence")] = result(
        "How the student's distribution is compared with the teacher's at each token.",
        "divergence = reverse_kl()",
        ForwardKl.unvalidated(),
    )
    temperature: Positive = result(
        "Softmax temperature of both distributions. The divergence is scaled by its square.",
        "temperature = 2.0",
        1.0,
    )
    hard: Share = result(
        "Share of the loss that is the cross entropy on the data, as in supervised fine-tuning.",
        "hard = 10%",
        0.0,
    )
    top_k: MaybeCount = result(
        "Compare only the teacher's k most likely tokens, and the remaining ones as a sum.",
        "top_k = 64",
        None,
    )
    teacher_log_probs: Annotated[str, types.Choice(("live", "ahead"))] = placement(
        "Whether the teacher runs in every step (`live`), or once over all examples before the"
        " first step, which stores its `top_k` log-probabilities (`ahead`).",
        "teacher_log_probs = ahead",
        "live",
    )
    attention: Annotated[Maps | None, types.Of("attention")] = result(
        "Also match attention maps.", "attention = maps(weight = 0.5)", None
    )
    features: Annotated[Hidden | None, types.Of("features")] = result(
        "Also match hidden states.", "features = hidden(weight = 0.5)", None
    )
    on_policy: Share = result(
        "Share of the steps that train on answers sampled from the student.", "on_policy = 50%", 0.0
    )
    rollout: Annotated[Sampling, types.Of("sampling")] = result(
        "How the student's answers are sampled.",
        "rollout = sampling(max_tokens = 128)",
        Sampling.unvalidated(),
    )

    @property
    @override
    def teacher_reference(self) -> Reference:
        return self.teacher
