"""Branches of a sweep trained by one vmapped program; each has a trainer of its own.

Their loops take turns, so that all of them are at one step whenever one looks at its state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.runtime.stages.stage_kinds import TrainingInputs
from tunelang.runtime.stages.supervised import SupervisedTrainer
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.train_state import TrainState, split_state, stack_branches
from tunelang.runtime.training.train_step import StepMetrics
from tunelang.runtime.training.training_loop import CheckpointSchedule, Row


class FusedTrainer:
    """Trains the branches of a sweep in one program, by taking over one branch's trainer.

    The trainer's program is for as many states as there are `rates`, one learning rate each.
    """

    def __init__(self, trainer: SupervisedTrainer, rates: Sequence[float]) -> None:
        self.trainer = trainer
        self._called_until = 0
        self._call: tuple[StepMetrics, list[float]] | None = None
        one_branch, _ = split_state(trainer.state)
        places = jax.tree.map(lambda leaf: leaf.sharding, one_branch)
        stacked_places = jax.tree.map(
            lambda leaf: leaf.sharding, stack_branches(one_branch, len(rates))
        )

        def stack(state: TrainState, rates: jax.Array) -> TrainState:
            copies: TrainState = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), state
            )
            return replace(copies, scale=rates)

        def take(states: TrainState, branch: Any) -> TrainState:
            state: TrainState = jax.tree.map(lambda leaf: leaf[branch], states)
            return state

        def put(states: TrainState, branch: Any, state: TrainState) -> TrainState:
            changed: TrainState = jax.tree.map(
                lambda leaf, one: leaf.at[branch].set(one), states, state
            )
            return changed

        self._take = jax.jit(take, out_shardings=places)
        self._put = jax.jit(put, donate_argnums=0, out_shardings=stacked_places)
        self._set(jax.jit(stack, out_shardings=stacked_places)(one_branch, jnp.float32(rates)))

    def _set(self, states: TrainState) -> None:
        before = self.trainer.state
        self.trainer.state = replace(states, frozen=before.frozen, aux_params=before.aux_params)

    def state(self, branch: int) -> TrainState:
        """Return a copy of the state of a branch."""
        states, read_only = split_state(self.trainer.state)
        state: TrainState = self._take(states, branch)
        return replace(state, frozen=read_only.frozen, aux_params=read_only.aux_params)

    def put(self, branch: int, state: TrainState) -> None:
        """Give a branch another state."""
        states, _ = split_state(self.trainer.state)
        self._set(self._put(states, branch, split_state(state)[0]))

    def advance(self, branch: int, step: int, until: int) -> Callable[[], list[Row]]:
        """Make the steps of all branches, when the first of them asks; returns how to wait for the
        metrics of this one.
        """
        if self._call is None or self._called_until != until:
            self._call, self._called_until = self.trainer.make_steps(step, until), until
        metrics, tokens = self._call

        def rows() -> list[Row]:
            of_branch = jax.tree.map(lambda values: np.asarray(values)[branch], metrics)
            return self.trainer.metric_rows(of_branch, tokens)

        return rows


@dataclass
class FusedSweep:
    """State shared by the branches of a sweep that one program trains."""

    rates: Sequence[float]
    """The learning rate of each branch."""
    layout: StageLayout
    schedule: CheckpointSchedule
    opened: tuple[FusedTrainer, TrainingInputs] | None = None
    """Set by the first branch."""


class BranchTrainer:
    """One branch of a fused sweep, as the training loop drives it."""

    def __init__(self, fused: FusedTrainer, branch: int) -> None:
        self._fused, self._branch = fused, branch
        self.steps, self.overlaps = fused.trainer.steps, fused.trainer.overlaps

    @property
    def state(self) -> TrainState:
        """A copy of the branch's state."""
        return self._fused.state(self._branch)

    @state.setter
    def state(self, state: TrainState) -> None:
        self._fused.put(self._branch, state)

    def call_end(self, step: int) -> int:
        """Return the step at which the call that begins at `step` ends."""
        return self._fused.trainer.call_end(step)

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """Make the steps from `step` to `until`; returns how to wait for their metrics."""
        return self._fused.advance(self._branch, step, until)

    def samples(self) -> Sequence[SampleRecord]:
        """Return no completions: nothing is sampled."""
        return ()

    def progress(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold besides the state."""
        return self._fused.trainer.progress()

    def resume(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        del progress
        self.state = state

    def updates(self, step: int) -> int:
        """Return the updates of the first `step` steps."""
        return self._fused.trainer.updates(step)

    def close(self) -> None:
        """Release nothing: the branches share one trainer."""
