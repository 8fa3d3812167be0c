"""Branches of a sweep in one program: each has a trainer of its own, as if it were alone.

Their loops take turns, so that all of them are at one step whenever one looks at its state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tunelang.runtime.stages.supervised import SupervisedTrainer
from tunelang.runtime.training.metrics import SampleRecord
from tunelang.runtime.training.train_state import TrainState, split_state, stack_branches
from tunelang.runtime.training.train_step import StepMetrics
from tunelang.runtime.training.training_loop import Row


class Fused:
    """What trains branches side by side: the trainer of one of them, which it takes over.

    The trainer's program is for as many states as there are `rates`, one learning rate each.
    """

    def __init__(self, trainer: SupervisedTrainer, rates: Sequence[float]) -> None:
        self.trainer = trainer
        self._until = 0
        self._called: tuple[StepMetrics, list[float]] | None = None
        alone, _ = split_state(trainer.state)
        places = jax.tree.map(lambda leaf: leaf.sharding, alone)
        together = stack_branches(alone, len(rates))
        together = jax.tree.map(lambda leaf: leaf.sharding, together)

        def begun(state: TrainState, rates: jax.Array) -> TrainState:
            copies: TrainState = jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf, (len(rates), *leaf.shape)), state
            )
            return replace(copies, scale=rates)

        def taken(states: TrainState, at: Any) -> TrainState:
            found: TrainState = jax.tree.map(lambda leaf: leaf[at], states)
            return found

        def put(states: TrainState, at: Any, state: TrainState) -> TrainState:
            found: TrainState = jax.tree.map(lambda leaf, one: leaf.at[at].set(one), states, state)
            return found

        self._taken = jax.jit(taken, out_shardings=places)
        self._put = jax.jit(put, donate_argnums=0, out_shardings=together)
        self._hold(jax.jit(begun, out_shardings=together)(alone, jnp.float32(rates)))

    def _hold(self, states: TrainState) -> None:
        kept = self.trainer.state
        self.trainer.state = replace(states, frozen=kept.frozen, aux_params=kept.aux_params)

    def state(self, at: int) -> TrainState:
        """Return a copy of the state of a branch."""
        states, kept = split_state(self.trainer.state)
        own: TrainState = self._taken(states, at)
        return replace(own, frozen=kept.frozen, aux_params=kept.aux_params)

    def put(self, at: int, state: TrainState) -> None:
        """Give a branch another state."""
        states, _ = split_state(self.trainer.state)
        self._hold(self._put(states, at, split_state(state)[0]))

    def advance(self, at: int, step: int, until: int) -> Callable[[], list[Row]]:
        """See `loop.Trainer`, of a branch: the first that asks makes the steps of all."""
        if self._called is None or self._until != until:
            self._called, self._until = self.trainer.make(step, until), until
        metrics, seen = self._called

        def rows() -> list[Row]:
            own = jax.tree.map(lambda values: np.asarray(values)[at], metrics)
            return self.trainer.rows(own, seen)

        return rows


class BranchTrainer:
    """See `loop.Trainer`: one branch of those that are trained together."""

    def __init__(self, fused: Fused, at: int) -> None:
        self._fused, self._at = fused, at
        self.steps, self.ahead = fused.trainer.steps, fused.trainer.ahead

    @property
    def state(self) -> TrainState:
        """A copy of what the branch has."""
        return self._fused.state(self._at)

    @state.setter
    def state(self, state: TrainState) -> None:
        self._fused.put(self._at, state)

    def until(self, step: int) -> int:
        """See `loop.Trainer`."""
        return self._fused.trainer.until(step)

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """See `loop.Trainer`."""
        return self._fused.advance(self._at, step, until)

    def samples(self) -> Sequence[SampleRecord]:
        """See `loop.Trainer`."""
        return ()

    def progress(self) -> dict[str, Any]:
        """See `loop.Trainer`."""
        return self._fused.trainer.progress()

    def resume(self, state: TrainState, progress: Mapping[str, Any]) -> None:
        """See `loop.Trainer`."""
        del progress
        self.state = state
