"""The command `tune`: options, and one call for each command.

Commands import what they need when they are called: `tune check` must answer at once, and what
`main` sets has to be set before the first import of pydantic and JAX.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from tunelang.runtime.commands import options

app = typer.Typer(
    name="tune",
    help="Declarative post-training of language models on JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the command."""
    # Pydantic looks for plug-ins in the metadata of every installed package, and collections of
    # garbage find nothing while classes and a spec's tree are made: without both a short command
    # starts in half the time.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.disable()
    # A collective holds a thread until all devices have come to it, and XLA makes only a thread a
    # core: independent collectives of simulated devices would wait for each other for ever.
    simulated = re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if simulated:
        os.environ.setdefault("PJRT_NPROC", str(8 * int(simulated[1])))
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

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
    specs: options.Specs,
    sets: options.Sets = [],  # noqa: B006  (typer reads the default, nobody changes it)
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
    count: Annotated[
        int, typer.Option("-n", min=1, metavar="COUNT", help="Examples to print with --render.")
    ] = 3,
    as_json: options.Json = False,
) -> None:
    """Check specs without running anything. Exit code 1 if one of them has an error."""
    from tunelang.runtime.commands import check_specs

    if data is not None:
        check_specs.render_examples(specs, sets, data, count)
    else:
        raise typer.Exit(check_specs.check_specs(specs, sets, show, as_json))


@app.command("fmt")
def fmt_command(
    specs: options.Specs,
    only_check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 1 if a file would change.")
    ] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Change nothing; print what would change.")
    ] = False,
) -> None:
    """Format specs in place; `-` formats standard input to standard output."""
    from tunelang.runtime.commands.format_specs import format_specs

    raise typer.Exit(format_specs(specs, only_check, diff))


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
    """Explain a word of the language or a diagnostic code."""
    from tunelang.runtime.commands.explain_word import explain_word

    explain_word(name, everything)


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of a resolved spec, as `tune check --show --json` prints it."""
    from tunelang.dsl.reference.schema import schema

    typer.echo(json.dumps(schema(), indent=2, ensure_ascii=False))


@app.command("graph")
def graph_command(
    spec: options.Spec,
    sets: options.Sets = [],  # noqa: B006
    form: Annotated[
        str, typer.Option("--format", help="`text`, `mermaid`, `dot` or `svg`.")
    ] = "text",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file instead of standard output.")
    ] = None,
) -> None:
    """Draw the stages of a spec and what each of them reads."""
    from tunelang.runtime.commands import draw_graph, terminal

    draw_graph.draw_graph(terminal.check_program(spec, sets), form, output)


@app.command("plan")
def plan_command(
    spec: options.Spec,
    sets: options.Sets = [],  # noqa: B006
    only: options.Only = [],  # noqa: B006
    until: options.Until = [],  # noqa: B006
    force: options.Force = [],  # noqa: B006
    on: options.On = None,
    store: options.Store = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the programs of every stage for the hardware, which need not be here.",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print all details of each stage.")
    ] = False,
    as_json: options.Json = False,
    traceback: options.Traceback = False,
) -> None:
    """Show what a run would do, and why: stages, layout, memory, cost. Runs nothing."""
    from tunelang.runtime.commands import terminal

    if as_json and compile:
        terminal.refuse("`--json` prints the plan alone, without `--compile`")
    program = terminal.check_program(spec, sets, on)
    if compile:  # the command itself reports what does not fit; XLA need not as well
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tunelang.runtime.commands import make_plan

    with terminal.reporting_errors(program, traceback):
        choice = make_plan.PlanOptions(spec, store, only, until, force, on)
        prepared = make_plan.show_plan(program, choice, verbose, as_json)
        if compile:
            make_plan.show_compiled(prepared, terminal.open_store(spec, store).root / "cache")


@app.command("run")
def run_command(
    spec: options.Spec,
    sets: options.Sets = [],  # noqa: B006
    only: options.Only = [],  # noqa: B006
    until: options.Until = [],  # noqa: B006
    force: options.Force = [],  # noqa: B006
    on: options.On = None,
    store: options.Store = None,
    traceback: options.Traceback = False,
) -> None:
    """Run the stages that are not up to date; an interrupted run continues."""
    from tunelang.runtime.commands import terminal

    program = terminal.check_program(spec, sets, on)
    from tunelang.runtime.commands import make_plan, run

    gc.enable()
    with terminal.reporting_errors(program, traceback):
        choice = make_plan.PlanOptions(spec, store, only, until, force, on)
        prepared = make_plan.make_plan(program, choice)
        folder = terminal.open_store(spec, store)
        code = run.run(prepared, folder, spec, tuple(sys.argv[1:]), terminal.width())
    raise typer.Exit(code)


@app.command("show")
def show_command(
    spec: options.Spec,
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="A stage; without it, all.")
    ] = None,
    sets: options.Sets = [],  # noqa: B006
    samples: Annotated[int, typer.Option("--samples", help="Completions to show.")] = 4,
    store: options.Store = None,
) -> None:
    """Show the results of stages: evaluations, metrics, completions."""
    from tunelang.runtime.commands import show, terminal

    program = terminal.check_program(spec, sets)
    with terminal.reporting_errors(program):
        folder = terminal.open_store(spec, store)
        typer.echo(show.show(program, folder, stage, samples, terminal.width()), nl=False)


@app.command("generate")
def generate_command(
    spec: options.Spec,
    stage: options.Stage,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Without any, lines of standard input."),
    ] = None,
    sets: options.Sets = [],  # noqa: B006
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token. Default 0; 1 with --best-of."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest completion, in tokens.")] = 256,
    top_k: Annotated[
        int | None, typer.Option(help="Sample only from this many likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample only from the likeliest tokens of this total probability."),
    ] = None,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=1, help="Completions to print for each prompt.")
    ] = 1,
    beams: Annotated[int | None, typer.Option(min=1, help="Search with this many beams.")] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(
            help="Rank beams by log-probability divided by length to this power; default 1."
        ),
    ] = None,
    best_of: Annotated[
        int | None, typer.Option(min=2, help="Sample this many completions and print the best.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="REWARD",
            help="Rank by a declared reward; else by the mean log-probability of a token.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    store: options.Store = None,
    traceback: options.Traceback = False,
) -> None:
    """Complete prompts with the model that a stage yielded."""
    from tunelang.runtime.commands import terminal

    program = terminal.check_program(spec, sets)
    from tunelang.runtime.commands.completions import GenerateOptions, completions

    choice = GenerateOptions(
        temperature=temperature, max_tokens=max_tokens, top_k=top_k, top_p=top_p, samples=samples,
        beams=beams, length_penalty=length_penalty, best_of=best_of, by=by, seed=seed, raw=raw,
    )  # fmt: skip
    choice.check(program)
    with terminal.reporting_errors(program, traceback):
        folder = terminal.open_store(spec, store)
        for text in completions(program, folder, stage, prompts or (), choice):
            typer.echo(text)


@app.command("chat")
def chat_command(
    spec: options.Spec,
    stage: options.Stage,
    sets: options.Sets = [],  # noqa: B006
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    store: options.Store = None,
    traceback: options.Traceback = False,
) -> None:
    """Chat with the model that a stage yielded; an empty line or Ctrl-D ends it."""
    from tunelang.runtime.commands import terminal

    program = terminal.check_program(spec, sets)
    from tunelang.dsl.vocabulary.training import Sampling
    from tunelang.runtime.commands import generate

    sampling = Sampling.unvalidated(max_tokens=max_tokens, temperature=temperature)
    with terminal.reporting_errors(program, traceback):
        folder = terminal.open_store(spec, store)
        generate.chat(generate.open_generator(program, folder, stage), sampling)


@app.command("export")
def export_command(
    spec: options.Spec,
    stage: options.Stage,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write.")],
    sets: options.Sets = [],  # noqa: B006
    apart: Annotated[
        bool, typer.Option("--apart", help="The adapter by itself, as PEFT loads it.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="f32, bf16 or f16.")] = "bf16",
    store: options.Store = None,
    traceback: options.Traceback = False,
) -> None:
    """Write the model that a stage yielded as `transformers` loads it."""
    if dtype not in ("f32", "bf16", "f16"):
        raise typer.BadParameter("f32, bf16 or f16", param_hint="--dtype")
    from tunelang.runtime.commands import terminal

    program = terminal.check_program(spec, sets)
    from tunelang.runtime.commands import generate

    with terminal.reporting_errors(program, traceback):
        opened = terminal.open_store(spec, store)
        for name in generate.write(program, opened, stage, folder, apart, dtype):
            typer.echo(folder / name)
