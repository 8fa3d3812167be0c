"""Optimizers with their learning-rate schedules."""

from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Flag,
    Function,
    Measure,
    NonNegative,
    Positive,
    Share,
    result,
)

Warmup = Annotated[Measure, types.count("steps", low=0, share=True)]


class Optimizer(Function):
    """Base of the optimizers: the learning rate and its schedule."""

    family = "optimizer"
    word = ""
    moments: ClassVar[int]
    """Numbers that the optimizer stores for each parameter."""
    lr: Positive = result("The peak learning rate.", "lr = 1e-5")
    warmup: Warmup = result(
        "Linear rise of the rate from 0, as a share of the stage or in steps.",
        "warmup = 3%",
        Measure.unvalidated(value=0.0, unit="%"),
    )
    decay: Annotated[
        str | SerializeAsAny[Function],
        types.Code(
            ("constant", "linear", "cosine"),
            {
                "progress": "the share of the steps after the warm-up that is done, 0 to 1",
                "step": "the step, from 0",
                "steps": "the number of all steps",
            },
            "the rate as a share of the peak, by JAX operations on scalars.",
        ),
    ] = result("How the rate falls after the warm-up.", "decay = cosine", "constant")
    final: Share = result("The rate at the end, as a share of the peak.", "final = 10%", 0.0)
    clip_norm: Annotated[float | None, types.Number(above=0)] = result(
        "Largest global norm of the gradient; a larger one is scaled down.", "clip_norm = 0.5", 1.0
    )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    word = "adamw"
    moments = 2
    b1: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay rate of the first moment.", "b1 = 0.9", 0.9
    )
    b2: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay rate of the second moment.", "b2 = 0.95", 0.999
    )
    eps: Positive = result("Added to the root of the second moment.", "eps = 1e-8", 1e-8)
    weight_decay: NonNegative = result(
        "Decoupled weight decay, on matrices only.", "weight_decay = 0.1", 0.0
    )


class Muon(Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al. 2024), AdamW for other parameters."""

    word = "muon"
    moments = 2
    momentum: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay rate of the momentum.", "momentum = 0.95", 0.95
    )
    iterations: Count = result("Newton-Schulz iterations.", "iterations = 5", 5)
    weight_decay: NonNegative = result(
        "Decoupled weight decay, on matrices only.", "weight_decay = 0.1", 0.0
    )
    adam_lr: Annotated[float | None, types.Number(above=0)] = result(
        "Peak learning rate of the AdamW part. Default: `lr`.", "adam_lr = 3e-4", None
    )


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum."""

    word = "sgd"
    moments = 1
    momentum: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay rate of the momentum.", "momentum = 0.9", 0.0
    )
    nesterov: Flag = result("Nesterov's variant.", "nesterov = true", False)
    weight_decay: NonNegative = result(
        "Weight decay, on matrices only.", "weight_decay = 1e-4", 0.0
    )


class Lion(Optimizer):
    """Sign of the interpolated momentum (arXiv:2302.06675)."""

    word = "lion"
    moments = 1
    b1: Annotated[float, types.Number(low=0, below=1)] = result(
        "Interpolation for the update.", "b1 = 0.9", 0.9
    )
    b2: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay rate of the momentum.", "b2 = 0.99", 0.99
    )
    weight_decay: NonNegative = result(
        "Decoupled weight decay, on matrices only.", "weight_decay = 0.1", 0.0
    )


FUNCTIONS: tuple[type[Function], ...] = (AdamW, Muon, Sgd, Lion)
