"""The command line as a user meets it: whole processes, exit codes, output streams."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RIGHT = 'model gemma:pretrained{path="google/gemma-2b"}\n'
TIDY = 'model gemma : pretrained { path = "google/gemma-2b" }\n'
WRONG = 'model gemma : pretrained { pth = "google/gemma-2b" }\n'


def tune(
    *arguments: str, stdin: str | bytes = "", cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [sys.executable, "-m", "tunelang.runtime", *arguments],
        input=data,
        capture_output=True,
        cwd=cwd,
        env=os.environ | env,
        timeout=120,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.tune"
    path.write_text(RIGHT)
    return path


def test_check_accepts_a_right_spec(spec: Path) -> None:
    done = tune("check", str(spec))
    assert (done.returncode, done.stdout) == (0, "")
    assert "OK, 0 stages, 1 warning" in done.stderr


def test_check_reports_errors_of_a_wrong_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.tune").write_text(WRONG)
    done = tune("check", "spec.tune", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error[unknown-attribute]: `pretrained` has no attribute `pth`\n")
    assert done.stderr.endswith("spec.tune: 1 error\n")
    assert "\x1b" not in done.stderr


def test_check_reads_standard_input_and_overrides() -> None:
    text = "param a : number = 1\nlet b = a\ndata c = b\n"
    done = tune("check", "-", "--set", "a=x", stdin=text)
    assert done.returncode == 1
    assert "--> --set on the command line" in done.stderr


def test_check_of_several_specs_continues_after_an_error(tmp_path: Path, spec: Path) -> None:
    (tmp_path / "wrong.tune").write_text(WRONG)
    done = tune("check", str(tmp_path / "wrong.tune"), str(spec), str(tmp_path / "none.tune"))
    assert done.returncode == 1
    assert "OK, 0 stages" in done.stderr
    assert "no such file or directory" in done.stderr


def test_check_json_lists_diagnostics(tmp_path: Path) -> None:
    (tmp_path / "spec.tune").write_text('let 🙂 = 1\nlet a = "🙂" + nothing\n')
    done = tune("check", "--json", "spec.tune", cwd=tmp_path)
    (document,) = json.loads(done.stdout)
    first = document["diagnostics"][0]
    assert done.returncode == 1
    assert first["severity"] == 1
    assert {d["code"] for d in document["diagnostics"]} >= {"unknown-name"}
    unknown = next(d for d in document["diagnostics"] if d["code"] == "unknown-name")
    start = {"line": 1, "character": 15}  # an emoji is two UTF-16 units
    assert unknown["range"] == {"start": start, "end": {"line": 1, "character": 22}}


def test_check_show_json_has_the_program(spec: Path) -> None:
    (document,) = json.loads(tune("check", "--show", "--json", str(spec)).stdout)
    assert document["program"]["declarations"]["gemma"]["value"]["path"] == "google/gemma-2b"


def test_file_that_is_no_text_is_reported(tmp_path: Path) -> None:
    (tmp_path / "spec.tune").write_bytes(b"\xff\xfe\x00")
    for command in (["check"], ["fmt"]):
        done = tune(*command, "spec.tune", cwd=tmp_path)
        assert done.returncode == 1
        assert "it is not UTF-8 text (byte 1)" in done.stderr
    assert tune("check", "-", stdin=b"\xff").returncode == 1
    assert tune("check", str(tmp_path)).returncode == 1


def test_fmt_in_place_keeps_the_file_mode(spec: Path) -> None:
    spec.chmod(0o640)
    done = tune("fmt", str(spec))
    assert done.returncode == 0
    assert spec.read_text() == TIDY
    assert stat.S_IMODE(spec.stat().st_mode) == 0o640
    assert list(spec.parent.iterdir()) == [spec]
    assert tune("fmt", str(spec)).stderr == ""


def test_fmt_check_and_diff_change_nothing(spec: Path) -> None:
    assert tune("fmt", "--check", str(spec)).returncode == 1
    done = tune("fmt", "--diff", str(spec))
    assert done.returncode == 0
    assert "-model gemma:pretrained" in done.stdout
    assert "+model gemma : pretrained" in done.stdout
    assert spec.read_text() == RIGHT


def test_fmt_formats_standard_input() -> None:
    done = tune("fmt", "-", stdin=RIGHT)
    assert (done.returncode, done.stdout) == (0, TIDY)


def test_fmt_leaves_wrong_files_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "spec.tune"
    path.write_text("let a = (1\n")
    done = tune("fmt", str(path))
    assert done.returncode == 1
    assert "unclosed-bracket" in done.stderr
    assert path.read_text() == "let a = (1\n"


def test_explain_prints_words_and_codes() -> None:
    assert "    optimizer = adamw(lr = 2e-4)" in tune("explain", "unknown-attribute").stdout
    assert "arXiv:2503.14476" in tune("explain", "dapo").stdout
    assert "default: `8`" in tune("explain", "grpo.group").stdout
    assert "3,072" in tune("explain", "Ki").stdout
    done = tune("explain", "gropu")
    assert done.returncode == 2
    assert "did you mean `group`?" in done.stderr


def test_schema_is_json() -> None:
    assert "$defs" in json.loads(tune("schema").stdout)


def test_wrong_command_line_exits_with_2() -> None:
    assert tune("chekc").returncode == 2
    assert tune("check").returncode == 2


@pytest.mark.parametrize(
    "arguments", [["check", "-"], ["fmt", "-"], ["explain", "grpo"], ["schema"]]
)
def test_short_commands_do_not_import_jax(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom tunelang.runtime.cli import main\nsys.argv[0] = 'tune'\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'torch', 'pyarrow', 'reasoning_gym'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    text = (ROOT / "tests/ui/right/everything.tune").read_text("utf-8")
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        input=text,
        text=True,
        capture_output=True,
        cwd=ROOT / "tests/ui/workspace",
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("variable", "colored"), [("", True), ("1", False)])
def test_output_is_coloured_on_a_terminal_unless_no_color(
    tmp_path: Path, variable: str, colored: bool
) -> None:
    (tmp_path / "spec.tune").write_text(WRONG)
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    if variable:
        environment["NO_COLOR"] = variable
    subprocess.run(
        [sys.executable, "-m", "tunelang.runtime", "check", "spec.tune"],
        stderr=follower,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    os.close(follower)
    assert (b"\x1b[1;31merror" in os.read(leader, 65536)) is colored
    os.close(leader)


def test_check_does_not_run_user_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("open('ran', 'w')\ndef score(completion):\n    return 1.0\n")
    (tmp_path / "spec.tune").write_text('reward mine = python("mine.py:score")\n')
    assert tune("check", "spec.tune", cwd=tmp_path).returncode == 0
    assert not (tmp_path / "ran").exists()


def test_check_render_marks_trained_tokens(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "one", "answer": "two"}\n{"question": "three", "answer": "four"}\n'
    )
    (tmp_path / "book.txt").write_text("abc " * 1000)
    (tmp_path / "spec.tune").write_text(
        """
        data rows : jsonl { path = "rows.jsonl", prompt = "{question}", response = "{answer}" }
        data book : text { path = "book.txt" }
        tokenizer letters : bytes {}
        model small : transformer {
          tokenizer = letters, layers = 1, heads = 1, width = 8, context = 64
        }
        stage first : pretrain { from = small, data = book, length = 1 steps, batch = 1 sequences }
        stage tuned : sft { from = first, data = rows, length = 1 steps, batch = 1 sequences }
        """
    )
    result = tune("check", "spec.tune", "--render", "rows", "-n", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rows, row 0, by tuned: " in result.stdout
    assert "one" in result.stdout.partition("⟦")[0]
    assert "⟦two" in result.stdout
    assert "three" not in result.stdout
    long = tune("check", "spec.tune", "--render", "book", cwd=tmp_path)
    assert "tokens are not shown]" in long.stdout
    assert len(long.stdout) < 1000
    wrong = tune("check", "spec.tune", "--render", "bok", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr == "no stage reads data called `bok`: the stages read `book` and `rows`\n"


PINNED = """\
tokenizer letters : bytes {}
model m : transformer {
  preset = "llama-3.1-8b", tokenizer = letters, context = 4096, dtype = bf16
}
run { on = pod }
hardware pod : gpu { kind = "a100", devices = 1 }
data d : jsonl { path = "d.jsonl", prompt = "{q}", response = "{a}" }
stage s : sft { from = m, data = d, batch = 16 sequences, length = 1 steps }
"""


def test_plan_that_does_not_fit_is_refused_with_remedies(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"q": "1+1=", "a": "2"}\n')
    (tmp_path / "spec.tune").write_text(PINNED)
    done = tune("plan", "spec.tune", cwd=tmp_path)
    assert done.returncode == 4
    assert done.stderr.startswith("error[does-not-fit]: `s` needs ")
    assert "by the estimate it would fit with `batch = 4 sequences` (" in done.stderr
    assert "or 2 × a100 (" in done.stderr


def test_pinned_mesh_is_checked_against_the_hardware_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"q": "1+1=", "a": "2"}\n')
    pinned = PINNED.replace("1 steps", "1 steps, mesh = axes(fsdp = 4, tensor = 4)")
    (tmp_path / "spec.tune").write_text(pinned)
    done = tune("plan", "spec.tune", cwd=tmp_path)
    assert (done.returncode, "mesh-does-not-fit" in done.stderr) == (1, True)
    done = tune("plan", "spec.tune", "--on", "v5p:2x2x4", cwd=tmp_path)
    assert (done.returncode, "fsdp 4 × tensor 4" in done.stdout) == (0, True)
    done = tune("plan", "spec.tune", "--on", "v5e:2x4", cwd=tmp_path)
    assert (done.returncode, "need more than the 8 devices" in done.stderr) == (1, True)
    done = tune("plan", "spec.tune", "--on", "v5p:4x4x4", cwd=tmp_path)
    assert (done.returncode, "and there are 64 × v5p" in done.stderr) == (1, True)
