"""`docs/adding-a-stage.md` does what it says: its two files are a kind that plans and learns."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.pipeline import tiny
from tunelang.dsl.vocabulary import supervised_stages, tables
from tunelang.dsl.vocabulary.base import KindInfo, NonNegative, doc_of
from tunelang.runtime.rehearsal.rehearse import rehearse
from tunelang.runtime.stages import stage_kinds

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-stage.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
VOCABULARY, RUNTIME = (text for language, text in BLOCKS if language == "python")
(SPEC,) = (text for language, text in BLOCKS if language == "text")


@pytest.fixture(scope="module")
def kind() -> Iterator[None]:
    """The page's two files, entered where the packages would find them."""
    stage_kinds.kind_of(tables.KINDS["stage"]["sft"].model.unvalidated())  # imports the other kinds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised_stages, "NonNegative", NonNegative, raising=False)
        exec(VOCABULARY, vars(supervised_stages))
        model = supervised_stages.Focal
        patch.setattr(model, "__module__", supervised_stages.__name__)
        info = KindInfo("stage", model.semantics[0], model, doc_of(model))
        patch.setitem(tables.KINDS["stage"], info.word, info)
        module = ModuleType("tunelang.runtime.stages.focal")
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(RUNTIME, "focal.py", "exec"), vars(module))
        yield
        stage_kinds._KINDS.pop(model)
        del supervised_stages.Focal


@pytest.fixture(scope="module")
def spec(kind: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("focal")
    path = tiny.workspace(folder)
    stage = SPEC[SPEC.index("stage ") :].replace(
        "gamma = 1", "gamma = 1, log_every = 1 step, optimizer = adamw(lr = 1e-2)"
    )
    path.write_text(tiny.SPEC + "\n" + stage)
    return path


def test_new_kind_is_found_by_its_word(kind: None) -> None:
    assert tables.KINDS["stage"]["focal"].model is supervised_stages.Focal
    assert type(stage_kinds.kind_of(supervised_stages.Focal.unvalidated())).__name__ == "FocalKind"


def test_new_kind_is_planned_and_rehearsed(spec: Path, tmp_path: Path) -> None:
    prepared, _ = tiny.plan(spec, until=["tuned"])
    assert prepared.layout("tuned").total > 0
    train = next(rehearse(prepared, "tuned", tmp_path))
    assert train.name == "train"
    assert train.peak > 0


def test_new_kind_lowers_the_loss(spec: Path) -> None:
    tiny.run(spec, until=["tuned"])
    prepared, store = tiny.plan(spec, until=["tuned"])
    rows = store.folder(prepared.plan.by_node["tuned"].digest).metrics().rows
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0]
    assert all(0 < row["surprise"] < 1 for row in rows)
    assert math.isfinite(np.sum(losses))
