"""Training on given sequences: `pretrain` and `sft`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunelang.compiler.architecture import train_flops
from tunelang.compiler.layout import CHUNK, StageLayout
from tunelang.dsl.vocabulary.stages import Supervised
from tunelang.runtime import packing, train
from tunelang.runtime.corpus import Corpus, tokenise
from tunelang.runtime.evaluate import Completed
from tunelang.runtime.loop import Row
from tunelang.runtime.optimizers import at_unit_rate, build_optimizer, learning_rate
from tunelang.runtime.permutation import derive
from tunelang.runtime.sharding import Layout
from tunelang.runtime.workshop import Model, Workshop

SHORT_STEP = 2e10
"""FLOPs of a call that is worth starting: shorter steps are made several in a call."""
MOST_STEPS = 32
"""Steps of a call."""
_ROUND = 16
"""Sequences that are not packed are padded to a multiple of so many tokens."""


@dataclass
class SupervisedTrainer:
    """See `loop.Trainer`."""

    state: train.TrainState
    steps: int
    token_flops: float
    """What has to be computed for a token."""
    call: int
    """Steps of a call."""
    ends: tuple[int, ...]
    """Multiples of these, and `marks`, are where calls end."""
    marks: frozenset[int]
    corpus: Corpus
    table: packing.Table
    program: Callable[[train.TrainState, train.Batch], tuple[train.TrainState, train.Metrics]]
    ahead: bool = True

    def until(self, step: int) -> int:
        """See `loop.Trainer`."""
        ends = [(step // every + 1) * every for every in (self.call, *self.ends)]
        return min([self.steps, *ends, *(mark for mark in self.marks if mark > step)])

    def advance(self, step: int, until: int) -> Callable[[], Sequence[Row]]:
        """See `loop.Trainer`."""
        batches = [packing.batch_of(self.table, self.corpus, each) for each in range(step, until)]

        def stack(name: str) -> np.ndarray[Any, Any]:
            return np.stack([getattr(batch, name) for batch in batches])

        self.state, metrics = self.program(
            self.state,
            train.Batch(stack("tokens"), stack("mask"), stack("segments"), stack("positions")),
        )
        seen = [float((batch.segments > 0).sum()) for batch in batches]
        return lambda: _rows(metrics, seen, self.token_flops)

    def samples(self) -> Sequence[Completed]:
        """See `loop.Trainer`."""
        return ()

    def progress(self) -> dict[str, Any]:
        """See `loop.Trainer`: the order of data is a function of the step."""
        return {}

    def resume(self, state: train.TrainState, progress: Mapping[str, Any]) -> None:
        """See `loop.Trainer`."""
        del progress
        self.state = state


def _rows(metrics: train.Metrics, seen: Sequence[float], token_flops: float) -> list[Row]:
    found = {name: np.asarray(values).tolist() for name, values in vars(metrics).items()}
    trained = found.pop("tokens")
    return [
        {
            **{name: values[at] for name, values in found.items()},
            "perplexity": math.exp(min(found["loss"][at], 700.0)),
            "tokens": tokens,
            "flops": tokens * token_flops,
            "trained_tokens": trained[at],
        }
        for at, tokens in enumerate(seen)
    ]


def supervised_trainer(
    workshop: Workshop,
    stage: Supervised,
    model: Model,
    planned: StageLayout,
    layout: Layout,
    seed: int,
    begin: Callable[[Any, train.Program], train.TrainState],
    marks: frozenset[int],
) -> SupervisedTrainer:
    """Open the data and compile the program of a stage.

    `begin` makes the first state from the optimizer and the program. Raises what opening data
    raises.
    """
    a = model.architecture
    stream = workshop.stream(stage.data, seed=derive(seed, "data"), renderer=model.renderer)
    corpus = tokenise(stream, model.renderer, context=a.context, cache=workshop.cache)
    longest = a.context if stage.packing else _longest(corpus, a.context)
    table = packing.plan(
        corpus,
        stage.length,
        batch=packing.sequences_of(stage.batch, longest),
        packed=stage.packing,
        longest=longest,
    )
    # One that was planned for the whole context may not have the length of the data.
    kernel = "xla" if planned.kernel == "splash" and longest % 128 else planned.kernel
    program = train.Program(
        layout=layout,
        dtype=model.dtype,
        micro_batches=math.gcd(planned.micro_batches, table.batch // layout.batch_shards),
        remat=planned.remat,  # type: ignore[arg-type]
        kernel=kernel,  # type: ignore[arg-type]
        chunk=CHUNK,
        seed=derive(seed, "dropout") % 2**31 if train.drops(a) else 0,
    )
    # Built for a rate of 1, which the state's scale makes the stage's own: a sweep over rates
    # shares the program.
    unit = at_unit_rate(stage.optimizer)
    optimizer, make = workshop.once(
        ("train", a, program, unit, table.steps),
        lambda: _compiled(model, unit, table.steps, program),
    )
    state = begin(optimizer, program)
    token_flops = train_flops(a, longest)
    call = max(1, min(MOST_STEPS, int(SHORT_STEP / (token_flops * table.batch * longest))))
    ends = tuple(n for n in (stage.evals and stage.eval_every, stage.checkpoint_every) if n)
    return SupervisedTrainer(
        state, table.steps, token_flops, call, ends, marks, corpus, table, make
    )


def _compiled(model: Model, unit: Any, steps: int, program: train.Program) -> Any:
    optimizer = build_optimizer(unit, steps)
    schedule = learning_rate(unit, steps)
    return optimizer, train.train_step(model.architecture, optimizer, schedule, program)


def _longest(corpus: Corpus, context: int) -> int:
    """Return the length that all examples fit into."""
    most = max(int(part.lengths.max()) for part in corpus.parts)
    return min(context, -(-most // _ROUND) * _ROUND)
