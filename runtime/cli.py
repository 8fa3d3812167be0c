"""The command `tune`. Each command imports what it needs: `tune check` must answer at once."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

# Both make a short command start in half the time: pydantic looks for plug-ins in the metadata of
# every installed package, and collections find nothing while classes and a spec's tree are made.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
gc.disable()
# A collective holds a thread until all devices have come to it, and XLA makes only a thread a core:
# where devices are simulated, independent collectives would wait for each other for ever.
if _simulated := re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
    os.environ.setdefault("PJRT_NPROC", str(8 * int(_simulated[1])))

import typer

from tunelang.dsl.check import check, check_file
from tunelang.dsl.diagnostics import render
from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Diagnostics
from tunelang.dsl.diagnostics.tune_error import CommandError
from tunelang.dsl.program import Program
from tunelang.dsl.resolve.load import read
from tunelang.dsl.syntax.source import Source

if TYPE_CHECKING:
    from tunelang.runtime.planning.prepare import Prepared
    from tunelang.runtime.store.run_store import Store

WRONG_SPEC = 1
WRONG_COMMAND = 2
DOES_NOT_FIT = 4

app = typer.Typer(
    name="tune",
    help="Declarative post-training of language models on JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC...", help="`.tune` files; `-` reads standard input.")
]
Sets = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=EXPRESSION",
        help="Override a parameter (`lr=3e-6`) or an attribute"
        " (`stage.baseline.batch=32 sequences`)."
        " Paths in it are relative to the current folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]


def main() -> None:
    """Entry point of the command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # slow to import

        typer.echo(version("tunelang"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Declarative post-training of language models on JAX."""


@app.command("check")
def check_command(
    specs: Specs,
    sets: Sets = [],  # noqa: B006  (typer reads the default, nobody changes it)
    show: Annotated[
        bool,
        typer.Option("--show", help="Print the resolved spec, and where each value came from."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--render",
            metavar="DATA",
            help="Print some examples of declared data, with the tokens that are trained.",
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, metavar="COUNT", help="How many of them.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Check specs without running anything. Exit code 1 if one of them is wrong."""
    if data is not None:
        _render(specs, sets, data, count)
        return
    failed = False
    documents: list[dict[str, object]] = []
    for spec in specs:
        checked = check(_stdin(), sets) if spec == "-" else check_file(Path(spec), sets)
        failed = failed or checked.program is None
        spec = "<standard input>" if spec == "-" else spec
        if as_json:
            document: dict[str, object] = {
                "spec": spec,
                "diagnostics": render.json(checked.diagnostics),
            }
            if show and checked.program is not None:
                document["program"] = checked.program.json()
            documents.append(document)
            continue
        report(checked.diagnostics)
        if checked.program is not None and show:
            from tunelang.dsl.reference.resolved_text import (
                show as show_program,  # only this flag needs it
            )

            typer.echo(show_program(checked.program), nl=False)
        elif checked.program is not None:
            stages = checked.program.of("stage")
            branches = sum(len(stage.branches) for stage in stages)
            fan = f" in {branches} branches" if branches > len(stages) else ""
            size = f"{len(stages)} stage{'' if len(stages) == 1 else 's'}{fan}"
            warned = len(checked.diagnostics) - checked.diagnostics.errors
            tail = f", {render.summary(0, warned)}" if warned else ""
            typer.echo(f"{spec}: right, {size}{tail}", err=True)
        else:
            found = checked.diagnostics
            warnings = len(found) + found.dropped - found.errors
            shown = f"; the first {len(found)} are shown" if found.dropped else ""
            typer.echo(f"{spec}: {render.summary(found.errors, warnings)}{shown}", err=True)
    if as_json:
        typer.echo(json.dumps(documents, indent=2, ensure_ascii=False))
    raise typer.Exit(WRONG_SPEC if failed else 0)


def _render(specs: list[str], sets: list[str], data: str, count: int) -> None:
    if len(specs) != 1 or specs[0] == "-":
        typer.echo("--render wants one spec, in a file", err=True)
        raise typer.Exit(WRONG_COMMAND)
    spec = Path(specs[0])
    program = _checked(spec, sets)
    from rich.console import Console

    from tunelang.runtime.commands.preview import rendered  # JAX is slow to import

    console = Console(highlight=False, markup=False, soft_wrap=True)
    with _failing(program, traceback=False):
        for text in rendered(program, _store(spec, None), data, count, not console.is_terminal):
            console.print(text, end="\n\n")


@app.command("fmt")
def fmt_command(
    specs: Specs,
    only_check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 1 if a file would change.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Change nothing; print what would change.")
    ] = False,
) -> None:
    """Bring specs into their canonical form, in place; `-` formats standard input to standard
    output.
    """
    from tunelang.dsl.parsing.formatter import format_source  # only this command needs it

    failed = False
    for spec in specs:
        source = _stdin() if spec == "-" else _read(spec)
        if source is None:
            failed = True
            continue
        formatted, diagnostics = format_source(source)
        if formatted is None:
            report(diagnostics)
            failed = True
            continue
        changed = formatted != source.text
        if diff and changed:
            typer.echo(_diff(source, formatted), nl=False)
        if only_check or diff:
            failed = failed or (only_check and changed)
            if only_check and changed:
                typer.echo(f"{spec}: would change", err=True)
        elif spec == "-":
            typer.echo(formatted, nl=False)
        elif changed:
            _replace(Path(spec), formatted)
            typer.echo(f"{spec}: formatted", err=True)
    raise typer.Exit(WRONG_SPEC if failed else 0)


@app.command("explain")
def explain_command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A noun, kind, attribute (`grpo.clip`), function, unit or diagnostic code."
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the whole reference as Markdown.")
    ] = False,
) -> None:
    """Say what a word of the language means, or what a diagnostic code is about."""
    from tunelang.dsl.messages.wording import nearest
    from tunelang.dsl.reference import explain  # only this command needs it

    if everything or name is None:
        _page(explain.reference() if everything else explain.overview())
        return
    text = explain.explain(name)
    if text is None:
        near = nearest(name, explain.topics())
        hint = f"; did you mean `{near}`?" if near else "; `tune explain` lists what there is"
        typer.echo(f"nothing is called `{name}`{hint}", err=True)
        raise typer.Exit(WRONG_COMMAND)
    _page(text)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a resolved spec, as `tune check --show --json` prints it."""
    from tunelang.dsl.reference.schema import schema  # only this command needs it

    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="The store; else `TUNE_STORE`, else `.tune` beside the spec."),
]
Spec = Annotated[Path, typer.Argument(metavar="SPEC", help="A `.tune` file.")]
OnlyOption = Annotated[
    list[str], typer.Option("--only", metavar="STAGE", help="Run these stages and no others.")
]
UntilOption = Annotated[
    list[str], typer.Option("--until", metavar="STAGE", help="Run these stages and what they need.")
]
ForceOption = Annotated[
    list[str], typer.Option("--force", metavar="STAGE", help="Run these although they are done.")
]
OnOption = Annotated[
    str | None,
    typer.Option("--on", metavar="HARDWARE", help="Declared hardware, or such as `v5e:4x4`."),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where errors arose.")]


@app.command("graph")
def graph_command(
    spec: Spec,
    sets: Sets = [],  # noqa: B006
    form: Annotated[
        str, typer.Option("--format", help="`text`, `mermaid`, `dot` or `svg`.")
    ] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file instead of standard output.")
    ] = None,
) -> None:
    """Draw the stages of a spec and what each of them reads."""
    from tunelang.compiler import graph
    from tunelang.compiler.drawing import (
        draw,
        svg,  # only this command needs them
    )

    forms = {"text": lambda p: draw.tree(p, _width()), "mermaid": draw.mermaid, "dot": draw.dot}
    forms["svg"] = svg.svg
    if output is not None and form == "text":
        form = {".svg": "svg", ".mmd": "mermaid", ".dot": "dot"}.get(output.suffix, form)
    if form not in forms:
        typer.echo(f"no format is called `{form}`: there is {', '.join(forms)}", err=True)
        raise typer.Exit(WRONG_COMMAND)
    text = forms[form](draw.picture(graph.build(_checked(spec, sets))))
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8")


@app.command("plan")
def plan_command(
    spec: Spec,
    sets: Sets = [],  # noqa: B006
    only: OnlyOption = [],  # noqa: B006
    until: UntilOption = [],  # noqa: B006
    force: ForceOption = [],  # noqa: B006
    on: OnOption = None,
    store: StoreOption = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the programs of every stage for the hardware, here or not."
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="All there is to say.")] = False,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Say what a run would do, and why: stages, layout, memory, cost. Runs nothing."""
    program = _checked(spec, sets, on)
    if compile:  # what does not fit is said here, and not by XLA as well
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tunelang.runtime.commands import plan_text
    from tunelang.runtime.planning import prepare  # JAX is slow to import

    with _failing(program, traceback):
        prepared = _prepared(program, spec, store, only, until, force, on)
        if as_json and compile:
            typer.echo("`--json` is of the plan alone, without `--compile`", err=True)
            raise typer.Exit(WRONG_COMMAND)
        if as_json:
            typer.echo(prepare.as_json(prepared))
        else:
            typer.echo(plan_text.show(prepared, verbose=verbose, width=_width()), nl=False)
        if compile:
            from tunelang.runtime.rehearsal import rehearse  # only this option needs it

            cache = _store(spec, store).root / "cache"
            fits = True
            twins: dict[tuple[object, ...], str] = {}
            for node in prepared.devices:
                key = rehearse.identity(prepared, node)
                if key in twins:
                    typer.echo(f"{node}  the programs of {twins[key]}")
                    continue
                twins[key] = node
                for found in rehearse.rehearse(prepared, node, cache):
                    typer.echo(plan_text.rehearsed(prepared, node, found, _width()), nl=False)
                    if rehearse.fits(prepared, node, found):
                        continue
                    fits = False
                    for remedy in rehearse.remedies(prepared, node, found, cache):
                        line = f"would fit: {remedy}"
                        typer.echo(textwrap.fill(
                            line, _width(), initial_indent="    ", subsequent_indent="      "
                        ))  # fmt: skip
                    break
            if not fits:
                raise typer.Exit(DOES_NOT_FIT)


@app.command("run")
def run_command(
    spec: Spec,
    sets: Sets = [],  # noqa: B006
    only: OnlyOption = [],  # noqa: B006
    until: UntilOption = [],  # noqa: B006
    force: ForceOption = [],  # noqa: B006
    on: OnOption = None,
    store: StoreOption = None,
    traceback: Traceback = False,
) -> None:
    """Plan a spec, and run what is not up to date; what was interrupted goes on."""
    program = _checked(spec, sets, on)
    from tunelang.runtime.commands import run  # JAX is slow to import

    gc.enable()
    with _failing(program, traceback):
        prepared = _prepared(program, spec, store, only, until, force, on)
        outcome = run.run(prepared, _store(spec, store), spec, tuple(sys.argv[1:]), _width())
    raise typer.Exit(outcome)


@app.command("show")
def show_command(
    spec: Spec,
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="A stage; without it, all.")
    ] = None,
    sets: Sets = [],  # noqa: B006
    samples: Annotated[int, typer.Option("--samples", help="Completions to show.")] = 4,
    store: StoreOption = None,
) -> None:
    """Show what the stages of a spec yielded: evaluations, metrics, completions."""
    program = _checked(spec, sets)
    from tunelang.runtime.commands import show  # only this command needs it

    with _failing(program, False):
        typer.echo(show.show(program, _store(spec, store), stage, samples, _width()), nl=False)


@app.command("generate")
def generate_command(
    spec: Spec,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage or one of its branches.")],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Without any, lines of standard input."),
    ] = None,
    sets: Sets = [],  # noqa: B006
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token, and is the default but for --best-of: 1."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest completion.")] = 256,
    top_k: Annotated[int | None, typer.Option(help="Of so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of so much probability.")] = None,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=1, help="Completions for each prompt.")
    ] = 1,
    beams: Annotated[
        int | None, typer.Option(min=1, help="Beam search: the best of so many side by side.")
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="Of beams: log-probability over length to this power; default 1."),
    ] = None,
    best_of: Annotated[
        int | None, typer.Option(min=2, help="Draw so many and print the best.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="REWARD",
            help="What is best: a declared reward; else the mean log-probability of a token.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on with the text, without a chat template.")
    ] = False,
    store: StoreOption = None,
    traceback: Traceback = False,
) -> None:
    """Complete prompts with the model that a stage yielded."""
    drawn = temperature, top_k, top_p
    for option, wrong, why in (
        ("--beams", beams and best_of, "not with --best-of"),
        ("--beams", beams and any(drawn), "draws nothing: no --temperature, --top-k, --top-p"),
        ("--length-penalty", length_penalty is not None and not beams, "only with --beams"),
        ("--best-of", best_of and temperature == 0, "at temperature 0 all are the same"),
        ("--by", by and not best_of, "only with --best-of"),
        ("--samples", samples > (beams or best_of or samples), "more than it is chosen from"),
    ):
        if wrong:
            raise typer.BadParameter(why, param_hint=option)
    program = _checked(spec, sets)
    rewards = [declared.name for declared in program.of("reward")]
    if by is not None and by not in rewards:
        known = ", ".join(f"`{name}`" for name in rewards) or "none"
        typer.echo(f"no reward is called `{by}`: the spec declares {known}", err=True)
        raise typer.Exit(WRONG_COMMAND)
    from tunelang.dsl.vocabulary.training import Sampling
    from tunelang.runtime.commands import generate  # JAX is slow to import

    if temperature is None:
        temperature = 1.0 if best_of else 0.0
    sampling = Sampling.unvalidated(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )
    with _failing(program, traceback):
        generator, reward = generate.open_ranked(
            program, _store(spec, store), stage, by, max_tokens
        )
        asked = prompts or [line.rstrip("\n") for line in sys.stdin]
        if beams:
            penalty = 1.0 if length_penalty is None else length_penalty
            texts = generator.search(
                asked, max_tokens, raw, beams=beams, length_penalty=penalty, returned=samples
            )
        elif best_of:
            texts = generate.best_of(
                generator, asked, sampling, best_of, seed, raw, returned=samples, reward=reward
            )
        else:
            texts = generator.complete(asked, sampling, samples, seed, raw)
        with reward or nullcontext():
            for text in texts:
                typer.echo(text)


@app.command("chat")
def chat_command(
    spec: Spec,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage or one of its branches.")],
    sets: Sets = [],  # noqa: B006
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    store: StoreOption = None,
    traceback: Traceback = False,
) -> None:
    """Talk to the model that a stage yielded; an empty line or Ctrl-D ends it."""
    program = _checked(spec, sets)
    from tunelang.dsl.vocabulary.training import Sampling
    from tunelang.runtime.commands import generate  # JAX is slow to import

    sampling = Sampling.unvalidated(max_tokens=max_tokens, temperature=temperature)
    with _failing(program, traceback):
        generate.chat(generate.open_generator(program, _store(spec, store), stage), sampling)


@app.command("export")
def export_command(
    spec: Spec,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A stage or one of its branches.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write.")],
    sets: Sets = [],  # noqa: B006
    apart: Annotated[
        bool, typer.Option("--apart", help="The adapter by itself, as PEFT loads it.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="f32, bf16 or f16.")] = "bf16",
    store: StoreOption = None,
    traceback: Traceback = False,
) -> None:
    """Write the model that a stage yielded as `transformers` loads it."""
    if dtype not in ("f32", "bf16", "f16"):
        raise typer.BadParameter("f32, bf16 or f16", param_hint="--dtype")
    program = _checked(spec, sets)
    from tunelang.runtime.commands import generate  # JAX is slow to import

    with _failing(program, traceback):
        for name in generate.write(program, _store(spec, store), stage, folder, apart, dtype):
            typer.echo(folder / name)


def _checked(spec: Path, sets: list[str], on: str | None = None) -> Program:
    """Return the program of a spec; ends the command where it is wrong."""
    checked = check_file(spec, sets, elsewhere=on is not None)
    report(checked.diagnostics)
    if checked.program is None:
        raise typer.Exit(WRONG_SPEC)
    return checked.program


def _store(spec: Path, given: Path | None) -> Store:
    from tunelang.runtime.store.run_store import Store, root

    return Store(root(spec, given, os.environ))


def _prepared(
    program: Program,
    spec: Path,
    store: Path | None,
    only: list[str],
    until: list[str],
    force: list[str],
    on: str | None,
) -> Prepared:
    from tunelang.compiler.layout.hardware import named
    from tunelang.runtime.planning.prepare import prepare

    hardware = {declared.name: declared.value for declared in program.of("hardware")}
    chosen = None
    if on is not None:
        try:
            chosen = hardware[on] if on in hardware else named(on)
        except ValueError as error:
            known = ", ".join(f"`{name}`" for name in hardware) or "none"
            said = f"no hardware is called `{on}`: {error}; the spec declares {known}"
            typer.echo(said, err=True)
            raise typer.Exit(WRONG_COMMAND) from None
    return prepare(program, _store(spec, store), only=only, until=until, force=force, on=chosen)


@contextmanager
def _failing(program: Program, traceback: bool) -> Iterator[None]:
    """Say what went wrong at the line of the spec, and end with the exit code for it."""
    try:
        yield
    except Exception as error:
        if traceback or isinstance(error, typer.Exit | BrokenPipeError):
            raise
        from tunelang.runtime.commands.diagnose import diagnose

        if isinstance(error, CommandError):
            typer.echo(str(error), err=True)
            raise typer.Exit(WRONG_COMMAND) from None
        diagnostic, code = diagnose(error, program)
        report([diagnostic])
        raise typer.Exit(code) from None


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 160))


def report(diagnostics: Iterable[Diagnostic]) -> None:
    """Print diagnostics to standard error, in colour on a terminal unless `NO_COLOR` is set."""
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = render.text(diagnostics, color)
    if text:
        sys.stderr.write(text)


def _stdin() -> Source:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(Source("<standard input>", ""), error)
        raise typer.Exit(WRONG_SPEC) from None
    return Source("<standard input>", text, Path())


def _read(spec: str) -> Source | None:
    try:
        return read(Path(spec))
    except (OSError, ValueError) as error:
        _refuse(Source(spec, ""), error)
        return None


def _refuse(source: Source, error: Exception) -> None:
    from tunelang.dsl.messages import malformed

    diagnostics = Diagnostics()
    diagnostics.add(malformed.unreadable(source, error))
    report(diagnostics)


def _diff(source: Source, formatted: str) -> str:
    from difflib import unified_diff  # slow to import

    before, after = source.text.splitlines(keepends=True), formatted.splitlines(keepends=True)
    return "".join(unified_diff(before, after, source.name, f"{source.name} (formatted)"))


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, with the mode that it had."""
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, "utf-8", newline="")
        beside.chmod(path.stat().st_mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _page(markdown: str) -> None:
    """Print Markdown, rendered on a terminal."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console  # slow to import
        from rich.markdown import Markdown

        Console().print(Markdown(markdown))
    else:
        typer.echo(markdown, nl=not markdown.endswith("\n"))
