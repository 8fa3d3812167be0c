"""Programs of every kind of stage, compiled for simulated and for absent devices."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.pipeline import tiny
from tunelang.compiler.layout.hardware import CHIPS, Devices, declared
from tunelang.compiler.layout.layout_query import DoesNotFitError, Judge, LayoutQuery
from tunelang.compiler.layout.stage_layout import StageLayout
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.search.layout_search import best_layout
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.policy_stages import Policy, Ppo
from tunelang.dsl.vocabulary.preference_stages import Kto, Preference, RewardModel
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Distill, Sft
from tunelang.dsl.vocabulary.training import K3, Axes, Critic, Lora, Sampling
from tunelang.runtime import sharding
from tunelang.runtime.rehearsal import collectives
from tunelang.runtime.rehearsal.rehearse import Rehearsed, measure, rehearse, remedies, unsplit
from tunelang.runtime.rehearsal.topologies import compilable
from tunelang.runtime.sharding import make_layout
from tunelang.runtime.stages.abstract_programs import AbstractProgram
from tunelang.runtime.stages.stage_kinds import kind_of

SMALL = Architecture(
    vocabulary=128, layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=64, context=64
)
COMMON: dict[str, Any] = {
    "optimizer": AdamW.unvalidated(lr=1e-4), "length": Measure.unvalidated(value=10, unit="steps"),
}  # fmt: skip
BATCH = Measure.unvalidated(value=8, unit="sequences")
ROLLOUT = Sampling.unvalidated(max_tokens=16, max_prompt=16)
CHIP = replace(CHIPS["h200"], name="simulated")
DEVICES = Devices(CHIP, 8, True)


def abstract_programs(stage, *arguments):
    """The programs of a stage, by its kind."""
    return kind_of(stage).abstract_programs(stage, *arguments)


def query(stage: Training, a: Architecture, dtype_bytes: int, devices: Devices) -> LayoutQuery:
    return LayoutQuery(stage=stage, architecture=a, dtype_bytes=dtype_bytes, devices=devices)


def lay_out(
    stage: Training, a: Architecture, dtype_bytes: int, devices: Devices, **more: Any
) -> StageLayout:
    return best_layout(replace(query(stage, a, dtype_bytes, devices), **more))


def compile_programs(
    stage: Training,
    a: Architecture = SMALL,
    mesh: dict[str, int] | None = None,
    branches: int = 1,
) -> dict[str, Any]:
    """Compile the programs of a stage for simulated devices; name -> report."""
    if mesh is not None:
        stage = stage.model_copy(update={"mesh": Axes.unvalidated(**mesh)})
    planned = lay_out(stage, a, 4, DEVICES, teacher=SMALL, branches=branches)
    layout = make_layout(**planned.mesh)
    shapes = Shapes(a, "f32", SMALL)
    by_name = {p.name: p for p in abstract_programs(stage, shapes, planned, layout)}
    return {name: measure(program, program.lower()) for name, program in by_name.items()}


SUPERVISED = [
    Sft.unvalidated(batch=BATCH, **COMMON),
    Preference.unvalidated(batch=BATCH, **COMMON),
    Preference.unvalidated(batch=BATCH, reference_log_probs="live", **COMMON),
    Kto.unvalidated(batch=BATCH, **COMMON),
    RewardModel.unvalidated(batch=BATCH, **COMMON),
    Distill.unvalidated(batch=BATCH, **COMMON),
    Distill.unvalidated(batch=BATCH, top_k=4, teacher_log_probs="ahead", **COMMON),
]


@pytest.mark.parametrize("stage", SUPERVISED, ids=lambda s: type(s).__name__)
def test_programs_of_supervised_stages_compile(stage: Training) -> None:
    reports = compile_programs(stage)
    ahead = isinstance(stage, Preference) and stage.reference_log_probs == "ahead"
    assert set(reports) == ({"train", "reference"} if ahead else {"train"})
    for report in reports.values():
        assert report.peak > 0
        assert not report.findings


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_planned_memory_equals_the_arguments_of_the_program(trained: str) -> None:
    a = replace(SMALL, width=128, mlp=1024, heads=8, kv_heads=4, head_dim=16)
    if trained == "adapters":
        a = adapted(a, (Lora.unvalidated(rank=8),), "bf16")
    pin = {"mesh": Axes.unvalidated(fsdp=4, tensor=2)}
    planned = lay_out(Sft.unvalidated(batch=BATCH, **COMMON, **pin), a, 2, DEVICES)
    layout = make_layout(**planned.mesh)
    program = next(
        iter(
            abstract_programs(
                Sft.unvalidated(batch=BATCH, **COMMON), Shapes(a, "bf16"), planned, layout
            )
        )
    )
    memory = program.lower().compile().memory_analysis()
    assert memory is not None
    said = planned.memory["parameters"] + planned.memory["optimizer"]
    assert memory.argument_size_in_bytes == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize(
    "stage",
    [
        SUPERVISED[0],
        SUPERVISED[1],
        Policy.unvalidated(
            batch=8,
            group=2,
            rollout=ROLLOUT,
            minibatches=2,
            kl=K3.unvalidated(coefficient=0.1),
            **COMMON,
        ),
    ],
    ids=lambda s: type(s).__name__,
)
def test_compiler_options_reach_every_program(
    stage: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "OPTIONS", {"cpu": {"xla_no_such_option": True}})
    planned = lay_out(stage, SMALL, 4, DEVICES)
    layout = make_layout(**planned.mesh)
    compiled = list(abstract_programs(stage, Shapes(SMALL, "f32", SMALL), planned, layout))
    assert compiled
    for program in compiled:
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            program.lower().compile()


def test_only_the_gradient_of_the_head_is_summed_unsplit() -> None:
    """Embeddings that are looked up are exchanged, not the table."""
    large = replace(SMALL, vocabulary=4096)
    table = 4 * large.vocabulary * large.width
    exchanged = compile_programs(SUPERVISED[0], large, {"data": 2, "fsdp": 4})["train"].exchanged
    assert exchanged["all-gather"][1] < 1.5 * table
    assert exchanged["all-reduce"][1] < 1.5 * table
    assert exchanged["all-to-all"][1] < 0.1 * table


@pytest.mark.parametrize("stage", [SUPERVISED[0], SUPERVISED[2]], ids=lambda s: type(s).__name__)
def test_branches_gather_frozen_weights_once(stage: Training) -> None:
    adapter = adapted(replace(SMALL, width=64, mlp=256), (Lora.unvalidated(rank=1),), "f32")
    one, three = (
        compile_programs(stage, adapter, {"fsdp": 4}, branches)["train"] for branches in (1, 3)
    )
    assert not three.findings
    gathered, together = one.exchanged["all-gather"][1], three.exchanged["all-gather"][1]
    assert gathered < together < 1.3 * gathered


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            Policy.unvalidated(batch=8, group=2, rollout=ROLLOUT, **COMMON),
            {"train", "prefill", "decode"},
        ),
        (
            Policy.unvalidated(
                batch=8,
                group=2,
                rollout=ROLLOUT,
                minibatches=2,
                kl=K3.unvalidated(coefficient=0.1),
                **COMMON,
            ),
            {"train", "score", "prefill", "decode"},
        ),
        (
            Ppo.unvalidated(batch=8, rollout=ROLLOUT, passes=1, minibatches=1, **COMMON),
            {"train", "prefill", "decode"},
        ),
        (
            Ppo.unvalidated(
                batch=8, rollout=ROLLOUT, critic=Critic.unvalidated(trunk="shared"), **COMMON
            ),
            {"train", "score", "prefill", "decode"},
        ),
    ],
)
def test_programs_of_policy_stages_compile(stage: Training, expected: set[str]) -> None:
    reports = compile_programs(stage)
    assert set(reports) == expected
    for report in reports.values():
        assert report.peak > 0
        assert not report.findings


def test_judges_are_compiled_and_counted() -> None:
    stage = Policy.unvalidated(batch=8, group=2, rollout=ROLLOUT, **COMMON)
    judges = Judge(SMALL, 4, speaks=True), Judge(replace(SMALL, scores=True), 4, speaks=False)
    planned = lay_out(stage, SMALL, 4, DEVICES, judges=judges)
    layout = make_layout(**planned.mesh)
    compiled = {
        p.name: p
        for p in abstract_programs(stage, Shapes(SMALL, "f32", None, judges), planned, layout)
    }
    assert set(compiled) == {"train", "judge 1 prefill", "judge 1 decode", "judge 2"} | {
        "prefill", "decode",
    }  # fmt: skip
    for name in ("judge 1 decode", "judge 2"):
        # With the whole state of the stage, and the other judge.
        stage_bytes = compiled["train"].donated + planned.memory["judges"] // 4
        assert compiled[name].resident_bytes > stage_bytes
        assert measure(compiled[name], compiled[name].lower()).peak > 0


def test_adapter_needs_less_memory(tmp_path: Path) -> None:
    full = compile_programs(Sft.unvalidated(batch=BATCH, **COMMON), mesh={"fsdp": 8})["train"]
    lora = adapted(SMALL, (Lora.unvalidated(rank=2),), "f32")
    assert (
        compile_programs(Sft.unvalidated(batch=BATCH, **COMMON), lora, {"fsdp": 8})["train"].peak
        < full.peak
    )


def test_collectives_are_counted() -> None:
    stage = Sft.unvalidated(batch=BATCH, packing=False, **COMMON)
    alone = compile_programs(stage, mesh={})["train"]
    assert not alone.exchanged
    copies = compile_programs(stage, mesh={"data": 8})["train"].exchanged
    # Gradients are summed over the copies: each once, and that of the table, which is the head
    # too, once for either.
    numbers = parameter_count(SMALL) + SMALL.vocabulary * SMALL.width
    assert copies["all-reduce"][1] == pytest.approx(4 * numbers, rel=0.01)


def test_collectives_in_loops_count_once_an_iteration() -> None:
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = f32[8,4]{1,0} all-gather(%x), dimensions={0}
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %g)
}

ENTRY %main (p: f32[2,4]) -> f32[8,4] {
  %r = f32[16]{0} all-reduce(%p), to_apply=%add
  %w = (s32[]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %o = f32[8,4] get-tuple-element(%w), index=1
}
"""
    assert collectives.count_collectives(text) == {"all-reduce": (1, 64), "all-gather": (5, 640)}


@pytest.mark.parametrize("count", ["s32", "u32"])
def test_trip_count_of_tpu_loops_is_read_from_the_condition(count: str) -> None:
    text = """HloModule m
%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %k = f32[2,4]{1,0:T(8,128)} custom-call(%x), kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="attention"}
  %g = f32[8,4]{1,0:T(8,128)} all-gather(%k), dimensions={0}
  ROOT %t = (s32[]{:T(128)}, f32[8,4]) tuple(%i, %g)
}

%until.2 (p: (s32[], f32[8,4])) -> pred[] {
  %constant.7.clone = s32[]{:T(128)} constant(18), metadata={stack_frame_id=59}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.56 = pred[]{:T(512)} compare(%i, %constant.7.clone), direction=LT
}

ENTRY %main (p: f32[2,4]) -> f32[8,4] {
  %w = (s32[]{:T(128)}, f32[8,4]) while(%t), condition=%until.2, body=%body.1
  ROOT %o = f32[8,4]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
    text = text.replace("s32", count)
    assert collectives.count_collectives(text) == {"all-gather": (18, 18 * 128)}


def test_state_that_is_not_donated_is_reported() -> None:
    shapes = jax.ShapeDtypeStruct((1024, 1024), "float32")
    program = AbstractProgram(
        "p", lambda: jax.jit(lambda a: a + 1).lower(shapes), donated=4 * 2**20
    )
    copied = measure(program, program.lower())
    assert "not donated" in copied.findings[0]
    donated = measure(program, jax.jit(lambda a: a + 1, donate_argnums=0).lower(shapes))
    assert not donated.findings


def test_needless_gathers_are_reported() -> None:
    """Each program makes one mistake; the tests above show that the real programs make none."""
    layout = make_layout(fsdp=8)
    a = replace(SMALL, vocabulary=256, width=64)

    def shaped(*axes: str | None, shape: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout.sharding(axes, shape))

    hidden = shaped("batch", None, None, None, shape=(8, 4, 32, 64))
    head = shaped(None, "embed", shape=(256, 64))
    layers = shaped(None, "embed", None, shape=(2, 64, 64))

    def chunks(hidden: Any, head: Any) -> Any:
        def body(head: Any, part: Any) -> tuple[Any, Any]:  # it changes, so that it must be
            gathered = layout.constrain(jnp.cos(head), (None, "embed"))
            return gathered, jnp.sum(part @ layout.constrain(gathered, (None, None)).T)

        return jax.lax.scan(body, head, hidden.swapaxes(0, 1))[1]

    def logits(hidden: Any, head: Any) -> Any:
        findings = hidden.reshape(8, 128, 64) @ layout.constrain(head, (None, None)).T
        return layout.constrain(jnp.sin(findings), (None, None, None))

    def stacked(hidden: Any, layers: Any) -> Any:
        return jnp.einsum("bcsd,lde->lbcse", hidden, layout.constrain(layers, (None, None, None)))

    for function, argument, said in (
        (chunks, head, "the head is gathered in each turn of a loop"),
        (logits, head, "logits are gathered whole"),
        (stacked, layers, "the weights of all layers are gathered at once"),
    ):
        text = jax.jit(function).lower(hidden, argument).compile().as_text() or ""
        findings = list(collectives.needless_gathers(text, a, 1))
        assert len(findings) == 1, (said, findings)
        assert findings[0].startswith(said)


def test_programs_of_evaluations_are_rehearsed_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.workspace(tmp_path)
    spec.write_text(
        spec.read_text()
        + """

stage tries : sample { from = baseline, data = sums, samples = 4
  rollout = sampling(max_tokens = 4) }
stage compared : evaluate { models = [base, baseline], evals = [accuracy, likeliest, fluency] }
eval likeliest : generate { data = sums, beams = 2, max_tokens = 4, score = correct }
"""
    )
    prepared, store = tiny.plan(spec)
    cache = store.root / "cache"
    names = {
        node: [report.name for report in rehearse(prepared, node, cache)]
        for node in ("baseline", "tries", "compared")
    }
    assert names == {
        "baseline": ["train", "accuracy prefill", "accuracy decode", "fluency"],
        "tries": ["prefill", "decode"],
        "compared": ["accuracy prefill", "accuracy decode", "likeliest search", "fluency"],
    }
    cached = list(cache.glob("rehearsal-*"))
    list(rehearse(prepared, "tries", cache))
    assert len(list(cache.glob("rehearsal-*"))) == len(cached)
    monkeypatch.setattr(
        "tunelang.runtime.rehearsal.rehearse.OPTIONS", {"cpu": {"xla_an_option": 1}}
    )
    list(rehearse(prepared, "tries", cache))
    assert len(list(cache.glob("rehearsal-*"))) == len(cached) + 2


def refused(stage: Training, devices: Devices, peak: int, cache: Path) -> list[str]:
    """Remedies for a stage whose program takes `peak` bytes."""
    planned = lay_out(stage, SMALL, 4, replace(devices, chip=replace(devices.chip, memory=2**30)))
    prepared: Any = SimpleNamespace(
        graph=SimpleNamespace(nodes={"s": SimpleNamespace(value=stage)}),
        shapes={"s": Shapes(SMALL, "f32", None)},
        queries={"s": query(stage, SMALL, 4, devices)},
        devices={"s": devices},
        program=SimpleNamespace(folder=cache),
        layout=lambda node: planned,
    )
    return list(remedies(prepared, "s", Rehearsed("train", peak, 0.0), cache))


def test_remedy_of_a_refused_program_is_compiled(tmp_path: Path) -> None:
    stage = Sft.unvalidated(batch=Measure.unvalidated(value=64, unit="sequences"), **COMMON)
    planned = lay_out(stage, SMALL, 4, DEVICES).total
    devices = replace(DEVICES, chip=replace(CHIP, memory=2 * planned))
    (said,) = refused(stage, devices, 3 * planned, tmp_path)
    assert said.startswith("`mesh = axes(")
    assert said.endswith(", as the compiler says")


def test_remedies_change_the_stage_if_no_layout_fits(tmp_path: Path) -> None:
    stage = Sft.unvalidated(batch=Measure.unvalidated(value=64, unit="sequences"), **COMMON)
    none = Devices(replace(CHIPS["h200"], memory=1), 8, False)
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage, SMALL, 4, none)
    smallest = caught.value.nearest.total
    devices = replace(none, chip=replace(none.chip, memory=int(1.15 * smallest)))
    said = refused(stage, devices, smallest + devices.chip.memory, tmp_path)
    assert any(report.startswith("16 × h200: ") for report in said)
    assert all(report.endswith(", by the estimate") for report in said)


def test_axes_that_do_not_divide_are_reported() -> None:
    said = unsplit(SMALL, make_layout(fsdp=1, tensor=4))
    assert said == ["`kv_heads` of 2 is copied: 4 do not divide it"]
    assert unsplit(SMALL, make_layout(fsdp=4, tensor=2)) == []


def plan(architecture: Architecture, devices: Devices, **more: Any) -> tuple[Training, StageLayout]:
    stage = Sft.unvalidated(
        batch=Measure.unvalidated(value=16, unit="sequences"), **{**COMMON, **more}
    )
    return stage, lay_out(stage, architecture, 2, devices)


BIGGER = Architecture(
    vocabulary=512, layers=2, width=256, heads=4, kv_heads=4, head_dim=64, mlp=512, context=256
)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:4x4"])
def test_programs_compile_for_absent_tpus(topology: str) -> None:
    devices = declared(models.Tpu.unvalidated(topology=topology, slices=1, price=None))
    assert devices is not None
    stage, planned = plan(BIGGER, devices)
    layout = make_layout(**planned.mesh, devices=compilable(devices))
    program = next(iter(abstract_programs(stage, Shapes(BIGGER, "bf16"), planned, layout)))
    said = measure(program, program.lower())
    assert 0 < said.peak < devices.chip.memory


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_program_that_does_not_fit_is_refused_by_the_compiler() -> None:
    devices = Devices(CHIPS["v5e"], 4, False, (2, 2))
    a = replace(BIGGER, layers=64, width=4096, mlp=16_384, heads=32, kv_heads=32, head_dim=128)
    stage = Sft.unvalidated(batch=Measure.unvalidated(value=16, unit="sequences"), **COMMON)
    planned = StageLayout(
        mesh={"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}, rows=16, length=256,
        micro_batches=1, remat="none", slots=None, kernel="splash",
    )  # fmt: skip
    layout = make_layout(**planned.mesh, devices=compilable(devices))
    program = next(iter(abstract_programs(stage, Shapes(a, "bf16"), planned, layout)))
    said = measure(program, program.lower())
    assert "RESOURCE_EXHAUSTED" in said.refused
    assert said.peak > devices.chip.memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "plug_in"),
    [
        (Devices(CHIPS["h200"], 1, False), "jax_cuda13_plugin"),
        (Devices(CHIPS["v5e"], 4, False, (2, 2)), "libtpu"),
    ],
    ids=["gpu", "tpu"],
)
def test_memory_of_the_host_does_not_count(devices: Devices, plug_in: str) -> None:
    if importlib.util.find_spec(plug_in) is None:
        pytest.skip(f"{plug_in} is not installed")
    a = replace(BIGGER, layers=8, width=512, mlp=2048, head_dim=128)
    peaks = {}
    for where in ("none", "optimizer"):
        pin = {"offload": where, "mesh": Axes.unvalidated(fsdp=devices.count)}
        stage, planned = plan(a, devices, **pin)
        layout = make_layout(**planned.mesh, devices=compilable(devices))
        program = next(iter(abstract_programs(stage, Shapes(a, "bf16"), planned, layout)))
        peaks[where] = measure(program, program.lower()).peak
        assert peaks[where] == pytest.approx(planned.total, rel=0.5)
    saved = peaks["none"] - peaks["optimizer"]
    assert saved > 0.6 * 8 * parameter_count(a) / devices.count


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_matrices_are_gathered_ahead_of_their_products() -> None:
    devices = Devices(CHIPS["v6e"], 8, False, (2, 4))
    a = adapted(replace(BIGGER, width=1024, mlp=4096, context=1024), (Lora.unvalidated(),), "bf16")
    pin = {"mesh": Axes.unvalidated(fsdp=8), "remat": "full"}
    stage = Sft.unvalidated(batch=Measure.unvalidated(value=16, unit="sequences"), **COMMON, **pin)
    planned = lay_out(stage, a, 2, devices)
    layout = make_layout(**planned.mesh, devices=compilable(devices))
    program = next(iter(abstract_programs(stage, Shapes(a, "bf16"), planned, layout)))
    exchanged = measure(program, program.lower()).exchanged
    assert "all-gather" in exchanged
    assert "collective-permute" not in exchanged


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_frozen_weights_are_tiled_for_one_pass_at_a_time() -> None:
    devices = Devices(CHIPS["tpu7x"], 8, False, (2, 2, 1))
    a = replace(BIGGER, layers=16, width=2048, mlp=8192, heads=16, kv_heads=16, head_dim=128)
    a = adapted(a, (Lora.unvalidated(),), "bf16")
    pin = {"mesh": Axes.unvalidated(fsdp=2, tensor=4), "remat": "full"}
    stage = Sft.unvalidated(batch=Measure.unvalidated(value=2, unit="sequences"), **COMMON, **pin)
    planned = lay_out(stage, a, 2, devices)
    layout = make_layout(**planned.mesh, devices=compilable(devices))
    program = next(iter(abstract_programs(stage, Shapes(a, "bf16"), planned, layout)))
    # Itself, and a copy; with those of both passes it is 2.8.
    assert measure(program, program.lower()).peak < 2.4 * planned.memory["parameters"]
