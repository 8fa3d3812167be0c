"""Costs of kinds of stages: the passes, sequences and memory that a step of each kind takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunelang.compiler.costs.exchanges import Times
from tunelang.compiler.costs.stage_costs import cost_of
from tunelang.compiler.layout.hardware import CHIPS, Devices
from tunelang.compiler.layout.layout_query import LayoutQuery
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.presets import PRESETS
from tunelang.compiler.search.layout_search import best_layout
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW, Optimizer
from tunelang.dsl.vocabulary.preference_stages import Kto, Preference
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Supervised
from tunelang.dsl.vocabulary.tables import STAGES
from tunelang.dsl.vocabulary.training import Axes

PAIRS = frozenset({"prompt", "chosen", "rejected"})
LABELLED = frozenset({"prompt", "response", "label"})
MODEL = replace(PRESETS["llama-3.2-1b"], context=2048)


def stage(kind: type[Supervised]) -> Supervised:
    return kind.unvalidated(
        batch=Measure.unvalidated(value=32, unit="sequences"),
        optimizer=AdamW.unvalidated(lr=1e-6),
        mesh=Axes.unvalidated(fsdp=8),
        micro_batch=4,
        remat="dots",
    )


def planned(kind: type[Supervised], roles: frozenset[str], branches: int = 1) -> StageLayout:
    devices = Devices(CHIPS["v5p"], 8, False)
    return best_layout(
        LayoutQuery(
            stage=stage(kind),
            architecture=MODEL,
            dtype_bytes=2,
            devices=devices,
            roles=roles,
            branches=branches,
        )
    )


def computing(layout: StageLayout) -> float:
    times: Times = layout.times
    return times["computing"]


def test_kto_pays_for_the_forward_passes_over_mismatched_answers() -> None:
    """DPO's reference runs once; in KTO it runs twice, and the policy once more."""
    dpo, kto = computing(planned(Preference, PAIRS)), computing(planned(Kto, PAIRS))
    # An update with `dots` is worth 3.2 forward passes.
    assert kto / dpo == pytest.approx((3.2 + 3) / (3.2 + 1))


def test_branches_of_a_kto_sweep_share_the_passes_of_the_reference() -> None:
    alone, together = computing(planned(Kto, PAIRS)), computing(planned(Kto, PAIRS, branches=3))
    assert together / alone == pytest.approx((3 * (3.2 + 1) + 2) / (3.2 + 1 + 2))


@pytest.mark.parametrize(
    ("kind", "roles", "answers"),
    [
        (Kto, LABELLED, 1),
        (Kto, frozenset({"messages", "response", "label"}), 1),
        (Kto, PAIRS, 2),
        (Preference, PAIRS, 2),
        (STAGES["reward_model"], PAIRS, 2),
        (STAGES["sft"], PAIRS | LABELLED, 1),
        (STAGES["distill"], frozenset({"messages"}), 1),
    ],
)
def test_sequence_has_both_answers_of_a_pair_and_one_of_labelled_data(
    kind: type[Supervised], roles: frozenset[str], answers: int
) -> None:
    assert planned(kind, roles).length == answers * MODEL.context


@pytest.mark.parametrize("kind", [k for k in STAGES.values() if issubclass(k, Training)])
def test_every_training_stage_has_a_cost(kind: type[Training]) -> None:
    assert cost_of(kind.unvalidated()).stage


@pytest.mark.parametrize("optimizer", Optimizer.__subclasses__())
def test_every_optimizer_declares_its_number_of_moments(optimizer: type[Optimizer]) -> None:
    assert optimizer.moments in (0, 1, 2)
