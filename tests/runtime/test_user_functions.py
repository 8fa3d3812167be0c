"""Functions of the user against the built-in words that they repeat; errors of those that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tunelang.dsl.check import check_file
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.data import PythonData, Settings
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.preference_stages import Preference
from tunelang.dsl.vocabulary.training import Clip, Sampling
from tunelang.runtime.data.row_sources import open_rows
from tunelang.runtime.objectives import policy_gradient
from tunelang.runtime.objectives.advantages import group_advantages
from tunelang.runtime.objectives.policy_gradient import Completions
from tunelang.runtime.objectives.preference_losses import Pairs, pair_losses
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.training.cross_entropy import cross_entropy, custom_loss
from tunelang.runtime.training.optimizers import learning_rate
from tunelang.runtime.user_functions import (
    UserFunction,
    UserFunctionError,
    load_user_functions,
    make_rows,
)
from tunelang.runtime.workers import worker_process

SOURCE = """
import math
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, log_softmax
from neighbour import centre

def surprise(targets, logits):
    found = jnp.take_along_axis(log_softmax(logits), targets[..., None], -1)
    return -found[..., 0]

def cosine(progress):
    return 0.5 * (1 + jnp.cos(math.pi * progress))

def sigmoid(chosen, rejected, **_):
    return -log_sigmoid(chosen - rejected)

def advantage(rewards):
    return centre(rewards)

def reinforce(ratio, advantages):
    return -ratio * advantages

def mean(rewards):
    return rewards.mean(1)

def broken(rewards):
    return rewards.nothing

def rows(count, of=("a", "b")):
    print("made", count)
    for n in range(count):
        yield {"number": np.int64(n), "name": of[n % len(of)]}

def odd():
    return [{"a": 1}, 2]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `mine.py` and a module that it imports."""
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "neighbour.py").write_text("def centre(x): return x - x.mean(1, keepdims=True)\n")
    return tmp_path


def python_reference(name: str) -> Python:
    """Refer to a function of `mine.py`."""
    return Python(reference=f"mine.py:{name}")


def load_advantage(name: str, folder: Path) -> UserFunction:
    """Load a function of `mine.py`, as an advantage."""
    stage = load_user_functions(Policy.unvalidated(advantage=python_reference(name)), folder)
    assert isinstance(stage.advantage, UserFunction)
    return stage.advantage


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4}])
def test_user_loss_equals_the_cross_entropy(folder: Path, mesh: dict[str, int]) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (4, 10, 6)), jax.random.normal(keys[1], (24, 6))
    targets = jax.random.randint(keys[2], (4, 10), 0, 24)
    weights = jax.random.uniform(keys[3], (4, 10))
    layout = make_layout(**mesh) if mesh else None
    function = load_advantage("surprise", folder)

    def user_loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return custom_loss(
            hidden, head, targets, weights, function, chunk=4, cap=2.0, layout=layout
        )

    def built_in_loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return cross_entropy(hidden, head, targets, weights, chunk=4, cap=2.0, layout=layout)[0]

    actual, expected = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
        for loss in (user_loss, built_in_loss)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected
    )


def test_user_schedule_equals_the_cosine(folder: Path) -> None:
    plain = AdamW.unvalidated(
        lr=3e-4, warmup=Measure.unvalidated(value=0.1, unit="%"), decay="cosine"
    )
    user_stage = load_user_functions(
        plain.model_copy(update={"decay": python_reference("cosine")}), folder
    )
    for step in (0, 3, 10, 57, 99):
        assert learning_rate(user_stage, 100)(step) == pytest.approx(
            learning_rate(plain, 100)(step)
        )


def test_user_pair_loss_equals_the_sigmoid(folder: Path) -> None:
    arrays = [jax.random.normal(key, (5,)) for key in jax.random.split(jax.random.key(1), 4)]
    tokens = jnp.ones(5)
    pairs = Pairs(arrays[0], arrays[1], tokens, tokens, arrays[2], arrays[3])
    user_stage = load_user_functions(
        Preference.unvalidated(loss=python_reference("sigmoid")), folder
    )
    np.testing.assert_allclose(
        pair_losses(user_stage, pairs)[0],
        pair_losses(Preference.unvalidated(), pairs)[0],
        rtol=1e-6,
    )


def test_user_advantage_and_policy_loss_equal_the_built_in_ones(folder: Path) -> None:
    rewards = jnp.array([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    actual = group_advantages(rewards, load_advantage("advantage", folder))
    expected = group_advantages(rewards, "group_mean")
    np.testing.assert_allclose(actual.values, expected.values)
    np.testing.assert_array_equal(actual.flat, expected.flat)

    keys = jax.random.split(jax.random.key(2), 3)
    now, old, advantage = (jax.random.normal(key, (2, 4)) for key in keys)
    batch = Completions(now, jnp.ones((2, 4), bool), advantage, old)
    plain = Policy.unvalidated(clip=None, rollout=Sampling.unvalidated())
    user_stage = load_user_functions(
        plain.model_copy(update={"loss": python_reference("reinforce")}), folder
    )
    np.testing.assert_allclose(
        policy_gradient.objective(user_stage, batch)[0],
        policy_gradient.objective(plain, batch)[0],
        rtol=1e-6,
    )
    clipped = plain.model_copy(update={"clip": Clip.unvalidated()})
    assert (
        policy_gradient.objective(clipped, batch)[0] != policy_gradient.objective(plain, batch)[0]
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [("mean", "it returned the shape (2,), not (2, 3)"), ("broken", "AttributeError")],
)
def test_error_in_a_user_function_names_it(folder: Path, name: str, why: str) -> None:
    with pytest.raises(UserFunctionError) as caught:
        group_advantages(jnp.ones((2, 3)), load_advantage(name, folder))
    assert caught.value.reference == f"mine.py:{name}"
    assert why in caught.value.why


def test_unloadable_function_is_an_error(folder: Path) -> None:
    (folder / "bad.py").write_text("import nothing_like_this\ndef f(rewards): return rewards\n")
    with pytest.raises(UserFunctionError, match="nothing_like_this"):
        load_user_functions(Policy.unvalidated(advantage=Python(reference="bad.py:f")), folder)


def test_stage_without_user_functions_is_unchanged(folder: Path) -> None:
    stage = Policy.unvalidated(reward=python_reference("mean"), optimizer=AdamW.unvalidated(lr=1.0))
    assert load_user_functions(stage, folder) is stage  # rewards run in processes of their own


def test_user_rows_are_made_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = folder / "cache"
    kind = PythonData.unvalidated(
        function="mine.py:rows", settings=Settings.unvalidated(values={"count": 3})
    )
    for _ in range(2):
        rows = open_rows(kind, folder, cache=cache)
        assert [rows[row] for row in range(len(rows))] == [
            {"number": 0, "name": "a"}, {"number": 1, "name": "b"}, {"number": 2, "name": "a"},
        ]  # fmt: skip
    assert capsys.readouterr().out == "made 3\n"
    assert rows.place(1) == "mine.py:rows: row 2"
    digest = rows.digest
    (folder / "mine.py").write_text(SOURCE.replace('of=("a", "b")', 'of=("c", "d")'))
    assert open_rows(kind, folder, cache=cache).digest != digest


def test_row_that_is_no_dict_is_an_error(folder: Path) -> None:
    cache = folder / "cache"
    with pytest.raises(UserFunctionError, match="a row has to be a dict, and one is 2"):
        make_rows(PythonData.unvalidated(function="mine.py:odd"), folder, cache)
    assert not list(cache.glob("*.jsonl"))


def test_functions_of_the_example_work() -> None:
    folder = Path(__file__).parents[2] / "specs" / "custom"

    def example(name: str) -> Any:
        return worker_process.load_function(str(folder / "functions.py"), name)

    rows = list(example("vowels")(count=5, seed=3))
    assert len(rows) == 5
    assert all(set(row["vowels"]) <= set("aeiou") for row in rows)
    logits = jnp.array([[4.0, 0.0], [0.0, 0.0]])
    sure, unsure = example("focal")(logits, jnp.array([0, 0]))
    assert 0 < sure < 0.02
    assert unsure == pytest.approx(0.5 * np.log(2))
    assert example("square_root")(jnp.array([0.0, 0.75, 1.0])).tolist() == [1.0, 0.5, 0.0]
    assert example("closeness")("evol", "evil") == 0.75
    assert example("ranks")(jnp.array([[1.0, 3.0, 3.0]])).tolist() == [[-1.0, 0.5, 0.5]]
    assert example("smooth")(jnp.array([1.0]), jnp.array([2.0])).tolist() == [0.0]
    assert example("longest_right")(["ab", "abc", "a"], [1.0, 0.0, 1.0]) == 2
    assert check_file(folder / "custom.tune").program is not None
