"""The training program of supervised stages: one jitted call that makes one or more steps.

A step's loss is the sum over its trained tokens divided by their number in the whole batch, so
that neither micro-batches nor devices change it. Micro-batches are scanned, and so are steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tunelang.compiler.models.architecture import Architecture
from tunelang.runtime.models.attention import Kernel
from tunelang.runtime.models.decoder import Decoder, Remat
from tunelang.runtime.models.layers import balance_loss
from tunelang.runtime.sharding import HOST, Layout, jit, shardings
from tunelang.runtime.training.cross_entropy import cross_entropy, custom_loss
from tunelang.runtime.training.optimizers import Schedule
from tunelang.runtime.user_functions import Custom

AnyArray = Any
"""An array of JAX or of numpy: what the host makes goes into programs as it is."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sequences to train on. Each field is `[batch, length]`, or `[steps, batch, length]`."""

    tokens: AnyArray
    """int32."""
    trained: AnyArray
    """bool: whether the loss counts how well this token is predicted from those before it. The
    first token of a segment never counts, since nothing stands before it."""
    segments: AnyArray = None
    """int32: which of the examples that share a sequence a token belongs to; 0 is padding.
    Without it, every sequence is one example, padded at its end."""
    positions: AnyArray = None
    """int32: the place of a token in its example; without it, in its sequence."""
    values: AnyArray = None
    """`[batch, segments]` float32: a number for each segment, such as its label."""
    reference: AnyArray = None
    """`[batch, segments]` float32: summed log-probability of a segment by the reference, in nats.
    """
    mismatched: Batch | None = None
    """Prompts with answers to other prompts."""
    teacher: Any = None
    """The ids `[batch, length, k]` and log-probabilities of a teacher's likeliest tokens."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and the weights that it leaves alone. Parameters carry the
    names of their axes.
    """

    params: nnx.State[Any, Any]
    """What is trained."""
    optimizer: Any
    step: jax.Array
    """int32 scalar: how many steps were made."""
    scale: jax.Array
    """float32 scalar: factor of every update. An optimizer built for a learning rate of 1 and
    scaled by the peak rate serves all branches of a sweep over rates with one program."""
    frozen: nnx.State[Any, Any] = field(default_factory=lambda: nnx.State({}))
    """The decoder's other parameters, where an adapter is trained."""
    beside: Any = None
    """Parameters of other models that the objective reads: a reference, a teacher; or what is
    frozen of the critic."""
    critic: TrainState | None = None
    """Of the values, beside a policy; without what is frozen."""

    @property
    def moments(self) -> Any:
        """What a checkpoint has to hold beside the parameters."""
        if self.critic is None:
            return self.optimizer
        critic = {"params": self.critic.params, "optimizer": self.critic.optimizer}
        return {"optimizer": self.optimizer, "critic": critic}

    def restored(self, params: Any, moments: Any, step: int) -> TrainState:
        """Return the state that had these parameters and `moments` after so many updates."""
        critic = self.critic
        if critic is not None:
            held, moments = moments["critic"], moments["optimizer"]
            critic = critic.restored(held["params"], held["optimizer"], step)
        count = jax.device_put(jnp.int32(step), self.step.sharding)
        return replace(self, params=params, optimizer=moments, step=count, critic=critic)

    @property
    def yielded(self) -> nnx.State[Any, Any]:
        """What was trained of the decoder."""
        return parted(self.params)[0]

    @property
    def weights(self) -> nnx.State[Any, Any]:
        """All parameters of the decoder."""
        return whole(self.yielded, self.frozen)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What a step reports; `[steps]` float32 each."""

    loss: jax.Array
    """Mean over the trained tokens, in nats, before the update."""
    tokens: jax.Array
    """Trained tokens."""
    grad_norm: jax.Array
    """Global norm of the gradient, before clipping."""
    learning_rate: jax.Array
    more: dict[str, jax.Array] = field(default_factory=dict)
    """What else the objective tells."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a training program is made from, beside the architecture: how and where it runs."""

    layout: Layout
    dtype: Any = jnp.float32
    """Of activations."""
    micro_batches: int = 1
    """Parts that a batch is gone through in, one after another."""
    remat: Remat = "none"
    kernel: Kernel = "xla"
    chunk: int = 128
    """Tokens of a sequence whose logits are in memory at once."""
    seed: int = 0
    """Of the dropout."""
    offloaded: bool = False
    """Whether the moments of the optimizer lie in the memory of the host."""
    branches: int = 1
    """States that are trained side by side on the same batches: what changes of them has a leading
    axis then, and so have metrics."""

    @property
    def attends(self) -> Kernel:
        """The kernel as models are to use it."""
        return "cudnn beside" if self.branches > 1 and self.kernel == "cudnn" else self.kernel


@dataclass(frozen=True)
class StateProgram:
    """A jitted program from a state and a batch to the next state and metrics.

    The state that goes in is used up, all but what is frozen.
    """

    jitted: jax.stages.Wrapped
    """`(what changes, what does not, batch) -> (what changes, metrics)`; both parts are states."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Run it."""
        changed, metrics = self.jitted(*parts(state), batch)
        return replace(changed, frozen=state.frozen, beside=state.beside), metrics

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """Lower it for shapes and shardings."""
        return self.jitted.lower(*parts(state), batch)


def parts(state: TrainState) -> tuple[TrainState, Kept]:
    """Return what a step changes of a state, and what it leaves alone."""
    changing = replace(state, frozen=nnx.State({}), beside=None)
    return changing, Kept(state.frozen, state.beside)


class Kept(NamedTuple):
    """What a step reads and leaves alone."""

    frozen: Any
    beside: Any


@dataclass(frozen=True)
class Models:
    """What an objective works with."""

    decoder: Decoder
    """With the parameters that are trained."""
    extra: nnx.State[Any, Any]
    """What is trained beside it."""
    beside: Any
    program: Program


class Objective(Protocol):
    """What a step makes smaller: a sum over the parts of a batch."""

    def extra(self) -> nnx.State[Any, Any]:
        """Return parameters below `EXTRA` that are trained beside the decoder's, as they begin."""
        return nnx.State({})

    def whole(self, models: Models, batch: Batch) -> Any:
        """Return what each part has to know of the whole batch: scalars to divide by."""

    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, whole: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of a part, and metrics; over the parts, each adds up.

        `keys` `[batch]` are of the dropout.
        """


def whole(*parts: nnx.State[Any, Any]) -> nnx.State[Any, Any]:
    """Put parts of a decoder's parameters together."""
    return nnx.merge_state(*parts)


EXTRA = "objective"
"""Under this name stand parameters that are trained beside the decoder's."""


def parted(params: nnx.State[Any, Any]) -> tuple[nnx.State[Any, Any], nnx.State[Any, Any]]:
    """Return the decoder's parameters, and those of the objective."""
    extra, own = nnx.split_state(params, lambda path, _: path[0] == EXTRA, ...)
    return own, extra


def divided(
    architecture: Architecture, params: nnx.State[Any, Any]
) -> tuple[nnx.State[Any, Any], nnx.State[Any, Any]]:
    """Return the parameters that are trained, and those that are frozen."""
    if not architecture.adapters:
        return params, nnx.State({})
    last = str(len(architecture.adapters) - 1)

    def trained(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(name) for name in path]
        # `blocks.attention.q.adapters.0.a`, `embedding_adapters.0.a`
        adapter = len(names) > 2 and names[-3].endswith("adapters") and names[-2] == last
        return adapter or names[0] in ("score", EXTRA)

    chosen, rest = nnx.split_state(params, trained, ...)
    return chosen, rest


def drops(architecture: Architecture) -> bool:
    """Whether training draws what to drop."""
    return bool(architecture.dropout or any(each.dropout for each in architecture.adapters))


def shift(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return what each position predicts, `[batch, length]`, and whether it counts (float32)."""
    targets = jnp.roll(batch.tokens, -1, axis=1)
    counted = jnp.roll(batch.trained.astype(bool), -1, axis=1).at[:, -1].set(False)
    if batch.segments is not None:
        following = jnp.roll(batch.segments, -1, axis=1)
        counted &= (following == batch.segments) & (batch.segments > 0)
    return targets, counted.astype(jnp.float32)


def abstract_decoder(architecture: Architecture, dtype: Any) -> tuple[Any, Any]:
    """Return the decoder's graph definition, and its parameters as shapes with axis names; those
    of adapters too.
    """
    return nnx.split(nnx.eval_shape(lambda: Decoder(architecture, nnx.Rngs(0), dtype)))


def abstract_state(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    program: Program,
    extra: Callable[[], Any] = lambda: nnx.State({}),
) -> TrainState:
    """Return the state as shapes and shardings, which `train_step(...).lower` takes for arrays."""
    state = jax.eval_shape(lambda: _fresh(architecture, optimizer, program, 0, extra()))
    shaped: TrainState = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        _state_shardings(state, program),
    )
    return shaped


def init_state(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    program: Program,
    seed: int,
    scale: float = 1.0,
) -> TrainState:
    """Random parameters, made where they belong. The same for every mesh."""
    abstract = jax.eval_shape(lambda: _fresh(architecture, optimizer, program, 0))
    places = _state_shardings(abstract, program)
    make = jax.jit(
        lambda seed: _fresh(architecture, optimizer, program, seed), out_shardings=places
    )
    state: TrainState = make(seed)
    return replace(state, scale=jax.device_put(jnp.float32(scale), places.scale))


def side_by_side(tree: Any, count: int) -> Any:
    """Return the shapes and shardings of so many trees of arrays with one leading axis."""

    def one(leaf: Any) -> Any:
        place = NamedSharding(leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec))
        return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype, sharding=place)

    return jax.tree.map(one, tree)


def state_of(
    architecture: Architecture,
    params: nnx.State[Any, Any],
    optimizer: optax.GradientTransformation,
    program: Program,
    scale: float = 1.0,
) -> TrainState:
    """Return the state of a run that starts from given parameters, which it takes over."""
    params, frozen = divided(architecture, params)
    shapes = jax.eval_shape(optimizer.init, params)
    places = shardings(shapes, program.layout, HOST if program.offloaded else None)
    if program.offloaded:  # on the devices there is no room for all of them
        moments = jax.tree.map(
            lambda leaf, place: jax.device_put(np.zeros(leaf.shape, leaf.dtype), place),
            shapes, places,
        )  # fmt: skip
    else:
        moments = jax.jit(optimizer.init, out_shardings=places)(params)
    everywhere = NamedSharding(program.layout.mesh, PartitionSpec())
    zero, factor = jnp.zeros((), jnp.int32), jnp.float32(scale)
    step, factor = jax.device_put((zero, factor), everywhere)
    return TrainState(params, moments, step, factor, frozen)


def _fresh(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    program: Program,
    seed: Any,
    extra: Any = nnx.State({}),  # noqa: B008 - it is empty and stays so
) -> TrainState:
    decoder = Decoder(architecture, nnx.Rngs(jax.random.key(seed)), program.dtype)
    decoder.measure()
    params, frozen = divided(architecture, nnx.state(decoder, nnx.Param))
    params = whole(params, extra)
    zero, one = jnp.zeros((), jnp.int32), jnp.float32(1.0)
    return TrainState(params, optimizer.init(params), zero, one, frozen)


def _state_shardings(state: TrainState, program: Program) -> Any:
    """Return the shardings of a state, arranged as it is."""
    layout = program.layout
    return replace(
        state,
        params=shardings(state.params, layout),
        optimizer=shardings(state.optimizer, layout, HOST if program.offloaded else None),
        beside=None,
        step=shardings(state.step, layout),
        scale=shardings(state.scale, layout),
        frozen=shardings(state.frozen, layout),
    )


def train_step(
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    program: Program,
    objective: Objective | None = None,
) -> StateProgram:
    """Return the program `(state, batch) -> (state, metrics)`.

    Without an objective, it is the likelihood of the trained tokens. The batch has a leading axis:
    `[steps, batch, length]`, and that many steps are made. Raises
    `ValueError` when called with a batch that does not divide over micro-batches and devices.
    """
    objective = objective or Likelihood()
    graph, _ = abstract_decoder(architecture, program.dtype)
    layout = program.layout

    def one_step(state: TrainState, kept: Kept, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = batch.tokens.shape[0]
        parts = program.micro_batches * layout.batch_shards
        if rows % parts:
            raise ValueError(
                f"{rows} sequences do not divide over {program.micro_batches} micro-batches on"
                f" {layout.batch_shards} parts of the mesh"
            )
        keys = None
        if drops(architecture):
            key = jax.random.fold_in(jax.random.key(program.seed), state.step)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(rows))

        def models(params: Any) -> Models:
            own, extra = parted(params)
            decoder = nnx.merge(graph, whole(own, kept.frozen))
            return Models(decoder, extra, kept.beside, program)

        tokens = jnp.sum(shift(batch)[1])
        known = objective.whole(models(jax.lax.stop_gradient(state.params)), batch)

        def loss(params: Any, part: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, Any]:
            return objective.loss(models(params), *part, known)

        value, more, gradient = accumulate(
            loss, state.params, (batch, keys), program, partial(jax.tree.map, jnp.add)
        )
        state, norm, rate = updated(state, gradient, optimizer, schedule)
        return state, Metrics(value, tokens, norm, rate, more)

    def steps(state: TrainState, kept: Kept, batches: Batch) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, batch: one_step(state, kept, batch), state, batches)

    abstract = abstract_state(architecture, optimizer, program, objective.extra)
    places = _state_shardings(abstract, program)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    batch_place = NamedSharding(
        layout.mesh, PartitionSpec(None, *layout.spec(("batch",), (layout.batch_shards,)))
    )
    changing, _ = parts(places)
    run = steps
    if program.branches > 1:
        stacked = side_by_side(parts(abstract)[0], program.branches)
        changing = jax.tree.map(lambda leaf: leaf.sharding, stacked)
        run = jax.vmap(steps, in_axes=(0, None, None))
    jitted = jit(
        run,
        layout,
        # What is kept may lie anywhere: a reference can have a layout of its own.
        in_shardings=(changing, Kept(places.frozen, None), batch_place),
        out_shardings=(changing, everywhere),
        donate_argnums=0,
    )
    return StateProgram(jitted)


@dataclass(frozen=True)
class Likelihood(Objective):
    """The mean over the trained tokens of the batch of `-log p`, or of a loss of the user's own.
    See `Objective`.
    """

    own: Custom | None = None

    def whole(self, models: Models, batch: Batch) -> jax.Array:
        """See `Objective`."""
        del models
        return jnp.maximum(jnp.sum(shift(batch)[1]), 1.0)

    def loss(
        self, models: Models, batch: Batch, keys: jax.Array | None, whole: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Objective`."""
        return _summed_loss(models.decoder, batch, keys, models.program, own=self.own) / whole, {}


def _summed_loss(
    decoder: Decoder,
    batch: Batch,
    keys: jax.Array | None,
    program: Program,
    *,
    balanced: bool = True,
    own: Custom | None = None,
) -> jax.Array:
    hidden, routed = hidden_states(decoder, batch, keys, program)
    targets, counted = shift(batch)
    inputs = hidden, decoder.head_weight(), targets, counted
    more: Any = {
        "chunk": program.chunk,
        "cap": decoder.architecture.logit_cap,
        "layout": program.layout,
    }
    if own is None:
        total, _ = cross_entropy(*inputs, **more)
    else:
        total = custom_loss(*inputs, own, **more)
    if balanced:
        # The loss of a batch is the mean over its micro-batches, by their trained tokens.
        total += jnp.sum(counted) * balance(decoder, batch, routed)
    return total


def balance(
    decoder: Decoder, batch: Batch, routed: tuple[jax.Array, jax.Array] | None
) -> jax.Array:
    """Return the load-balance loss of experts over a part of a batch, 0 without any."""
    mixture = decoder.architecture.experts
    if mixture is None or routed is None:
        return jnp.zeros((), jnp.float32)
    there = jnp.ones(batch.tokens.shape, bool) if batch.segments is None else batch.segments > 0
    loss: jax.Array = mixture.balance * balance_loss(*routed, there)
    return loss


def hidden_states(
    decoder: Decoder, batch: Batch, keys: jax.Array | None, program: Program
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """See `Decoder.routed`."""
    return decoder.routed(
        batch.tokens,
        segments=batch.segments,
        positions=batch.positions,
        dropout_keys=keys,
        layout=program.layout,
        remat=program.remat,
        kernel=program.attends,
    )


def accumulate(
    loss: Callable[[Any, Any], tuple[jax.Array, Any]],
    params: Any,
    batch: Any,
    program: Program,
    add: Callable[[Any, Any], Any] = lambda *_: None,
    counts: Callable[[Any], jax.Array] | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Add up over the micro-batches a loss, what it gives beside by `add`, and its gradient.

    Every array of the batch is `[rows, ...]`. Micro-batches of which `counts` is false have neither
    loss nor gradient; behind the last of the others they are skipped.
    """

    def differentiated(part: Any) -> tuple[jax.Array, Any, Any]:
        value, pull, extra = jax.vjp(lambda params: loss(params, part), params, has_aux=True)
        # Nothing of the way back is begun on the way there, such as copies of frozen weights.
        value, pull = jax.lax.optimization_barrier((value, pull))
        (gradient,) = pull(jnp.ones_like(value))
        return value, extra, gradient

    if program.micro_batches == 1:
        return differentiated(batch)

    def added(carry: tuple[jax.Array, Any, Any], part: Any) -> tuple[jax.Array, Any, Any]:
        value, extra, gradient = differentiated(part)
        total, extras, gradients = carry
        return total + value, add(extras, extra), jax.tree.map(jnp.add, gradients, gradient)

    parts = jax.tree.map(lambda array: micro_batches(array, program), batch)
    first = jax.tree.map(lambda array: array[0], parts)
    extras = jax.eval_shape(lambda: loss(params, first)[1])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), extras)
    start = (jnp.zeros((), jnp.float32), zeros, jax.tree.map(jnp.zeros_like, params))
    if counts is None:
        return jax.lax.scan(lambda carry, part: (added(carry, part), None), start, parts)[0]

    def nth(at: Any, carry: tuple[jax.Array, Any, Any]) -> tuple[jax.Array, Any, Any]:
        return added(carry, jax.tree.map(lambda array: array[at], parts))

    count = jnp.arange(1, program.micro_batches + 1)
    last = jnp.max(jnp.where(jax.vmap(counts)(parts), count, 0))
    found: tuple[jax.Array, Any, Any] = jax.lax.fori_loop(0, last, nth, start)
    return found


def micro_batches(array: jax.Array, program: Program) -> jax.Array:
    """Cut `[rows, ...]` into `[micro_batches, rows / micro_batches, ...]`."""
    # Every n-th row, so that a device's rows stay on it: rows lie in blocks over the mesh.
    parts = array.reshape(-1, program.micro_batches, *array.shape[1:]).swapaxes(0, 1)
    return program.layout.constrain(parts, (None, "batch", *(None for _ in array.shape[1:])))


def updated(
    state: TrainState,
    gradient: Any,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Make one update. Returns the state, the gradient's norm before clipping, the rate."""
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    updates = jax.tree.map(lambda update: state.scale * update, updates)
    params = optax.apply_updates(state.params, updates)
    rate = state.scale * schedule(state.step)
    new = TrainState(params, optimizer_state, state.step + 1, state.scale)
    return new, optax.tree.norm(gradient), rate


def loss_program(architecture: Architecture, program: Program) -> jax.stages.Wrapped:
    """Return the jitted `(params, batch) -> (loss, tokens)`: sums over `[steps, batch, length]`."""
    graph, _ = abstract_decoder(architecture, program.dtype)

    def total(params: Any, batches: Batch) -> tuple[jax.Array, jax.Array]:
        def body(carry: tuple[jax.Array, jax.Array], batch: Batch) -> tuple[Any, None]:
            loss = _summed_loss(nnx.merge(graph, params), batch, None, program, balanced=False)
            return (carry[0] + loss, carry[1] + jnp.sum(shift(batch)[1])), None

        zero = jnp.zeros((), jnp.float32)
        sums, _ = jax.lax.scan(body, (zero, zero), batches)
        return sums

    return jit(total, program.layout)
