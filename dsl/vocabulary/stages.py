"""The `run` block, and the bases of all stages."""

from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Data,
    Evals,
    Function,
    HardwareRef,
    Kind,
    Measure,
    ModelRef,
    Reference,
    observe,
    placement,
    result,
)
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer
from tunelang.dsl.vocabulary.training import Adapter, Axes, TensorBoard

Amount = Annotated[Measure, types.count("steps", "epochs", "tokens")]


class Run(Kind):
    """Settings of the whole spec."""

    name: Annotated[str | None, types.Text()] = observe(
        "Name of the run in reports. Default: the file's name.", 'name = "three-sessions"', None
    )
    seed: Annotated[int, types.Whole(low=0)] = result(
        "Seed from which all others are derived.", "seed = 17", 0
    )
    track: Annotated[tuple[SerializeAsAny[Function], ...], types.ListOf(types.Of("tracker"))] = (
        observe(
            "Where metrics are sent besides the store.",
            "track = [tensorboard()]",
            (TensorBoard.unvalidated(),),
        )
    )
    on: HardwareRef = placement(
        "Hardware of all stages. Default: the devices of this machine.", "on = pod", None
    )


class Stage(Kind):
    """Base of all stages."""

    metrics: ClassVar[dict[str, str]] = {}
    """Metrics that the stage yields besides its evals, with their documentation."""
    needs: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Roles that its data must have: one of these sets."""
    semantics: ClassVar[tuple[str, int]]
    """Name of the implementation, and the version of its results. Both enter the fingerprint.

    Raise the version with every change of results beyond rounding: of the loss, the data order, a
    reward that the stage calls. Presets of one class share it, so that `dapo` and a `grpo` with
    the same attributes are one stage. Where a class has no presets, the name is its word.
    """

    @property
    def models_run(self) -> tuple[Reference, ...]:
        """Return the models that a stage runs as they are, without training them."""
        return ()


OFFLOADS = ("auto", "none", "optimizer", "reference", "both")
"""The arrays that a stage may leave in the memory of the host."""


class Training(Stage):
    """Base of the stages that update weights."""

    metrics = {"loss": "mean training loss of a token, in nats"}

    from_: ModelRef = result(
        "The model to start from: a `model`, or a stage that yields one.",
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
        "Train an adapter and freeze the weights. Without it all weights are trained, and an"
        " adapter of the starting model is merged into them first.",
        "adapter = lora(rank = 16, alpha = 32)",
        None,
    )
    seed: Annotated[int | None, types.Whole(low=0)] = result(
        "Seed of the stage. Default: derived from the run's.", "seed = 1", None
    )
    evals: Evals = result(
        "Evals to run before the first step, every `eval_every` steps and at the end.",
        "evals = [accuracy]",
        (),
    )
    eval_every: Annotated[int | None, types.count("steps")] = result(
        "Steps between evaluations. Default: only at the start and the end.",
        "eval_every = 100 steps",
        None,
    )
    keep: Annotated[SerializeAsAny[Function] | None, types.Of("winner")] = result(
        "Which branch of a sweep wins: later stages use it.", "keep = best(accuracy)", None
    )
    checkpoint_every: Annotated[int | None, types.count("steps")] = placement(
        "Steps between checkpoints. Default: about every five minutes.",
        "checkpoint_every = 50 steps",
        None,
    )
    log_every: Annotated[int, types.count("steps")] = observe(
        "Steps between logged metrics.", "log_every = 1 step", 10
    )
    on: HardwareRef = placement("The hardware of this stage.", "on = pod", None)
    mesh: Annotated[Axes | None, types.Of("mesh")] = placement(
        "The mesh. Default: chosen by the plan.",
        "mesh = axes(fsdp = 8, tensor = 4)",
        None,
    )
    micro_batch: Annotated[int | None, types.count("sequences")] = placement(
        "Sequences that a device processes at once. Default: chosen by the plan.",
        "micro_batch = 8 sequences",
        None,
    )
    remat: Annotated[str, types.Choice(("auto", "none", "dots", "full"))] = placement(
        "What the backward pass recomputes instead of storing:"
        " nothing, everything but matrix products,"
        " everything.",
        "remat = full",
        "auto",
    )
    offload: Annotated[str, types.Choice(OFFLOADS)] = placement(
        "What is kept in host memory until it is needed: the optimizer's moments, a policy's"
        " reference, or both. `auto` offloads only what does not fit otherwise, and nothing"
        " on a CPU, whose memory is the host's.",
        "offload = optimizer",
        "auto",
    )

    @property
    def teacher_reference(self) -> Reference | None:
        """Return the model that this one imitates, if it does."""
        return None
