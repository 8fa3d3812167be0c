"""Training steps on meshes, in micro-batches and offloaded, against steps on one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime.architectures import FAMILIES, LLAMA
from tests.runtime.training_helpers import ADAMW, STEPS, assert_trees_close, random_batch, train
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Lion, Muon, Sgd
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.accumulate import accumulate
from tunelang.runtime.training.objective import Batch, shift_targets
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import abstract_state, initial_state, random_state
from tunelang.runtime.training.train_step import train_step

ONE_DEVICE = make_layout()


@pytest.fixture(scope="module")
def one_device_run():
    """Weights and metrics of a run on one device without micro-batches."""
    return train(StepConfig(layout=ONE_DEVICE, chunk=3))


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [
        ({}, 4),
        ({"data": 8}, 1),
        ({"fsdp": 8}, 2),
        ({"tensor": 2, "fsdp": 4}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"context": 4, "data": 2}, 2),
        ({"context": 2, "fsdp": 2, "tensor": 2}, 1),
    ],
)
def test_meshes_and_micro_batches_equal_one_device(one_device_run, mesh, micro_batches):
    config = StepConfig(layout=make_layout(**mesh), micro_batches=micro_batches, chunk=3)
    assert_trees_close(train(config), one_device_run)


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 4}, {"fsdp": 2, "context": 4}])
@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_other_architectures_on_a_mesh_equal_one_device(name, mesh):
    architecture = FAMILIES[name]
    meshed = StepConfig(layout=make_layout(**mesh), remat="full")
    assert_trees_close(
        train(meshed, architecture), train(StepConfig(layout=ONE_DEVICE), architecture)
    )


def test_muon_on_a_mesh_equals_one_device():
    spec = Muon(lr=1e-2)
    meshed = StepConfig(layout=make_layout(fsdp=4, tensor=2))
    # The orthogonalisation magnifies rounding.
    assert_trees_close(
        train(meshed, spec=spec), train(StepConfig(layout=ONE_DEVICE), spec=spec), 2e-4
    )


@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        (ADAMW, {"fsdp": 4, "tensor": 2}),
        (Muon(lr=3e-2, adam_lr=1e-2), {"fsdp": 4, "tensor": 2}),
        (Lion(lr=1e-3), {}),
        (Sgd(lr=1e-2, momentum=0.9), {}),
    ],
)
def test_offloaded_moments_do_not_change_the_result(spec, mesh):
    """Moments stay on the host from step to step of a call."""
    layout = make_layout(**mesh)
    offloaded_run, plain_run = (
        train(StepConfig(layout=layout, chunk=3, offloaded=offloaded), FAMILIES["gemma3"], spec)
        for offloaded in (True, False)
    )
    assert_trees_close(offloaded_run, plain_run)


def test_offloaded_moments_lie_in_pinned_host_memory():
    config = StepConfig(layout=ONE_DEVICE, offloaded=True)
    optimizer = build_optimizer(ADAMW, 10, offloaded=True)
    params = random_state(LLAMA, optimizer, config, 0).params
    state = initial_state(LLAMA, params, optimizer, config)
    step = train_step(LLAMA, optimizer, learning_rate(ADAMW, 10), config)
    for checked in (state, step(state, random_batch())[0]):
        kinds = {
            leaf.sharding.memory_kind for leaf in jax.tree.leaves(checked.optimizer) if leaf.ndim
        }
        assert kinds == {"pinned_host"}
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(checked.params)} == {"device"}


def test_dropout_does_not_depend_on_micro_batches():
    architecture = replace(LLAMA, dropout=0.3)
    expected = train(StepConfig(layout=ONE_DEVICE), architecture)
    assert_trees_close(
        train(StepConfig(layout=make_layout(fsdp=2), micro_batches=4), architecture), expected
    )
    other = train(StepConfig(layout=ONE_DEVICE, seed=1), architecture)
    assert abs(other[1].loss[0] - expected[1].loss[0]) > 1e-3


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_backward_pass_waits_for_the_loss(micro_batches):
    """Else XLA may begin the backward pass, with copies of its own, ahead of the forward pass."""
    config = StepConfig(layout=ONE_DEVICE, micro_batches=micro_batches)
    weights, rows = jnp.ones(3), jnp.ones((2, 3))
    jaxpr = jax.make_jaxpr(
        lambda weights, rows: accumulate(
            lambda weights, part: (jnp.sum(jnp.sin(part * weights)), None), weights, rows, config
        )
    )(weights, rows)
    barriers = [line for line in str(jaxpr).splitlines() if "optimization_barrier" in line]
    assert len(barriers) == 1
    # The loss, and what its gradient is made from.
    assert len(barriers[0].split(" = ")[0].split()) > 1


def test_two_steps_in_one_call_equal_two_calls(one_device_run):
    optimizer = build_optimizer(ADAMW, 10)
    config = StepConfig(layout=ONE_DEVICE, chunk=3)
    state = random_state(LLAMA, optimizer, config, 0)
    step = train_step(LLAMA, optimizer, learning_rate(ADAMW, 10), config)
    batch = random_batch()
    losses = []
    for index in range(STEPS):
        used = state
        state, metrics = step(used, jax.tree.map(lambda x, i=index: x[i : i + 1], batch))
        losses.append(metrics.loss[0])
        assert all(x.is_deleted() for x in jax.tree.leaves(used.params))
    assert state.step == STEPS
    assert_trees_close(
        (jax.device_get(state.params), np.stack(losses)),
        (one_device_run[0], one_device_run[1].loss),
    )


def test_metrics_count_trained_tokens(one_device_run):
    _, metrics = one_device_run
    batch = random_batch()
    counted = [
        shift_targets(jax.tree.map(lambda x, i=i: x[i], batch))[1].sum() for i in range(STEPS)
    ]
    np.testing.assert_array_equal(metrics.tokens, counted)
    np.testing.assert_allclose(metrics.learning_rate, 1e-2)
    assert (metrics.grad_norm > 0).all()


def test_shift_targets_counts_trained_tokens_within_segments():
    batch = Batch(
        tokens=jnp.array([[5, 6, 7, 8, 9, 0, 0]]),
        trained=jnp.array([[1, 0, 1, 1, 1, 1, 1]], bool),
        segments=jnp.array([[1, 1, 1, 2, 2, 0, 0]]),
    )
    targets, counted = shift_targets(batch)
    # Token 6 is not trained, 8 begins a segment, the zeros are padding.
    np.testing.assert_array_equal(counted, [[0, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(targets[counted > 0], [7, 9])


def test_batch_without_trained_tokens_changes_nothing():
    batch = random_batch(1)
    batch = replace(batch, trained=np.zeros_like(batch.trained))
    params, metrics = train(StepConfig(layout=ONE_DEVICE), spec=AdamW(lr=1e-2), batch=batch)
    optimizer = build_optimizer(ADAMW, 10)
    start = random_state(LLAMA, optimizer, StepConfig(layout=ONE_DEVICE), 0).params
    assert_trees_close(params, jax.device_get(start), 0)
    assert (metrics.loss, metrics.tokens, metrics.grad_norm) == (0, 0, 0)


def test_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="16 sequences do not divide over 3 micro-batches on 2"):
        train(StepConfig(layout=make_layout(fsdp=2), micro_batches=3))


def test_abstract_state_matches_the_real_state():
    optimizer = build_optimizer(ADAMW, 10)
    config = StepConfig(layout=make_layout(fsdp=4, tensor=2))
    abstract = abstract_state(LLAMA, optimizer, config)
    state = random_state(LLAMA, optimizer, config, 0)
    jax.tree.map(lambda x, y: (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
                 or pytest.fail(f"{x} is not {y}"), abstract, state)  # fmt: skip
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch())
    step = train_step(LLAMA, optimizer, learning_rate(ADAMW, 10), config)
    memory = step.lower(abstract, batch).compile().memory_analysis()
    sizes_of_state = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
    # The new state lies where the old one was.
    assert memory.alias_size_in_bytes >= sum(sizes_of_state)
    # Matrices are split eight-fold, and so are their moments.
    q = state.params["blocks"]["attention"]["q"]["weight"].get_value()
    assert q.addressable_shards[0].data.size == q.size // 8
    sizes = [x.addressable_shards[0].data.size for x in jax.tree.leaves(state.optimizer)]
    assert sizes.count(q.size // 8) >= 2


@pytest.mark.parametrize("spec", [AdamW(lr=1e-2), Muon(lr=3e-2, adam_lr=1e-2)])
def test_pretraining_reaches_the_entropy_of_the_data(spec):
    """Each token follows from the token before it, but for one in eight."""
    rng = np.random.default_rng(0)
    steps, rows, vocabulary = 60, 8, 16
    following = rng.permutation(vocabulary)
    tokens = np.zeros((steps, rows, 12), np.int32)
    tokens[..., 0] = rng.integers(0, vocabulary, (steps, rows))
    for t in range(1, 12):
        noise = rng.random((steps, rows)) < 1 / 8
        tokens[..., t] = np.where(
            noise, rng.integers(0, vocabulary, noise.shape), following[tokens[..., t - 1]]
        )
    batch = Batch(tokens, np.ones_like(tokens, bool))
    spec = spec.model_copy(update={"decay": "cosine", "warmup": Measure(value=0.1, unit="%")})
    architecture = replace(LLAMA, vocabulary=vocabulary, width=32, mlp=64)
    optimizer = build_optimizer(spec, steps)
    config = StepConfig(layout=ONE_DEVICE)
    state = random_state(architecture, optimizer, config, 0)
    step = train_step(architecture, optimizer, learning_rate(spec, steps), config)
    _, metrics = step(state, batch)
    right = 7 / 8 + 1 / 8 / vocabulary
    floor = -right * np.log(right) - (1 - right) * np.log((1 - right) / (vocabulary - 1))
    assert metrics.loss[0] > 2.5
    assert metrics.loss[-10:].mean() < floor + 0.25
