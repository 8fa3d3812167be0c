"""Layouts: legal, fitting, pinned, and the best of what there is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.workspace import folder, program
from tunelang.compiler.layout.hardware import CHIPS, Devices, chip_of, declared, named
from tunelang.compiler.layout.layout_query import (
    DoesNotFitError,
    Judge,
    LayoutQuery,
    NoLayoutError,
)
from tunelang.compiler.layout.layout_search import MARGIN, rank_layouts
from tunelang.compiler.layout.remedies import remedies
from tunelang.compiler.layout.stage_layout import StageLayout, shards_of
from tunelang.compiler.models.adapters import adapted
from tunelang.compiler.models.architecture import Architecture, Mixture
from tunelang.compiler.models.parameter_counts import parameter_count
from tunelang.compiler.models.presets import PRESETS
from tunelang.dsl.vocabulary.base import Measure
from tunelang.dsl.vocabulary.optimizer_kinds import AdamW
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Training
from tunelang.dsl.vocabulary.supervised_stages import Sft
from tunelang.dsl.vocabulary.training import Axes, Lora, Sampling

__all__ = ["folder"]

LLAMA = replace(PRESETS["llama-3.1-8b"], context=4096)


def query(stage: Training, a: Architecture, dtype_bytes: int, devices: Devices) -> LayoutQuery:
    return LayoutQuery(stage=stage, architecture=a, dtype_bytes=dtype_bytes, devices=devices)


def lay_out(
    stage: Training, a: Architecture, dtype_bytes: int, devices: Devices, **more: Any
) -> StageLayout:
    return rank_layouts(replace(query(stage, a, dtype_bytes, devices), **more))[0]


def stage(folder: Path, more: str = "", batch: str = "batch = 64 sequences") -> Training:
    text = f"""\
model g : pretrained {{ path = "models/tiny" }}
data d : jsonl {{ path = "data/sums.jsonl", prompt = "{{question}}", response = "{{answer}}" }}
stage s : sft {{ from = g, data = d, length = 1 epoch, {batch}{", " + more if more else ""} }}
"""
    value = program(text, folder).declarations["s"].branches[0].value
    assert isinstance(value, Training)
    return value


def policy(folder: Path, more: str = "", kind: str = "grpo") -> Training:
    text = f"""\
model g : pretrained {{ path = "models/tiny" }}
data d : jsonl {{ path = "data/sums.jsonl", prompt = "{{question}}", response = "{{answer}}" }}
stage s : {kind} {{ from = g, data = d, length = 1 epoch, batch = 32 prompts, group = 8, reward = exact("{{completion}}", "{{response}}"){", " + more if more else ""} }}
"""
    value = program(text, folder).declarations["s"].branches[0].value
    assert isinstance(value, Training)
    return value


@pytest.mark.parametrize("chip", sorted(CHIPS))
@pytest.mark.parametrize("count", [8, 16, 64])
def test_every_layout_is_legal(folder: Path, chip: str, count: int) -> None:
    devices = Devices(CHIPS[chip], count, False)
    if count * CHIPS[chip].memory < 9 * 8.1e9:  # parameters and gradients alone
        with pytest.raises(DoesNotFitError):
            lay_out(stage(folder), LLAMA, 2, devices)
        return
    layout = lay_out(stage(folder), LLAMA, 2, devices)
    assert count % math.prod(layout.mesh.values()) == 0
    shards = layout.mesh["data"] * layout.mesh["fsdp"]
    assert layout.rows % (shards * layout.micro_batches) == 0
    assert LLAMA.heads % layout.mesh["tensor"] == 0
    assert layout.total <= CHIPS[chip].memory
    assert layout.seconds > 0


MODELS = [
    replace(PRESETS["llama-3.2-1b"], context=2048),
    replace(PRESETS["gemma-2b"], context=1024),
    replace(PRESETS["gemma-3-1b"], context=4096),
    replace(LLAMA, context=65_536),
    replace(PRESETS["qwen3-0.6b"], experts=Mixture(count=8, active=2, width=768), context=1024),
]


@settings(max_examples=80, deadline=None)
@given(
    at=st.integers(0, len(MODELS) - 1),
    form=st.sampled_from(["full", "lora", "qlora"]),
    chip=st.sampled_from(sorted(CHIPS)),
    count=st.sampled_from([1, 2, 4, 8, 16, 64]),
    rows=st.sampled_from([1, 2, 6, 8, 32, 96]),
    policy=st.booleans(),
)
def test_properties(at: int, form: str, chip: str, count: int, rows: int, policy: bool) -> None:
    a = MODELS[at]
    if form != "full":
        lora = Lora.unvalidated(targets=("attention",))
        a = adapted(a, (lora,), "nf4" if form == "qlora" else "bf16")
    optimizer = AdamW.unvalidated(lr=1e-4)
    made: Training = (
        Policy.unvalidated(
            batch=rows, group=4, rollout=Sampling.unvalidated(max_tokens=256), optimizer=optimizer
        )
        if policy
        else Sft.unvalidated(
            batch=Measure.unvalidated(value=rows, unit="sequences"), optimizer=optimizer
        )
    )
    there = Devices(CHIPS[chip], count, False)
    try:
        best, *others = rank_layouts(query(made, a, 2, there))
    except DoesNotFitError:
        return
    experts = 1 if a.experts is None else a.experts.count
    for each in (best, *others):
        mesh = each.mesh
        assert count % math.prod(mesh.values()) == 0
        assert each.rows % (shards_of(mesh) * each.micro_batches) == 0
        assert a.heads % mesh["tensor"] == a.mlp % mesh["tensor"] == 0
        assert experts % mesh["expert"] == 0
        assert each.length % mesh["context"] == 0
        assert each.kernel != "splash" or each.length // mesh["context"] % 128 == 0
        assert each.total <= MARGIN * there.chip.memory
        assert best.seconds <= each.seconds * (1 + 1e-5)
    # Pinning what was chosen changes nothing.
    local = best.rows // shards_of(best.mesh) // best.micro_batches
    pins = {"mesh": Axes.unvalidated(**best.mesh), "micro_batch": local, "remat": best.remat}
    pinned = made.model_copy(update=pins)
    assert rank_layouts(query(pinned, a, 2, there)) == [best]
    # More devices are never slower.
    more = lay_out(made, a, 2, replace(there, count=2 * count))
    assert more.seconds <= best.seconds * (1 + 1e-5)


def test_more_devices_are_never_slower(folder: Path) -> None:
    times = [
        lay_out(stage(folder), LLAMA, 2, Devices(CHIPS["v5p"], count, False)).seconds
        for count in (4, 8, 16, 32, 64)
    ]
    assert times == sorted(times, reverse=True)


def test_pinning_what_was_chosen_changes_nothing(folder: Path) -> None:
    devices = Devices(CHIPS["h200"], 8, False)
    free = lay_out(stage(folder), LLAMA, 2, devices)
    axes = ", ".join(f"{axis} = {size}" for axis, size in free.mesh.items())
    local = free.rows // (free.mesh["data"] * free.mesh["fsdp"]) // free.micro_batches
    pins = f"mesh = axes({axes}), micro_batch = {local} sequences, remat = {free.remat}"
    assert lay_out(stage(folder, pins), LLAMA, 2, devices) == free


def test_long_sequences_are_split_where_the_batch_cannot_be(folder: Path) -> None:
    long = replace(LLAMA, context=131_072)
    devices = Devices(CHIPS["v5p"], 16, False)
    few = lay_out(stage(folder, batch="batch = 2 sequences"), long, 2, devices)
    assert few.mesh["context"] > 1
    assert few.mesh["data"] * few.mesh["fsdp"] <= 2
    assert lay_out(stage(folder), LLAMA, 2, devices).mesh["context"] == 1
    # It is better than to split all else.
    pinned = "mesh = axes(fsdp = 2, tensor = 8)"
    other = lay_out(stage(folder, pinned, "batch = 2 sequences"), long, 2, devices)
    assert few.seconds < other.seconds


def test_what_is_not_split_along_sequences(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    pin = "mesh = axes(data = 4, context = 2)"
    assert lay_out(stage(folder, pin), LLAMA, 2, devices).mesh["context"] == 2
    mixture = replace(LLAMA, experts=Mixture(count=4, active=2, width=1024))
    for kind, model in ((stage(folder, pin), mixture), (policy(folder, pin), LLAMA)):
        with pytest.raises(NoLayoutError, match="is not for"):
            lay_out(kind, model, 2, devices)


def test_a_large_model_is_split(folder: Path) -> None:
    layout = lay_out(stage(folder), LLAMA, 2, Devices(CHIPS["v5e"], 64, False))
    assert layout.mesh["fsdp"] * layout.mesh["tensor"] >= 8


def test_what_does_not_fit_says_what_it_needs(folder: Path) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage(folder), LLAMA, 2, Devices(CHIPS["v5e"], 2, False))
    nearest = caught.value.nearest
    assert nearest.offload == ("optimizer",)
    assert nearest.memory["gradients"] == nearest.memory["parameters"]


def test_what_would_fit_is_computed_and_is_the_least_change(folder: Path) -> None:
    one = Devices(replace(CHIPS["a100"], memory=80 << 30), 1, False)
    asked = stage(folder, batch="batch = 16 sequences"), LLAMA, 2, one
    found = dict(remedies(query(*asked)))
    assert list(found) == [
        "`batch = 4 sequences`", "2 × a100", "`adapter = lora()`", "a context of 1024",
    ]  # fmt: skip
    assert all(size <= MARGIN * one.chip.memory for size in found.values())
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage(folder, batch="batch = 8 sequences"), *asked[1:])
    assert next(remedies(caught.value.query))[0] == "`batch = 4 sequences`"
    smaller = lay_out(stage(folder, batch="batch = 4 sequences"), *asked[1:])
    assert smaller.total == found["`batch = 4 sequences`"]


def test_what_the_spec_pins_may_be_what_does_not_fit(folder: Path) -> None:
    there = Devices(CHIPS["v5p"], 16, False)
    asked = stage(folder, "mesh = axes(data = 16)"), LLAMA, 2, there
    what, size = next(remedies(query(*asked)))
    assert what == "`mesh` left to the plan"
    assert size == lay_out(stage(folder), *asked[1:]).total


def test_branches_that_do_not_fit_together_may_fit_in_turn(folder: Path) -> None:
    there = Devices(CHIPS["v5p"], 4, False)
    with pytest.raises(DoesNotFitError) as caught:
        lay_out(stage(folder), LLAMA, 2, there, branches=16)
    assert [what for what, _ in remedies(caught.value.query)] == ["`sweep = in_turn`"]


@pytest.mark.parametrize(
    ("more", "attribute"),
    [
        ("mesh = axes(data = 16)", "mesh"),
        ("mesh = axes(context = 3)", "mesh"),
        ("micro_batch = 3 sequences", "micro_batch"),
    ],
)
def test_pins_that_contradict_are_named(folder: Path, more: str, attribute: str) -> None:
    text = stage(folder)
    try:
        text = stage(folder, more)
    except AssertionError:
        pytest.skip("the checker says so already")
    with pytest.raises(NoLayoutError) as caught:
        lay_out(text, LLAMA, 2, Devices(CHIPS["v5p"], 8, False))
    assert caught.value.attribute == attribute


def test_policies_have_slots_and_a_cache(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    layout = lay_out(policy(folder), LLAMA, 2, devices)
    assert layout.slots == 256
    assert layout.memory["kv cache"] > 0
    assert "reference" not in layout.memory
    assert "reference" in lay_out(policy(folder, "kl = k3(0.1)"), LLAMA, 2, devices).memory


def test_fewer_slots_where_there_is_little_room(folder: Path) -> None:
    long = replace(LLAMA, context=32_768)
    rollout = "rollout = sampling(max_tokens = 30_000, max_prompt = 2000)"
    devices = Devices(CHIPS["h200"], 8, False)
    few = lay_out(policy(folder, rollout), long, 2, devices)
    assert few.slots is not None
    assert few.slots < 256
    assert few.total <= MARGIN * devices.chip.memory
    pinned = lay_out(policy(folder, rollout + ", slots = 8"), long, 2, devices)
    assert pinned.slots == 8
    assert pinned.memory["kv cache"] <= few.memory["kv cache"]
    assert pinned.times["rollout"] > few.times["rollout"]


@pytest.mark.parametrize("speaks", [True, False])
def test_judges_take_memory_and_time(folder: Path, speaks: bool) -> None:
    devices, small = Devices(CHIPS["v5p"], 8, False), replace(LLAMA, layers=4)
    alone = lay_out(policy(folder), LLAMA, 2, devices)
    judged = lay_out(policy(folder), LLAMA, 2, devices, judges=(Judge(small, 2, speaks),))
    assert judged.memory["judges"] == 4 * parameter_count(small)
    assert judged.seconds == pytest.approx(alone.seconds + judged.times["judging"])
    both = (Judge(small, 2, speaks), Judge(small, 2, True))
    more = lay_out(policy(folder), LLAMA, 2, devices, judges=both)
    assert more.memory["judges"] == 2 * judged.memory["judges"]


@pytest.mark.parametrize("speaks", [True, False])
def test_a_judge_lies_over_all_devices(folder: Path, speaks: bool) -> None:
    large = Judge(PRESETS["llama-3.1-8b"], 2, speaks)
    few, many = (
        lay_out(policy(folder), LLAMA, 2, Devices(CHIPS["v5p"], count, False), judges=(large,))
        for count in (4, 8)
    )
    # In two parts, since whole it would take more than a quarter of a device.
    assert few.memory["judges"] == many.memory["judges"]
    assert few.memory["judges"] == pytest.approx(2 * parameter_count(large.architecture), rel=0.01)
    assert many.times["judging"] == pytest.approx(few.times["judging"] / 2, rel=0.05)


def test_the_vector_memory_of_tpus_takes_of_the_peak(folder: Path) -> None:
    with_it = CHIPS["v5e"]
    pinned = "remat = full, micro_batch = 1 sequences"
    small = replace(PRESETS["qwen3-0.6b"], context=2048)
    there, taken = (
        lay_out(stage(folder, pinned), small, 2, Devices(chip, 16, False)).memory
        for chip in (replace(with_it, vmem=0), with_it)
    )
    assert 0.2 * with_it.vmem < there["backward"] - taken["backward"] < 0.5 * with_it.vmem
    assert taken["loss"] < there["loss"]
    assert {**taken, "backward": 0, "loss": 0} == {**there, "backward": 0, "loss": 0}


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_xla_copies_what_is_frozen_in_two_bytes_on_7x(folder: Path, storage: Any) -> None:
    adapter = adapted(LLAMA, (Lora.unvalidated(rank=4),), storage)
    table = LLAMA.vocabulary * LLAMA.width
    tables = table * (1 if LLAMA.tied else 2)
    pinned = "remat = full, micro_batch = 1 sequences"
    plain, copying = (
        lay_out(stage(folder, pinned), adapter, 2, Devices(CHIPS[chip], 1, False)).memory
        for chip in ("v5p", "tpu7x")
    )
    # Heads of 128 have their tiles already.
    projected = LLAMA.layers * LLAMA.width * (LLAMA.heads + 2 * LLAMA.kv_heads) * LLAMA.head_dim
    blocks = parameter_count(LLAMA) - tables - projected
    count = 0 if storage == "nf4" else blocks
    copied = copying["copies of weights"] - plain["copies of weights"]
    assert copied == pytest.approx(2 * count, rel=0.02)
    # The adapters alone are cast.
    assert 0 < plain["copies of weights"] < parameter_count(LLAMA) / 100
    assert copying["loss"] - plain["loss"] == pytest.approx(2 * table, rel=0.02)


@pytest.mark.parametrize(
    ("model", "chip", "mesh", "rows", "length", "counted"),
    [
        ("llama-3.2-1b", "tpu7x", {"fsdp": 8}, 4, 2048, 11.0),
        ("gemma-3-1b", "v5p", {"fsdp": 2}, 2, 4096, 13.1),
        ("gemma-3-1b", "v5p", {"fsdp": 4, "tensor": 2}, 8, 4096, 33.11),
        ("qwen3-0.6b", "tpu7x", {"fsdp": 8}, 8, 2048, 21.0),
        ("qwen3-0.6b", "h200", {"fsdp": 4}, 4, 4096, 19.25),
        ("gemma-3-1b", "h200", {"fsdp": 8}, 4, 4096, 64.55),
    ],
)
def test_what_layers_keep_is_what_compiled_programs_hold(
    model: str, chip: str, mesh: dict[str, int], rows: int, length: int, counted: float
) -> None:
    """`counted`: GiB of the arrays by layers that XLA hands to the backward pass."""
    a = replace(PRESETS[model], context=length)
    devices = math.prod(mesh.values())
    batch = Measure.unvalidated(value=rows * mesh["fsdp"], unit="sequences")
    asked = Sft.unvalidated(
        batch=batch, micro_batch=rows, remat="none", mesh=Axes.unvalidated(**mesh),
        optimizer=AdamW.unvalidated(lr=1e-4),
    )  # fmt: skip
    there = Devices(CHIPS[chip], devices, False)
    planned = lay_out(asked, a, 2, there)
    assert planned.memory["activations"] / 2**30 == pytest.approx(counted, rel=0.025)


def test_a_critic_of_its_own_takes_as_much_again(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    apart, shared = (
        lay_out(policy(folder, f"critic = critic(trunk = {trunk})", "ppo"), LLAMA, 2, devices)
        for trunk in ("separate", "shared")
    )
    held = sum(apart.memory[name] for name in ("parameters", "optimizer", "gradients"))
    assert apart.memory["critic"] == pytest.approx(held, rel=0.2)
    assert "critic" not in shared.memory
    assert 1.5 < apart.flops / shared.flops < 2


def test_a_prompt_counts_once_for_its_group(folder: Path) -> None:
    """As many completions: of few prompts, they cost less than of many."""
    devices = Devices(CHIPS["v5p"], 1, False)
    rollout = "rollout = sampling(max_tokens = 64, max_prompt = 1024)"

    def laid_out(batch: int, group: int) -> float:
        text = policy(folder, rollout)
        text = text.model_copy(update={"batch": batch, "group": group})
        return lay_out(text, replace(LLAMA, layers=2), 2, devices).flops

    assert laid_out(32, 8) < 0.5 * laid_out(128, 2)


def test_groups_without_advantage_favour_micro_batches(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 1, False)
    small = replace(LLAMA, layers=2, width=256, mlp=512, vocabulary=1000, context=512)
    assert lay_out(policy(folder), small, 2, devices).micro_batches == 4
    assert lay_out(policy(folder, "refill = true"), small, 2, devices).micro_batches == 1


def test_small_batches_leave_devices_alone(folder: Path) -> None:
    tiny = Architecture(
        vocabulary=64, layers=2, width=16, heads=2, kv_heads=2, head_dim=8, mlp=32, context=32
    )
    layout = lay_out(
        stage(folder, batch="batch = 3 sequences"), tiny, 4, Devices(CHIPS["v5e"], 8, True)
    )
    assert layout.rows == 3
    assert layout.mesh["data"] * layout.mesh["fsdp"] in (1, 3)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v4", "v4"),
        ("TPU v5p", "v5p"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("cpu", None),
    ],
)
def test_chips_by_their_device_kind(kind: str, name: str | None) -> None:
    found = chip_of(kind)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("text", "count", "groups"),
    [("v5e:4x4", 16, 1), ("tpu7x:2x2x1", 8, 1), ("h200:8", 8, 1), ("a100:4x8", 32, 4)],
)
def test_hardware_in_a_few_words(text: str, count: int, groups: int) -> None:
    found = declared(named(text))
    assert found is not None
    assert (found.chip.name, found.count, found.groups) == (text.split(":")[0], count, groups)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e:3x3", "2x4, 4x4"),
        ("h200", "how many"),
        ("h200:0", "how many"),
        ("h200:8x", "how many"),
        ("pod", "h100"),
        ("local:2", "h100"),
    ],
)
def test_hardware_that_does_not_exist(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        named(text)
    assert declared(named("local")) is None


@pytest.mark.parametrize(
    ("chip", "dtype_bytes", "change", "kernel"),
    [
        ("v5p", 2, {}, "splash"),
        ("v5p", 2, {"context": 1000}, "xla"),
        ("h200", 2, {}, "cudnn"),
        ("h200", 4, {}, "xla"),
        ("h200", 2, {"attention_cap": 50.0}, "xla"),
        ("h200", 2, {"head_dim": 256}, "xla"),
    ],
)
def test_the_kernel_of_attention(
    folder: Path, chip: str, dtype_bytes: int, change: dict[str, Any], kernel: str
) -> None:
    devices = Devices(CHIPS[chip], 64, False)
    architecture = replace(LLAMA, **change)
    pinned = stage(folder, "remat = dots, micro_batch = 1 sequence, mesh = axes(fsdp = 64)")
    found = lay_out(pinned, architecture, dtype_bytes, devices)
    assert found.kernel == kernel
    asked = lay_out(pinned, architecture, dtype_bytes, devices, attention="xla")
    assert asked.kernel == "xla"
    assert asked.total >= found.total  # which holds the logits of attention
    if kernel == "xla":
        wrong = "splash" if chip == "v5p" else "cudnn"
        with pytest.raises(NoLayoutError, match=f"the kernel `{wrong}`"):
            lay_out(pinned, architecture, dtype_bytes, devices, attention=wrong)


def test_the_host_helps_where_nothing_else_does(folder: Path) -> None:
    one, two = (Devices(CHIPS["h200"], count, False) for count in (1, 2))
    assert not lay_out(stage(folder), LLAMA, 2, two).offload
    alone = lay_out(stage(folder), LLAMA, 2, one)
    assert alone.offload == ("optimizer",)
    assert "optimizer" not in alone.memory
    link = "bringing moments from the host, and back"
    assert alone.times[link] == pytest.approx(16 * parameter_count(LLAMA) / CHIPS["h200"].host)
    with pytest.raises(DoesNotFitError):
        lay_out(stage(folder, "offload = none"), LLAMA, 2, one)
    small = replace(CHIPS["h200"], name="cpu")  # its memory is that of the host
    with pytest.raises(DoesNotFitError):
        lay_out(stage(folder), LLAMA, 2, Devices(small, 1, True))


def test_a_reference_waits_at_the_host(folder: Path) -> None:
    devices = Devices(CHIPS["v5p"], 8, False)
    text = "kl = k3(0.1), offload = {}"
    layouts = {
        where: lay_out(policy(folder, text.format(where)), LLAMA, 2, devices)
        for where in ("none", "reference", "both")
    }
    assert layouts["both"].offload == ("optimizer", "reference")
    assert "reference" not in layouts["reference"].memory
    assert layouts["both"].total < layouts["reference"].total < layouts["none"].total
    for where in ("reference", "both"):
        with pytest.raises(NoLayoutError, match="no reference") as caught:
            lay_out(policy(folder, f"offload = {where}"), LLAMA, 2, devices)
        assert caught.value.attribute == "offload"
    lora = adapted(LLAMA, (Lora(),), "bf16")
    pinned = lay_out(stage(folder, "offload = optimizer"), lora, 2, devices)
    assert pinned.offload == ("optimizer",)  # as the spec says, however little it is


def test_branches_in_one_program_share_what_is_frozen(folder: Path) -> None:
    """What they gather of it, too, which takes most of the time of a few tokens."""
    devices = Devices(CHIPS["v5e"], 64, False, (8, 8))
    few = stage(folder, "mesh = axes(fsdp = 64)")
    lora = adapted(replace(LLAMA, context=256), (Lora.unvalidated(rank=2),), "bf16")
    alone, together = (lay_out(few, lora, 2, devices, branches=count) for count in (1, 4))
    gathering = "gathering parameters over `fsdp`"
    assert alone.times[gathering] > alone.times["computing"]
    assert together.times[gathering] < 1.1 * alone.times[gathering]
    assert together.times["computing"] == pytest.approx(4 * alone.times["computing"])
    assert together.seconds < 0.6 * 4 * alone.seconds
    assert together.memory["optimizer"] == pytest.approx(4 * alone.memory["optimizer"], rel=1e-6)
    assert together.memory["parameters"] < 1.2 * alone.memory["parameters"]
    full = [lay_out(few, replace(LLAMA, context=256), 2, devices, branches=n) for n in (1, 2)]
    assert full[1].memory["parameters"] == pytest.approx(2 * full[0].memory["parameters"])
    assert full[1].seconds == pytest.approx(2 * full[0].seconds, rel=0.05)


def test_adapters_take_less(folder: Path) -> None:
    devices = Devices(CHIPS["h200"], 8, False)
    pinned = stage(folder, "mesh = axes(fsdp = 8)")
    sizes = {
        storage: lay_out(pinned, adapted(LLAMA, (Lora(),), storage), 2, devices)
        for storage in ("bf16", "nf4")
    }
    full = lay_out(pinned, LLAMA, 2, devices)
    assert sizes["nf4"].memory["parameters"] < sizes["bf16"].memory["parameters"]
    assert sizes["bf16"].memory["optimizer"] < full.memory["optimizer"] / 30
    assert sizes["bf16"].flops < full.flops


def test_experts_are_split(folder: Path) -> None:
    mixture = Mixture(count=64, active=8, width=768)
    architecture = replace(LLAMA, experts=mixture, layers=16)
    devices = Devices(CHIPS["h200"], 8, False)
    pinned = lay_out(stage(folder, "mesh = axes(expert = 8)"), architecture, 2, devices)
    assert pinned.mesh["expert"] == 8
    with pytest.raises(NoLayoutError, match="do not divide the 1 experts"):
        lay_out(stage(folder, "mesh = axes(expert = 8)"), LLAMA, 2, devices)
