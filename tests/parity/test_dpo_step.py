"""Steps of DPO against TRL 1.16: loss, metrics, gradient norm and weights of a small Llama."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from tests.parity.test_transformers import save_model
from tests.parity.test_trl import preference_stage, trl_trainer
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.families import architecture_of
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer, Sgd
from tunelang.runtime.loading import pretrained
from tunelang.runtime.loading.stored_tensors import tensors
from tunelang.runtime.models.model_folder import read_config
from tunelang.runtime.objectives.answer_scores import segment_program
from tunelang.runtime.sharding import make_layout, shardings
from tunelang.runtime.stages.preference import PairObjective
from tunelang.runtime.stages.supervised import Auxiliary
from tunelang.runtime.training.objective import Batch
from tunelang.runtime.training.optimizers import build_optimizer, learning_rate
from tunelang.runtime.training.step_config import StepConfig
from tunelang.runtime.training.train_state import initial_state
from tunelang.runtime.training.train_step import train_step

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl", minversion="1.16")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS, PAIRS, LENGTH = 2, 6, 40
STAGE = preference_stage(beta=0.3)
OPTIMIZERS: dict[str, Optimizer] = {
    # Clips at each step. The large epsilon keeps differences of rounding small, see
    # `tests/runtime/training_helpers.py`.
    "adamw": AdamW(lr=1e-2, b2=0.99, eps=1e-3, weight_decay=0.1, clip_norm=1.0),
    "sgd": Sgd(lr=1e-2, momentum=0.9, clip_norm=None),
}
METRICS = {
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_log_prob": "logps/chosen",
    "rejected_log_prob": "logps/rejected",
}

Pair = dict[str, list[int]]


@dataclass(frozen=True)
class Case:
    """A way to lay pairs out and to train on them."""

    optimizer: str = "adamw"
    rows: tuple[int, ...] = (1,) * PAIRS
    """Pairs of each sequence."""
    live: bool = False
    micro_batches: int = 1
    mesh: dict[str, int] = field(default_factory=dict)


PACKED_ROWS = (2, 1, 2, 1)
CASES = {
    "a pair a row": Case(),
    "sgd, live": Case("sgd", live=True),
    "packed": Case(rows=PACKED_ROWS),
    "packed, live, micro-batches": Case(rows=PACKED_ROWS, live=True, micro_batches=2),
    "packed, mesh": Case("sgd", PACKED_ROWS, mesh={"fsdp": 2, "tensor": 2}),
}


@pytest.fixture(scope="module")
def steps() -> list[list[Pair]]:
    """Random pairs for each step, of various lengths."""
    random = np.random.default_rng(3)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(3, 97, random.integers(low, high + 1)).tolist()

    return [
        [
            {"prompt_ids": ids(1, 4), "chosen_ids": ids(1, 6), "rejected_ids": ids(1, 6)}
            for _ in range(PAIRS)
        ]
        for _ in range(STEPS)
    ]


@dataclass(frozen=True)
class PolicyAndReference:
    """A policy and a reference near it, as models of torch and as our parameters."""

    config: dict[str, Any]
    architecture: Architecture
    theirs: tuple[Any, Any]
    ours: tuple[Any, Any]
    """Numpy."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> PolicyAndReference:
    """A random Llama, and the same with noise."""
    folders = [tmp_path_factory.mktemp(name) for name in ("policy", "reference")]
    _, _, model = save_model("llama 3", folders[0])
    reference = deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    reference.save_pretrained(folders[1])
    config = read_config(folders[0])
    architecture = architecture_of(config)
    policy, other = (
        jax.device_get(pretrained.load(folder, architecture, make_layout())) for folder in folders
    )
    return PolicyAndReference(config, architecture, (model, reference), (policy, other))


@pytest.fixture(scope="module")
def trl_runs(models, steps) -> dict[str, tuple[dict[str, list[float]], dict[str, np.ndarray]]]:
    """Metrics by step and updated weights of TRL's runs, for each optimizer."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    collate, runs = DataCollatorForPreference(pad_token_id=0), {}
    for name, spec in OPTIMIZERS.items():
        model, reference = (deepcopy(original) for original in models.theirs)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        add_fused_lm_head(reference)
        dpo = trl_trainer(
            trl.DPOTrainer, model=model.train(), ref_model=reference, beta=STAGE.beta,
            loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, label_smoothing=0.0,
            f_divergence_type="reverse_kl", use_weighting=False, precompute_ref_logps=False,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        )  # fmt: skip
        update = torch_optimizer(spec, model)
        row: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        for pairs in steps:
            update.zero_grad()
            loss = dpo._compute_loss(model, collate(pairs), return_outputs=False)
            loss.backward()
            most = spec.clip_norm or np.inf
            row["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), most)))
            row["loss"].append(float(loss))
            update.step()
        logged = dpo._metrics["train"]
        row |= {ours: logged[theirs] for ours, theirs in METRICS.items()}
        runs[name] = row, {n: p.detach().numpy() for n, p in model.named_parameters()}
    return runs


def torch_optimizer(spec: Optimizer, model: Any) -> Any:
    """Make the optimizer of torch that a spec describes."""
    if isinstance(spec, Sgd):
        return torch.optim.SGD(model.parameters(), spec.lr, spec.momentum)
    assert isinstance(spec, AdamW)
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) is is_matrix] for is_matrix in (True, False)
    )
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, spec.lr, (spec.b1, spec.b2), spec.eps, weight_decay=spec.weight_decay
    )


def pack_pairs(steps: list[list[Pair]], rows: tuple[int, ...]) -> Batch:
    """Lay pairs out in sequences, the chosen answer of each before the rejected one."""
    shape = (len(steps), len(rows), LENGTH)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    trained = np.zeros(shape, bool)
    for step, pairs in enumerate(steps):
        remaining = iter(pairs)
        for row, count in enumerate(rows):
            of_row = [next(remaining) for _ in range(count)]
            segments_of_row = [
                (p["prompt_ids"], p[n]) for p in of_row for n in ("chosen_ids", "rejected_ids")
            ]
            start = 0
            for number, (prompt, answer) in enumerate(segments_of_row, 1):
                end = start + len(prompt) + len(answer)
                tokens[step, row, start:end] = prompt + answer
                trained[step, row, start + len(prompt) : end] = True
                segments[step, row, start:end] = number
                positions[step, row, start:end] = np.arange(end - start)
                start = end
    return Batch(tokens, trained, segments, positions)


@pytest.mark.parametrize("name", CASES)
def test_dpo_steps_equal_trl(name, models, steps, trl_runs):
    case, architecture = CASES[name], models.architecture
    expected, updated = trl_runs[case.optimizer]
    layout = make_layout(**case.mesh)
    config = StepConfig(layout=layout, micro_batches=case.micro_batches, chunk=16)
    count = 2 * max(case.rows)
    params, reference = (
        jax.device_put(weights, shardings(weights, layout)) for weights in models.ours
    )
    batch = pack_pairs(steps, case.rows)
    spec = OPTIMIZERS[case.optimizer]
    optimizer = build_optimizer(spec, STEPS)
    state = initial_state(architecture, params, optimizer, config)
    if case.live:
        state = replace(state, aux_params=reference)
    else:
        scored, tokens = segment_program(architecture, config, count)(reference, batch)
        batch = replace(batch, extras=scored)
        assert tokens.sum() == batch.trained.sum()
    objective = PairObjective(STAGE, count, Auxiliary(architecture, case.live))
    step = train_step(architecture, optimizer, learning_rate(spec, STEPS), config, objective)
    state, metrics = step(state, batch)

    np.testing.assert_allclose(metrics.loss, expected["loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(metrics.grad_norm, expected["grad_norm"], rtol=1e-4)
    for ours in METRICS:
        np.testing.assert_allclose(
            metrics.more[ours], expected[ours], rtol=1e-5, atol=1e-4, err_msg=ours
        )
    after = dict(tensors(jax.device_get(state.params), models.config))
    assert after.keys() == updated.keys()
    for tensor, array in after.items():
        np.testing.assert_allclose(array, updated[tensor], rtol=0, atol=1e-5, err_msg=tensor)


def test_dpo_steps_change_weights_and_clip_gradients(models, trl_runs):
    """Losses are away from saturation, gradients are clipped, weights move."""
    for name, (row, updated) in trl_runs.items():
        assert all(0.05 < loss < 3 for loss in row["loss"])
        assert all(0 < share < 1 for share in row["accuracy"])
        assert name == "sgd" or min(row["grad_norm"]) > 1.0
        for tensor, array in models.theirs[0].named_parameters():
            assert np.abs(updated[tensor] - array.detach().numpy()).max() > 1e-4, tensor
