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
    """Numbers that it keeps of each parameter."""
    lr: Positive = result("The peak learning rate.", "lr = 1e-5")
    warmup: Warmup = result(
        "Linear rise from 0: a share of the run, or steps.",
        "warmup = 3%",
        Measure.unvalidated(value=0.0, unit="%"),
    )
    decay: Annotated[
        str | SerializeAsAny[Function],
        types.Code(
            ("constant", "linear", "cosine"),
            {
                "progress": "how much of the steps after the warm-up is done, 0 to 1",
                "step": "the step, from 0",
                "steps": "the number of all steps",
            },
            "the share of the peak rate: JAX operations on scalars.",
        ),
    ] = result("How the rate falls after the warm-up.", "decay = cosine", "constant")
    final: Share = result("The rate at the end, as a share of the peak.", "final = 10%", 0.0)
    clip_norm: Annotated[float | None, types.Number(above=0)] = result(
        "Scale the gradient down to this global norm.", "clip_norm = 0.5", 1.0
    )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101)."""

    word = "adamw"
    moments = 2
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
    moments = 2
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
    moments = 1
    momentum: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the momentum.", "momentum = 0.9", 0.0
    )
    nesterov: Flag = result("Nesterov's variant.", "nesterov = true", False)
    weight_decay: NonNegative = result("Decay, on matrices only.", "weight_decay = 1e-4", 0.0)


class Lion(Optimizer):
    """Sign of the interpolated momentum (arXiv:2302.06675)."""

    word = "lion"
    moments = 1
    b1: Annotated[float, types.Number(low=0, below=1)] = result(
        "Interpolation for the update.", "b1 = 0.9", 0.9
    )
    b2: Annotated[float, types.Number(low=0, below=1)] = result(
        "Decay of the momentum.", "b2 = 0.99", 0.99
    )
    weight_decay: NonNegative = result(
        "Decoupled decay, on matrices only.", "weight_decay = 0.1", 0.0
    )


FUNCTIONS: tuple[type[Function], ...] = (AdamW, Muon, Sgd, Lion)
