"""What leaves a fingerprint as it is, and what changes it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compiler.workspace import PIPELINE, digests, prints, program, write
from tunelang.compiler.file_digests import Contents
from tunelang.compiler.fingerprint import fingerprints
from tunelang.compiler.graph import build
from tunelang.dsl.parsing.formatter import format_source
from tunelang.dsl.program import Branch, Declared
from tunelang.dsl.syntax.source import Source
from tunelang.dsl.vocabulary import rewards
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.dsl.vocabulary.stages import Stage
from tunelang.dsl.vocabulary.tables import KINDS

ALL = ["warm", "tuned[optimizer.lr=1e-6]", "tuned[optimizer.lr=3e-6]", "polished", "out"]


def stale(before: str, after: str, folder: Path) -> list[str]:
    """The nodes whose fingerprints differ between two specs."""
    assert before != after
    old, new = digests(before, folder), digests(after, folder)
    return [node for node in new if old.get(node) != new[node]]


def replaced(old: str, new: str) -> str:
    assert old in PIPELINE
    return PIPELINE.replace(old, new)


# What changes nothing.


def test_fingerprints_are_deterministic(folder: Path) -> None:
    assert digests(PIPELINE, folder) == digests(PIPELINE, folder)
    assert len(set(digests(PIPELINE, folder).values())) == len(ALL)


def test_comments_and_documentation_do_not_matter(folder: Path) -> None:
    text = "# a comment\n" + PIPELINE.replace("stage warm", "## Documented.\nstage warm")
    assert not stale(PIPELINE, text, folder)


def test_formatting_does_not_matter(folder: Path) -> None:
    text = PIPELINE.replace(" = ", "   =  ").replace("{\n", "{\n\n\n")
    assert not stale(PIPELINE, text, folder)
    formatted, _ = format_source(Source("test.tune", text))
    assert formatted is not None
    assert not stale(PIPELINE, formatted, folder)


def test_order_of_declarations_does_not_matter(folder: Path) -> None:
    parts = re.findall(r"^\w+ \w+ .*?(?=^\w|\Z)", PIPELINE, re.MULTILINE | re.DOTALL)
    run = PIPELINE.splitlines()[0]
    assert len(parts) > 12
    assert not stale(PIPELINE, "\n".join([*reversed(parts), run]), folder)


def test_order_of_attributes_does_not_matter(folder: Path) -> None:
    old = "  from   = tuned\n  data   = sums\n"
    assert not stale(PIPELINE, replaced(old, "  data   = sums\n  from   = tuned\n"), folder)


def test_names_of_declarations_do_not_matter(folder: Path) -> None:
    """All names at once, in references, metrics and `by_source` alike."""
    names = re.findall(r"^(?:model|data|reward|eval|stage) (\w+)", PIPELINE, re.MULTILINE)
    text = PIPELINE
    for name in names:
        text = re.sub(rf'(?<![\w"/.]){name}(?!\w)', f"the_{name}", text)
    assert "stage the_warm" in text
    assert "best(the_accuracy)" in text
    assert "the_sums = the_right" in text
    old, new = digests(PIPELINE, folder), digests(text, folder)
    assert {f"the_{name}": held for name, held in old.items()} == new


def test_named_expressions_equal_their_values(folder: Path) -> None:
    text = replaced("data   = sums\n", "data   = alias\n") + "data alias = sums\n"
    assert not stale(PIPELINE, text, folder)
    inlined = replaced("reward    = mixed", "reward    = 0.5 * parts + 0.5 * judged").replace(
        "reward mixed = 0.5 * by_source(sums = right, spare_sums = own) + 0.5 * judged",
        "reward parts = by_source(sums = right, spare_sums = own)",
    )
    assert not stale(PIPELINE, inlined, folder)


def test_equal_values_in_other_notation_do_not_matter(folder: Path) -> None:
    for old, new in [
        ("lr = each(1e-6, 3e-6)", "lr = each(0.000001, 3e-6)"),
        ("group     = 4", "group     = 2 + 2"),
        ("keep      = best(accuracy)", "keep      = best(accuracy.score)"),
        ("batch  = 4 sequences", "batch  = 4 sequences\n  packing = true"),
        (
            "from   = tiny",
            "from   = tiny, optimizer = adamw(lr = 1e-5, warmup = 3%, decay = cosine)",
        ),
    ]:
        text = replaced(old, new)
        assert sorted(digests(PIPELINE, folder).values()) == sorted(digests(text, folder).values())


@pytest.mark.parametrize(
    "line",
    ["log_every = 3 steps", "checkpoint_every = 7 steps", "micro_batch = 2 sequences",
     "remat = full", "mesh = axes(fsdp = 4)", "on = box"],
)  # fmt: skip
def test_placement_and_observe_do_not_matter(folder: Path, line: str) -> None:
    text = PIPELINE.replace("from   = tiny", f"from   = tiny\n  {line}")
    assert not stale(PIPELINE, text + "hardware box : local { devices = 4 }\n", folder)


def test_run_block(folder: Path) -> None:
    run = 'run { seed = 17, name = "other", on = box, track = [wandb(project = "p")] }'
    text = PIPELINE.replace('run { seed = 17, name = "pipeline" }', run)
    assert not stale(PIPELINE, text + "hardware box : local { devices = 4 }\n", folder)


def test_a_sweep_in_another_order(folder: Path) -> None:
    assert not stale(PIPELINE, replaced("each(1e-6, 3e-6)", "each(3e-6, 1e-6)"), folder)


def test_a_moved_data_file(folder: Path) -> None:
    (folder / "data/sums.jsonl").rename(folder / "data/moved.jsonl")
    write(folder / "data/sums.jsonl", (folder / "data/moved.jsonl").read_bytes())
    assert not stale(PIPELINE, replaced('"data/sums.jsonl"', '"data/moved.jsonl"'), folder)


def test_presets_are_rows(folder: Path) -> None:
    """`dapo` is `grpo` with other defaults, not another program."""
    same = replaced(
        "group     = 4", "group     = 4, clip = clip(low = 0.2, high = 0.28), refill = true"
    )
    assert digests(replaced(": grpo {", ": dapo {"), folder) == digests(same, folder)


# What changes something: which nodes, and no others.


def test_upstream(folder: Path) -> None:
    assert stale(PIPELINE, replaced("length = 2 epochs", "length = 3 epochs"), folder) == ALL


def test_downstream_does_not_matter(folder: Path) -> None:
    assert stale(PIPELINE, replaced("length = 1 epoch", "length = 3 epochs"), folder) == ALL[3:]


def test_winner_matters_to_readers_only(folder: Path) -> None:
    """No branch of a sweep runs again because the winner is chosen in another way."""
    for keep in ("best(accuracy.length)", "lowest(accuracy)", "best(sums.reward)", "lowest(loss)"):
        assert stale(PIPELINE, replaced("best(accuracy)", keep), folder) == ALL[3:]


def test_a_branch_more(folder: Path) -> None:
    found = stale(PIPELINE, replaced("3e-6)", "3e-6, 1e-5)"), folder)
    assert found == ["tuned[optimizer.lr=1e-5]", "polished", "out"]


def test_seed_of_the_run(folder: Path) -> None:
    assert stale(PIPELINE, replaced("seed = 17", "seed = 18"), folder) == ALL
    own = PIPELINE.replace("from   = tiny", "from   = tiny\n  seed   = 3")
    other = own.replace("seed = 17", "seed = 18")
    assert stale(own, other, folder) == ALL[1:]


def test_a_row_of_a_data_file(folder: Path) -> None:
    before = digests(PIPELINE, folder)
    path = folder / "data/spare.jsonl"
    write(path, path.read_text().replace("6", "7"))
    after = digests(PIPELINE, folder)
    assert [node for node in ALL if before[node] != after[node]] == ALL[1:]


def test_a_python_reward(folder: Path) -> None:
    before = digests(PIPELINE, folder)
    write(folder / "rewards/mine.py", "def score(completion):\n    return 0.0\n")
    after = digests(PIPELINE, folder)
    assert [node for node in ALL if before[node] != after[node]] == ALL[1:]


def test_model_files(folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = digests(PIPELINE, folder)
        path = folder / "models/tiny" / name
        write(path, path.read_bytes()[:-1] + b" }" if name != "model.safetensors" else b"x" * 99)
        after = digests(PIPELINE, folder)
        assert [node for node in ALL if before[node] != after[node]] == ALL
    before = digests(PIPELINE, folder)
    write(folder / "models/tiny/README.md", "no part of the model")
    assert digests(PIPELINE, folder) == before


def test_by_source_by_what_the_sources_are(folder: Path) -> None:
    swapped = replaced("sums = right, spare_sums = own", "sums = own, spare_sums = right")
    assert stale(PIPELINE, swapped, folder) == ALL[1:]


def test_shares_of_a_split_keep_their_order(folder: Path) -> None:
    """The order of the parts decides which examples fall into which."""
    one = replaced("split(test = 20%).train", "split(test = 20%, valid = 10%).train")
    two = replaced("split(test = 20%).train", "split(valid = 10%, test = 20%).train")
    assert stale(one, two, folder) == ALL[1:]


def test_checkpoint_of_a_step(folder: Path) -> None:
    assert stale(PIPELINE, replaced("from   = tuned", "from   = tuned.step(5)"), folder) == ALL[3:]


def test_version_of_the_semantics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests(PIPELINE, folder)
    monkeypatch.setattr(Policy, "semantics", ("policy", 2))
    after = digests(PIPELINE, folder)
    assert [node for node in ALL if before[node] != after[node]] == ALL[1:]


def test_every_kind_of_stage_has_its_semantics() -> None:
    classes = {info.model for info in KINDS["stage"].values()}
    names = [cls.semantics[0] for cls in classes if issubclass(cls, Stage)]
    assert len(set(names)) == len(classes)


def test_a_judge_in_the_branch_of_its_reader(folder: Path) -> None:
    """A reward whose judge is a stage that is kept whole is another reward in each branch."""
    text = PIPELINE.replace("from   = tiny", "from   = tiny\n  seed   = each(1, 2), keep = all")
    text = text.replace("from      = warm", "from      = tiny")
    found = prints(text, folder)
    one = found["tuned[warm.seed=1, optimizer.lr=1e-6]"]
    two = found["tuned[warm.seed=2, optimizer.lr=1e-6]"]
    assert one.components["reward judged"] != two.components["reward judged"]
    assert one.components["reward right"] == two.components["reward right"]
    assert one.digest != two.digest


def test_components_are_in_the_words_of_the_spec(folder: Path) -> None:
    found = prints(PIPELINE, folder)["tuned[optimizer.lr=1e-6]"]
    held = found.components
    assert held["optimizer"] == "adamw"
    assert held["optimizer.lr"] == "1e-6"
    assert held["length"] == "10 steps"
    assert held["run.seed"] == "17"
    assert held["data"].startswith("#")
    assert found.words["data"] == "blend"
    assert held["data sums: on_bad_row"] == "drop"
    assert found.words["data sums: path[0]"] == '"data/sums.jsonl"'
    assert held["reward judged: criteria[0].text"] == '"Short"'
    assert "keep" not in held
    assert "log_every" not in held
    assert "file rewards/mine.py" in held


def test_a_thousand_stages_take_linear_time(folder: Path) -> None:
    def seconds(n: int) -> float:
        lines = [
            PIPELINE.partition("stage warm")[0].replace(
                "judge = local(warm)", "judge = local(tiny)"
            )
        ]
        for at in range(n):
            start = f"s{at - 1}" if at else "tiny"
            lines.append(
                f"stage s{at} : grpo {{ from = {start}, data = blend, reward = mixed,"
                f" batch = 4 prompts, length = {at + 1} steps, evals = [accuracy] }}"
            )
        graph = build(program("\n".join(lines), folder))
        start_time = time.process_time()
        assert len(fingerprints(graph, Contents())) == n
        return time.process_time() - start_time

    small = min(seconds(250) for _ in range(2))
    assert min(seconds(1000) for _ in range(2)) < 12 * small + 0.05


def test_a_reward_that_doubles_at_every_step(folder: Path) -> None:
    """Shared parts are digested once: no tree of 2^200 leaves."""
    made = program(PIPELINE, folder)
    declarations = {}
    for name, declared in made.declarations.items():
        if name == "tuned":
            last = "mixed"
            for at in range(200):
                twice = (rewards.RewardRef.unvalidated(name=last),) * 2
                value = rewards.RewardOperator.unvalidated(operator="+", operands=twice)
                last = f"r{at}"
                declarations[last] = Declared("reward", last, None, value, "")
            branches = tuple(
                Branch(branch.choices, branch.value.model_copy(update={"reward": twice[0]}))
                for branch in declared.branches
            )
            declared = replace(declared, branches=branches)
        declarations[name] = declared
    graph = build(replace(made, declarations=declarations))
    assert len(fingerprints(graph, Contents())) == len(ALL)
