"""Rewards: every part, every failure, and what a person sees of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tunelang.dsl.vocabulary.base import RewardExpression
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.data import Between, Procedural, Settings, TemplateText
from tunelang.dsl.vocabulary.rewards import (
    BySource,
    Contains,
    Exact,
    Length,
    Matches,
    NumericMatch,
    Overlong,
    RewardConstant,
    RewardOperator,
    RewardRef,
    Verified,
)
from tunelang.runtime.rewards import reward_parts
from tunelang.runtime.rewards.reward_functions import CompiledReward, Scores
from tunelang.runtime.rewards.reward_parts import CompletionRow, RewardContext, overlong
from tunelang.runtime.workers.worker_pool import LoadError


def row(
    completion: str, target: str = "42", *, source: str = "math", tokens: int = 5, **more
) -> CompletionRow:
    fields = {"completion": completion, "target": target, **more}
    return CompletionRow(fields, source, tokens, lambda: list(completion))


def score(expression: RewardExpression, *rows: CompletionRow, **context) -> Scores:
    with CompiledReward(expression, RewardContext(**{"workers": 1, **context})) as reward:
        return reward.score(rows)


def operator(symbol: str, *operands: RewardExpression | float) -> RewardOperator:
    nodes = tuple(
        RewardConstant(value=float(operand)) if isinstance(operand, int | float) else operand
        for operand in operands
    )
    return RewardOperator(operator=symbol, operands=nodes)


# The parts.


@pytest.mark.parametrize(
    ("expression", "completions", "values"),
    [
        (NumericMatch(), ["It is 42", "41", "42 or 43", "", "$42.00", "84/2"], [1, 0, 0, 0, 1, 1]),
        (NumericMatch(tolerance=0.1), ["40", "30"], [1, 0]),
        (Exact(), [" 42\n", "42.", ""], [1, 0, 0]),
        (Contains(), ["it is 42.", "4 2", ""], [1, 0, 0]),
        (Matches(pattern="<a>.*</a>"), ["<a>x\ny</a>", "<a>x</a> ", ""], [1, 0, 0]),
        (Matches(pattern="(<t>.*</t>)?.*"), ["", "\n\n"], [1, 1]),
    ],
)
def test_text_parts_score_each_completion(expression, completions, values):
    result = score(expression, *(row(completion) for completion in completions))
    assert result.values.tolist() == values
    assert result.events == ()


def test_ignore_case_folds_unicode():
    rows = [row("STRASSE ÉTÉ 東京", "straße été 東京")]
    assert score(Exact(ignore_case=True), *rows).values.tolist() == [1]
    assert score(Exact(), *rows).values.tolist() == [0]
    assert score(Contains(ignore_case=True), *rows).values.tolist() == [1]
    emoji = [row("<think>🤔\u2028</think>ok")]
    assert score(Matches(pattern="<think>.*</think>ok"), *emoji).values.tolist() == [1]


def test_length_and_overlong_count_tokens():
    rows = [row("x" * 1000, tokens=n) for n in (1, 80, 81, 90, 100, 130)]
    assert score(Length(), *rows).values.tolist() == [1, 80, 81, 90, 100, 130]
    result = score(Overlong(buffer=20), *rows, max_tokens=100).values
    np.testing.assert_allclose(result, [0, 0, -0.05, -0.5, -1, -1])


@pytest.mark.parametrize("tokens", range(0, 120, 7))
def test_overlong_equals_equation_13(tokens):
    longest, cache = 100, 20
    if tokens <= longest - cache:
        expected = 0.0
    elif tokens <= longest:
        expected = ((longest - cache) - tokens) / cache
    else:
        expected = -1.0
    assert overlong(tokens, longest, cache) == expected


def test_overlong_longer_than_the_completions_is_an_error():
    with pytest.raises(ValueError, match=r"overlong\(200\) of at most 100 tokens"):
        score(Overlong(buffer=200), row(""), max_tokens=100)


def test_verified_scores_with_the_verifier_of_the_generator():
    import reasoning_gym

    data = Procedural(task="knights_knaves", size=3, settings=Settings(values={"n_people": 2}))
    dataset = reasoning_gym.create_dataset("knights_knaves", size=3, seed=0, n_people=2)
    entries = [dataset[0], dataset[1]]
    answers = [entries[0]["answer"], "no idea"]
    rows = [
        CompletionRow({**entry, "completion": f"<answer>{answer}</answer>"}, "logic", 9)
        for entry, answer in zip(entries, answers, strict=True)
    ]
    text = Between(start="<answer>", end="</answer>", text=TemplateText(text="{completion}"))
    result = score(Verified(text=text), *rows, row("x"), generators={"logic": data})
    expected = [dataset.score_answer(a, e) for a, e in zip(answers, entries, strict=True)]
    assert result.values[:2].tolist() == expected
    assert result.values[0] == 1
    assert [(event.row, event.why) for event in result.events] == [
        (2, "`math` is not procedural data")
    ]


def test_missing_generator_raises_before_scoring():
    with pytest.raises(LoadError, match="no_such_task"):
        score(Verified(), generators={"logic": Procedural(task="no_such_task")})


# Expressions.


def test_fractional_scores_are_float64():
    expression = operator("+", operator("*", 0.7, Exact()), operator("*", 0.3, Contains()))
    result = score(expression, row("42"), row("it is 42"), row("no"))
    assert result.values.dtype == np.float64
    np.testing.assert_allclose(result.values, [1.0, 0.3, 0.0])


@pytest.mark.parametrize(
    ("symbol", "values"),
    [
        ("+", [5, 13]), ("-", [1, 9]), ("*", [6, 22]), ("/", [1.5, 5.5]), ("==", [0, 0]),
        ("!=", [1, 1]), ("<", [0, 0]), ("<=", [0, 0]), (">", [1, 1]), (">=", [1, 1]),
    ],
)  # fmt: skip
def test_operators_combine_values(symbol, values):
    rows = [row("", tokens=3), row("", tokens=11)]
    assert score(operator(symbol, Length(), 2), *rows).values.tolist() == values


def test_operands_combine_from_left_to_right():
    assert score(operator("+", Length(), 1, 2, 3), row("")).values.tolist() == [11]
    assert score(operator("-", Length(), 1, 2), row("")).values.tolist() == [2]


def test_division_by_zero_is_an_event():
    result = score(operator("/", 1, operator("-", Length(), 5)), row(""), row("", tokens=7))
    assert result.values.tolist() == [0, 0.5]
    assert [(e.part, e.row, e.why) for e in result.events] == [("/", 0, "a division by zero")]


def test_by_source_scores_each_source_with_its_own_reward():
    expression = BySource(sources={"math": NumericMatch(), "story": RewardRef(name="taste")})
    rows = [row("42"), row("Once", source="story"), row("1"), row("?", source="other")]
    declared = {"taste": operator("*", 0.5, Contains(part=TemplateText(text="Once")))}
    result = score(expression, *rows, declared=declared)
    assert result.values.tolist() == [1, 0.5, 0, 0]
    np.testing.assert_array_equal(result.parts["numeric_match"], [1, np.nan, 0, np.nan])
    np.testing.assert_array_equal(result.parts["taste"], [np.nan, 0.5, np.nan, np.nan])
    assert [(e.row, e.why) for e in result.events] == [(3, "no reward for the source `other`")]
    metrics = result.metrics()
    assert metrics["reward/numeric_match"] == 0.5
    assert metrics["reward/taste"] == 0.5
    assert metrics["reward/taste_std"] == 0


def test_parts_are_logged_by_unique_names():
    declared = {"correct": NumericMatch(), "exact": operator("*", 2, Exact())}
    both = operator("+", RewardRef(name="correct"), RewardRef(name="exact"), Exact(), Exact())
    result = score(both, row("42"), row("41"), declared=declared)
    assert sorted(result.parts) == ["correct", "exact", "exact_2", "exact_3", "exact_4"]
    assert result.parts["exact"].tolist() == [2, 0]
    metrics = result.metrics()
    assert metrics["reward"] == 2.5
    assert metrics["reward_std"] == 2.5
    assert metrics["reward/correct"] == 0.5


def test_declared_reward_scores_each_row_once():
    batch_sizes: list[int] = []

    def taste(rows):
        batch_sizes.append(len(rows))
        return [0.25 if row.fields["completion"] else "the judge is silent" for row in rows]

    ref = RewardRef(name="taste")
    result = score(operator("+", ref, ref), row("a"), row(""), scorers={"taste": lambda: taste})
    assert result.values.tolist() == [0.5, 0]
    assert batch_sizes == [2]
    assert [(e.part, e.row, e.why) for e in result.events] == [("taste", 1, "the judge is silent")]


def test_missing_field_is_an_event():
    answer = TemplateText(text="{answer}")
    result = score(
        operator("+", Exact(target=answer), Matches(text=answer, pattern="4.")),
        row("42", answer="42"), row("42"), row("42", answer=None),
    )  # fmt: skip
    assert result.values.tolist() == [2, 0, 0]
    assert {(e.part, e.row) for e in result.events} == {
        ("exact", 1), ("exact", 2), ("matches", 1), ("matches", 2),
    }  # fmt: skip
    assert result.events[0].why == "no field `answer` among `completion`, `target`"


def test_unusable_target_is_an_event():
    assert score(NumericMatch(), row("42", "forty-two")).events[0].why == (
        "there is no number in the target"
    )
    assert score(Contains(), row("anything", "")).values.tolist() == [0]
    assert len(score(Contains(), row("anything", "")).events) == 1


def test_no_rows_give_no_scores():
    result = score(operator("+", Exact(), Matches(pattern="x")))
    assert result.values.shape == (0,)
    assert result.metrics() == {"reward_events": 0}


# Functions of the user.

FUNCTIONS = """
    import os, signal, subprocess, sys, time
    import neighbour

    def fraction(completion):
        return 0.7

    def fields(completion, n, other="default"):
        return {"default": 1.0}[other] * n * neighbour.two

    def anything(**fields):
        return len(fields)

    def vowels(completion_tokens, **others):
        return [float(letter in "aeiou") for letter in completion_tokens]

    async def later(completion):
        return len(completion)

    def moody(completion):
        print("noise")
        if completion == "raise":
            raise RuntimeError("no mood\\nat all")
        if completion == "exit":
            sys.exit(3)
        if completion == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if completion == "nan":
            return float("nan")
        if completion == "none":
            return None
        if completion == "text":
            return "0.5"
        if completion == "hang":
            while True:
                pass
        if completion == "child":
            process = subprocess.Popen(["sleep", "60"])
            with open("pid", "w") as file:
                file.write(str(process.pid))
            process.wait()
        return len(completion)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(textwrap.dedent(FUNCTIONS))
    (tmp_path / "neighbour.py").write_text("two = 2\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python(name: str, **more) -> Python:
    return Python(reference=f"mine.py:{name}", **more)


def test_functions_get_the_fields_of_their_parameters(folder):
    rows = [row("a", n=3), row("b", n=0.5)]
    assert score(python("fraction"), *rows, folder=folder).values.tolist() == [0.7, 0.7]
    assert score(python("fields"), *rows, folder=folder).values.tolist() == [6, 1]
    assert score(python("anything"), *rows, folder=folder).values.tolist() == [3, 3]
    assert score(python("later"), row("abc"), folder=folder).values.tolist() == [3]
    result = score(python("fields"), row("a"), folder=folder)
    assert result.events[0].why == "it asks for `n`, which is not a field of the row"


def test_token_rewards_become_credit(folder):
    rows = [row("bio", tokens=3, n=2.0), row("ox", tokens=2, n=3.0), row("b", tokens=2, n=1.0)]
    vowels = python("vowels")
    times = python("fields")  # 2 n

    def score_in_folder(expression: RewardExpression) -> Scores:
        return score(expression, *rows, folder=folder)

    alone = score_in_folder(vowels)
    assert alone.values.tolist() == [2, 1, 0]
    assert alone.credit is not None
    assert alone.credit.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert alone.events[0].why == "it returned 1 numbers for 2 tokens"
    assert alone.parts["vowels"].tolist() == [2, 1, 0]

    # Sums keep what tokens have; a completion's own part is what remains, for its last token.
    both = score_in_folder(operator("-", times, operator("/", vowels, 2)))
    assert both.values.tolist() == [3, 5.5, 2]
    assert both.credit.tolist() == [[0, -0.5, -0.5], [-0.5, 0, 0], [0, 0, 0]]
    scaled = score_in_folder(operator("*", times, 0.5, vowels))
    assert scaled.values.tolist() == [4, 3, 0]
    assert scaled.credit.tolist() == [[0, 2, 2], [3, 0, 0], [0, 0, 0]]
    of_source = score_in_folder(BySource(sources={"math": vowels}))
    assert of_source.credit.tolist() == alone.credit.tolist()
    for expression in (
        operator("*", vowels, vowels), operator(">", vowels, 1), operator("/", 1, vowels), times,
    ):  # fmt: skip
        assert score_in_folder(expression).credit is None
    lost = score_in_folder(operator("/", vowels, operator("-", times, 6)))
    assert lost.values.tolist() == [-1, 0, 0]
    assert lost.credit.tolist() == [[0, -0.5, -0.5], [0, 0, 0], [0, 0, 0]]


def test_declared_token_reward_scores_each_row_once(folder):
    declared = {"spelt": python("vowels")}
    expression = operator("+", RewardRef(name="spelt"), operator("*", 2, RewardRef(name="spelt")))
    result = score(expression, row("bio", tokens=3), folder=folder, declared=declared)
    assert result.values.tolist() == [6]
    assert result.credit.tolist() == [[0, 3, 3]]
    assert result.parts["spelt"].tolist() == [2]


def test_failures_of_a_function_are_events(folder):
    kinds = ["fine", "raise", "exit", "die", "nan", "none", "text", "hang", "", "child", "fine"]
    moody = python("moody", timeout=0.5, on_error=-1.0)
    start = time.monotonic()
    result = score(moody, *(row(kind) for kind in kinds), folder=folder, workers=2)
    assert time.monotonic() - start < 20
    assert result.values.tolist() == [4, -1, -1, -1, -1, -1, -1, -1, 0, -1, 4]
    assert {kinds[event.row]: event.why for event in result.events} == {
        "raise": "RuntimeError: no mood",
        "exit": "SystemExit: 3",
        "die": "the process ended with code -9",
        "nan": "it returned nan",
        "none": "it returned None, not a number",
        "text": "it returned '0.5', not a number",
        "hang": "it took more than 0.5 s",
        "child": "it took more than 0.5 s",
    }
    assert all(event.part == "moody" and event.value == -1 for event in result.events)
    assert result.metrics()["reward_events"] == 8
    # What a hanging function had started is ended with it.
    assert not _alive(int((folder / "pid").read_text()))


def test_processes_end_with_the_trainer(folder):
    # As by `kill -9`: the trainer has no chance to clean up.
    script = """
        import os, time
        from tunelang.dsl.vocabulary.custom import Python
        from tunelang.runtime.rewards.reward_functions import CompiledReward
        from tunelang.runtime.rewards.reward_parts import CompletionRow, RewardContext
        reward = CompiledReward(Python(reference="mine.py:moody"), RewardContext(workers=1))
        reward.submit([CompletionRow({"completion": "child"}, "math", 5)])
        while not (os.path.exists("pid") and open("pid").read()):
            time.sleep(0.05)
        os._exit(9)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    path = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run(command, env=environment, check=False, timeout=60).returncode == 9
    pid = int((folder / "pid").read_text())
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.05)
    pytest.fail("what a reward had started outlives the trainer")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_expression_that_exceeds_its_timeout_is_an_event(monkeypatch):
    monkeypatch.setattr(reward_parts, "TIMEOUT", 0.5)
    result = score(Matches(pattern="(a+)+b"), row("a" * 50), row("aab"))
    assert result.values.tolist() == [0, 1]
    assert [(e.row, e.why) for e in result.events] == [(0, "it took more than 0.5 s")]


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("broken.py:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("mine.py:nothing", "AttributeError: `mine.py` has no function `nothing`"),
        ("gone.py:f", "FileNotFoundError"),
    ],
)
def test_unloadable_function_raises_before_scoring(reference, why, folder):
    with pytest.raises(LoadError) as caught:
        score(Python(reference=reference), folder=folder)
    assert caught.value.why.startswith(why)


def test_submit_scores_in_another_thread(folder):
    moody = python("moody", timeout=30.0)
    with CompiledReward(moody, RewardContext(folder=folder, workers=2)) as reward:
        future = reward.submit([row("ab"), row("abc")])
        second = reward.submit([row("a")])
        assert future.result(20).values.tolist() == [2, 3]
        assert second.result(20).values.tolist() == [1]
        reward.submit([row("hang")])
        start = time.monotonic()
    assert time.monotonic() - start < 10  # leaving does not wait for what hangs


@pytest.mark.parametrize("on_devices", [True, False])
def test_models_on_the_devices_score_in_the_callers_thread(on_devices: bool) -> None:
    """Two threads that launch programs over several devices may end up waiting for each other."""
    threads = []

    def judge(rows: Sequence[CompletionRow]) -> list[float]:
        threads.append(threading.current_thread())
        return [1.0] * len(rows)

    reward_context = RewardContext(
        scorers={"taste": lambda: judge},
        on_devices=frozenset({"taste" if on_devices else "other"}),
        workers=1,
    )
    with CompiledReward(RewardRef(name="taste"), reward_context) as reward:
        scores = reward.submit([row("a"), row("b")]).result()
    assert scores.values.tolist() == [1.0, 1.0]
    assert (threads == [threading.current_thread()]) is on_devices
