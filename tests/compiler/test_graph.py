"""Shapes of the stage graph: chains, sweeps that fold, sweeps that are kept, and what is read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.compiler.workspace import PIPELINE, program
from tunelang.compiler.graph import (
    Choice,
    GraphError,
    StageGraph,
    UnknownStage,
    build,
    only,
    until,
)
from tunelang.dsl.check import check
from tunelang.dsl.syntax.source import Source

HEAD = """\
model g : pretrained { path = "models/tiny" }
data d : jsonl { path = "data/sums.jsonl", prompt = "{question}", response = "{answer}" }
"""


def stage(name: str, source: str, more: str = "") -> str:
    rest = "" if "length" in more else ", length = 1 epoch"
    return (
        f"stage {name} : sft {{ from = {source}, data = d, batch = 4 sequences{rest}"
        f"{', ' + more if more else ''} }}\n"
    )


def policy(name: str, source: str, more: str) -> str:
    return (
        f"stage {name} : grpo {{ from = {source}, data = d, batch = 4 prompts, length = 1 epoch,"
        f' reward = exact("{{completion}}", "{{response}}"), {more} }}\n'
    )


def graph(text: str, folder: Path) -> StageGraph:
    return build(program(HEAD + text, folder))


def reads(found: StageGraph) -> dict[str, list[str]]:
    return {
        node.id: [name for read in node.inputs for name in read.nodes]
        for node in found.nodes.values()
    }


def test_chain_of_stages_has_one_node_each(folder: Path) -> None:
    found = graph(stage("a", "g") + stage("b", "a") + stage("c", "b"), folder)
    assert reads(found) == {"a": [], "b": ["a"], "c": ["b"]}
    assert found.nodes["b"].uses == (("data", "d"),)
    assert found.nodes["a"].uses == (("model", "g"), ("data", "d"))


def test_best_folds_branches_into_a_selection(folder: Path) -> None:
    swept = stage("a", "g", "seed = each(1, 2, 3), keep = lowest(loss)")
    found = graph(swept + stage("b", "a"), folder)
    assert reads(found)["b"] == ["a[seed=1]", "a[seed=2]", "a[seed=3]"]
    assert str(found.nodes["b"].inputs[0].selection) == "lowest(loss)"
    assert found.nodes["b"].choices == ()


def test_all_makes_readers_fan_out_and_choices_add_up(folder: Path) -> None:
    text = stage("a", "g", "seed = each(1, 2), keep = all")
    text += stage("b", "a", "length = each(1 epoch, 2 epochs), keep = all") + stage("c", "b")
    found = graph(text, folder)
    assert found.by_stage["b"] == (
        "b[a.seed=1, length=1 epoch]",
        "b[a.seed=2, length=1 epoch]",
        "b[a.seed=1, length=2 epochs]",
        "b[a.seed=2, length=2 epochs]",
    )
    assert len(found.by_stage["c"]) == 4
    first = found.nodes["c[a.seed=1, b.length=1 epoch]"]
    assert first.choices == (Choice("a", "seed", "1"), Choice("b", "length", "1 epoch"))
    assert first.inputs[0].nodes == ("b[a.seed=1, length=1 epoch]",)


def test_best_folds_inherited_branches_too(folder: Path) -> None:
    text = stage("a", "g", "seed = each(1, 2), keep = all")
    text += stage("b", "a", "length = each(1 epoch, 2 epochs), keep = lowest(loss)")
    found = graph(text + stage("c", "b") + stage("e", "b"), folder)
    assert len(reads(found)["c"]) == 4
    assert found.by_stage["c"] == ("c",)


def test_two_paths_to_one_sweep_read_the_same_branch(folder: Path) -> None:
    """Each branch of `c` sees the same branch of `a` through `b` and directly."""
    text = stage("a", "g", "seed = each(1, 2), keep = all") + stage("b", "a", "keep = all")
    text += policy("c", "b", "kl = k3(0.1), reference = a, keep = all")
    found = graph(text, folder)
    assert reads(found)["c[a.seed=1]"] == ["b[a.seed=1]", "a[seed=1]"]
    assert reads(found)["c[a.seed=2]"] == ["b[a.seed=2]", "a[seed=2]"]
    assert len(found.by_stage["c"]) == 2


def test_two_sweeps_multiply(folder: Path) -> None:
    text = stage("a", "g", "seed = each(1, 2), keep = all")
    text += stage("b", "g", "seed = each(1, 2, 3), keep = all")
    text += policy("c", "a", "kl = k3(0.1), reference = b, keep = best(reward)")
    assert len(graph(text, folder).by_stage["c"]) == 6


def test_each_over_stages_reads_one_stage_a_branch(folder: Path) -> None:
    text = stage("a", "g") + stage("b", "g", "seed = 2")
    found = graph(text + stage("c", "each(a, b)", "keep = lowest(loss)"), folder)
    assert reads(found)["c[from=a]"] == ["a"]
    assert reads(found)["c[from=b]"] == ["b"]


def test_an_each_in_a_choice_not_taken_makes_no_copies(folder: Path) -> None:
    more = "optimizer = each(adamw(lr = each(1e-3, 1e-4)), sgd(lr = 1)), keep = lowest(loss)"
    found = graph(stage("a", "g", more), folder)
    assert len(found.by_stage["a"]) == 3


def test_long_choices_are_shortened_to_distinct_ids(folder: Path) -> None:
    long = ", ".join(
        f"adamw(lr = 1e-3, b1 = 0.9, b2 = 0.95, eps = 1e-8, weight_decay = 0.{n})" for n in "12"
    )
    found = graph(stage("a", "g", f"optimizer = each({long}), keep = lowest(loss)"), folder)
    one, two = found.by_stage["a"]
    assert two == one + "#2"
    assert len(one) < 60


def test_a_judge_is_read_through_the_reward(folder: Path) -> None:
    found = build(program(PIPELINE, folder))
    node = found.nodes["tuned[optimizer.lr=1e-6]"]
    assert [(r.stage, r.paths) for r in node.inputs] == [("warm", ("from", "reward"))]
    assert ("reward", "judged") in node.uses
    assert ("data", "spare_sums") in node.uses


def test_order_is_topological(folder: Path) -> None:
    text = stage("z", "y") + stage("y", "x") + stage("x", "g")
    place = {name: at for at, name in enumerate(graph(text, folder).nodes)}
    assert place["x"] < place["y"] < place["z"]


def test_only_and_until_select_nodes_in_order(folder: Path) -> None:
    found = build(program(PIPELINE, folder))
    branches = ("tuned[optimizer.lr=1e-6]", "tuned[optimizer.lr=3e-6]")
    assert until(found, ["polished"]) == ("warm", *branches, "polished")
    assert until(found, [branches[1]]) == ("warm", branches[1])
    assert only(found, ["tuned"]) == branches
    assert only(found, ["out", "warm"]) == ("warm", "out")
    with pytest.raises(UnknownStage, match="`tunde`") as caught:
        only(found, ["tunde"])
    assert caught.value.known == ("warm", "tuned", "polished", "out")


def test_too_many_nodes_are_refused(folder: Path) -> None:
    text = stage("s0", "g")
    for at in range(1, 6):
        text += stage(f"s{at}", f"s{at - 1}", "seed = each(1, 2, 3, 4, 5, 6), keep = all")
    with pytest.raises(GraphError, match="`s5` would fan out into more than 4096"):
        graph(text, folder)


def test_a_sweep_without_winner_is_refused(folder: Path) -> None:
    """The checker reports it with its place; the graph does not build on sand either way."""
    text = HEAD + stage("a", "g", "seed = each(1, 2), keep = lowest(loss)") + stage("b", "a")
    checked = check(Source("test.tune", text, folder)).program
    assert checked is not None
    for branch in checked.declarations["a"].branches:
        branch.value.__dict__["keep"] = None
    with pytest.raises(GraphError, match="names no winner"):
        build(checked)


@pytest.mark.parametrize("count", [1000])
def test_a_thousand_stages_take_linear_time(folder: Path, count: int) -> None:
    def seconds(n: int) -> float:
        text = HEAD + "".join(stage(f"s{at}", f"s{at - 1}" if at else "g") for at in range(n))
        checked = program(text, folder)
        start = time.process_time()
        assert len(build(checked).nodes) == n
        return time.process_time() - start

    small = min(seconds(count // 4) for _ in range(2))
    assert min(seconds(count) for _ in range(2)) < 12 * small + 0.05
