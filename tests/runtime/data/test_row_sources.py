"""Random access to the rows of every kind of file, and errors of rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.data_helpers import batch, jsonl, library, questions, ref, text, write_jsonl
from tunelang.dsl.vocabulary import data
from tunelang.runtime.data.procedural import GeneratorError, Problems
from tunelang.runtime.data.row_errors import BadRowError, NoRowsError, NotARowError
from tunelang.runtime.data.row_sources import Rows, open_rows


def open_source(kind: data.DataKind, folder: Path) -> Rows:
    return open_rows(kind, folder, cache=folder / "cache")


def read_all(rows: Rows) -> list[dict[str, object]]:
    return [rows[row] for row in range(len(rows))]


def test_jsonl_rows_skip_blank_lines_and_have_places(tmp_path: Path) -> None:
    expected = [{"q": "é🙂\u2028 line"}, {"q": "b"}, {"q": "c", "n": 1}]
    lines = [json.dumps(row, ensure_ascii=False) for row in expected]
    body = "\ufeff" + lines[0] + "\r\n\n   \n" + lines[1] + "\n" + lines[2]
    (tmp_path / "a.jsonl").write_bytes(body.encode())
    rows = open_source(data.Jsonl(path=("a.jsonl",)), tmp_path)
    assert read_all(rows) == expected
    assert [rows.place(row) for row in range(3)] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    rows = questions(7)
    names = [
        write_jsonl(tmp_path / f"{start}.jsonl", rows[start:end])
        for start, end in ((0, 3), (3, 4), (4, 7))
    ]
    (tmp_path / "empty.jsonl").write_text("")
    joined = open_source(data.Jsonl(path=(names[0], "empty.jsonl", *names[1:])), tmp_path)
    assert read_all(joined) == rows
    assert joined.place(3) == "3.jsonl:1"
    with pytest.raises(IndexError):
        joined[7]


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "not JSON"), ("[1]", "not a JSON object"), ("[" * 100_000, "not JSON")],
)
def test_lines_that_are_no_objects_raise(tmp_path: Path, line: str, reason: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [line])
    with pytest.raises(NotARowError) as caught:
        open_source(data.Jsonl(path=("a.jsonl",)), tmp_path)[0]
    assert caught.value.reason == reason
    assert len(caught.value.excerpt) <= 80


def test_rows_that_are_not_utf8_raise(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"q": "\xff"}\n')
    with pytest.raises(NotARowError) as caught:
        open_source(data.Jsonl(path=("a.jsonl",)), tmp_path)[0]
    assert caught.value.reason == "not UTF-8"


def test_digest_depends_on_the_content_alone(tmp_path: Path) -> None:
    def digest(rows: list[dict[str, object]]) -> str:
        write_jsonl(tmp_path / "a.jsonl", rows)
        return open_source(data.Jsonl(path=("a.jsonl",)), tmp_path).digest

    assert digest(questions(3)) == digest(questions(3)) != digest(questions(4))


def test_csv_rows_are_read_by_column_name(tmp_path: Path) -> None:
    body = 'q;a\r\nplain;é🙂\r\n"two\r\nlines; ""quoted""";x\r\n\r\nun"quoted;y\r\n'
    (tmp_path / "a.csv").write_bytes(body.encode())
    rows = open_source(data.Csv(path=("a.csv",), separator=";"), tmp_path)
    assert read_all(rows) == [
        {"q": "plain", "a": "é🙂"},
        {"q": 'two\r\nlines; "quoted"', "a": "x"},
        {"q": 'un"quoted', "a": "y"},
    ]
    assert rows.place(1) == "a.csv:3"


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(
        st.tuples(
            st.text(alphabet='ab"\n,é \u2028\x0c\x85', min_size=1), st.text(alphabet='x"\n,')
        ),
        min_size=1,
    )
)
def test_csv_rows_equal_those_of_the_csv_module(
    table: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv

    folder = tmp_path_factory.mktemp("csv")
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("q", "a"), *table])
    rows = open_source(data.Csv(path=("a.csv",)), folder)
    assert read_all(rows) == [{"q": q, "a": a} for q, a in table]


def test_csv_rows_with_the_wrong_number_of_cells_raise(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\n1,2\n3\n4,5,6\n")
    rows = open_source(data.Csv(path=("a.csv",)), tmp_path)
    assert rows[0] == {"q": "1", "a": "2"}
    for row in (1, 2):
        with pytest.raises(NotARowError):
            rows[row]


def test_malformed_csv_row_raises(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"q,a\nx\ry,2\n4,5\n")
    rows = open_source(data.Csv(path=("a.csv",)), tmp_path)
    assert rows[1] == {"q": "4", "a": "5"}
    with pytest.raises(NotARowError, match="not CSV"):
        rows[0]


def test_parquet_rows_have_random_access(tmp_path: Path) -> None:
    expected = [
        {"q": f"{n}🙂", "m": [{"role": "user", "content": "x"}] * (n % 3)} for n in range(50)
    ]
    pq.write_table(pa.Table.from_pylist(expected), tmp_path / "a.parquet", row_group_size=7)
    kind = data.Parquet(path=("a.parquet",))
    rows = open_source(kind, tmp_path)
    assert [rows[row] for row in reversed(range(50))] == expected[::-1]
    assert read_all(open_source(kind, tmp_path)) == expected
    assert rows.place(7) == "a.parquet: row 8"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("file", ["\none\ntwo\r\n\n \n\nthree 🙂"]),
        ("line", ["one", "two", "three 🙂"]),
        ("paragraph", ["one\ntwo", "three 🙂"]),
    ],
)
def test_text_files_are_split_into_rows(tmp_path: Path, rows: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes("\none\ntwo\r\n\n \n\nthree 🙂".encode())
    opened = open_source(data.TextFiles(path=("a.txt",), rows=rows), tmp_path)
    assert [row["text"] for row in read_all(opened)] == expected


def procedural(task: str, size: int = 3, **values: int) -> data.Procedural:
    settings = data.Settings(values=dict(values)) if values else None
    return data.Procedural(task=task, size=size, seed=3, settings=settings)


def test_generated_problems_have_prompt_response_and_target(tmp_path: Path) -> None:
    rows = open_source(procedural("knights_knaves", n_people=3), tmp_path)
    assert isinstance(rows, Problems)
    assert len(rows) == 3
    assert rows[1] == rows[1]
    assert rows[1]["metadata"]["difficulty"]["n_people"] == 3
    assert rows.score(rows[1]["answer"], rows[1]) == 1.0
    assert rows.score("nobody knows", rows[1]) < 1.0
    stream = library(tmp_path, d=procedural("knights_knaves", n_people=3)).stream(ref(), seed=0)
    example = batch(stream, 0, 1)[0]
    assert example.prompt == example.fields["question"]
    assert example.response == example.target == example.fields["answer"]


def test_problems_without_one_right_answer_have_no_response(tmp_path: Path) -> None:
    """Many answers colour a graph: a verifier replaces the target."""
    stream = library(tmp_path, d=procedural("graph_color")).stream(ref(), seed=0)
    assert len(stream) == 3
    assert batch(stream, 0, 1)[0].response is None


@pytest.mark.slow
def test_generated_problems_are_equal_in_every_process(tmp_path: Path) -> None:
    """This generator goes through a set of strings, whose order changes from process to process."""
    code = (
        "import sys; from pathlib import Path; from tunelang.dsl.vocabulary import data;"
        "from tunelang.runtime.data.row_sources import open_rows;"
        "kind = data.Procedural(task='word_ladder', size=2, seed=3);"
        "rows = open_rows(kind, Path(), cache=Path(sys.argv[1]));"
        "print([rows[at]['question'] for at in range(2)])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (procedural("knights_knaves", n_people=-1), "Number of people"),
        (procedural("no_such_task"), "no_such_task"),
    ],
)
def test_refused_settings_of_generators_raise(
    tmp_path: Path, kind: data.Procedural, reason: str
) -> None:
    with pytest.raises(GeneratorError) as caught:
        open_source(kind, tmp_path)
    assert reason in caught.value.reason
    assert list((tmp_path / "cache").iterdir()) == []


# Rows that break.

BROKEN = [
    {"q": "1", "a": "x"},
    '{"q": "2", ',
    {"q": "3"},
    {"q": "4", "a": None},
    {"q": "5", "a": ["x"]},
    {"q": "6", "a": 7},
]


def test_bad_rows_are_dropped_counted_and_shown(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", BROKEN)
    stream = library(tmp_path, d=jsonl("a.jsonl")).stream(ref(), seed=0)
    assert sorted(e.prompt or "" for e in stream.once()) == ["1", "6"]
    assert stream.bad.total == 4
    assert stream.bad.counts == {"NotARowError": 1, "MissingFieldError": 1, "WrongTypeError": 2}
    assert [bad.row for bad in stream.bad.shown] == [f"a.jsonl:{line}" for line in (2, 3, 4, 5)]


def test_only_the_first_bad_rows_are_shown(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"q": "1", "a": "x"}, *[{"q": "2"}] * 50])
    stream = library(tmp_path, d=jsonl("a.jsonl")).stream(ref(), seed=0)
    assert (stream.bad.total, len(stream.bad.shown)) == (50, 5)


def test_bad_row_raises_under_the_policy_stop(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", BROKEN)
    with pytest.raises(BadRowError) as caught:
        library(tmp_path, d=jsonl("a.jsonl", on_bad_row="stop")).stream(ref(), seed=0)
    assert (caught.value.source, caught.value.row) == ("d", "a.jsonl:2")
    assert isinstance(caught.value.cause, NotARowError)


def test_source_without_usable_rows_raises(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", BROKEN[1:4])
    with pytest.raises(NoRowsError) as caught:
        library(tmp_path, d=jsonl("a.jsonl")).stream(ref(), seed=0)
    assert caught.value.dropped.total == 3


def test_malformed_conversations_are_dropped(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [[], "text", [{"role": "someone", "content": "a"}], [{"role": "user"}], [3]]
    write_jsonl(tmp_path / "a.jsonl", [{"m": good}, *({"m": value} for value in bad)])
    kind = data.Jsonl(path=("a.jsonl",), messages=text("{m}"))
    stream = library(tmp_path, d=kind).stream(ref(), seed=0)
    [example] = stream.once()
    assert [m.role for m in example.messages or ()] == ["user", "assistant"]
    assert stream.bad.counts == {"WrongTypeError": 5}
