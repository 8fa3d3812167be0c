"""Sentences of the errors that arise while a spec is planned or run.

One function for each error; its arguments are the facts. The errors themselves derive from
`TuneError` and stand beside what raises them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tunelang.dsl.diagnostics.tune_error import FailureText
from tunelang.dsl.messages.human_units import size_text
from tunelang.dsl.messages.wording import listed, plural

_AT_FAULT = "`--traceback` shows where in the program"
_LONGEST_EXCERPT = 80
_LISTED_METRICS = 12
_LONGEST_TITLE = 200


# Planning.


def does_not_fit(
    stage: str,
    needed: int,
    memory: int,
    usable: int,
    devices: str,
    layout: str,
    parts: Mapping[str, int],
    pinned: Sequence[str],
    remedies: Iterable[tuple[str, int]],
) -> FailureText:
    """Say that no layout fits: `layout` is the smallest, which needs `needed` bytes in its
    `parts`; a device has `memory`, of which a plan takes `usable`. A remedy comes with the
    bytes it needs.
    """
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    shares = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    notes = [f"the smallest layout ({layout}): {shares}"]
    if pinned:
        notes.append(f"the spec sets {listed(pinned)}")
    if needed <= memory:
        notes.append(
            f"a plan uses at most {size_text(usable)}, {usable / memory:.0%} of the memory:"
            " its estimate can be too low"
        )
    fitting = [f"{change} ({size_text(size)})" for change, size in remedies]
    return FailureText(
        title=f"`{stage}` needs {size_text(needed)} of {size_text(memory)} in a device",
        help=(
            f"by the estimate it would fit with {' or '.join(fitting)}"
            if fitting
            else "by the estimate, no single change would make it fit"
        ),
        notes=notes,
        label=f"on {devices}",
    )


def no_layout(why: str) -> FailureText:
    """Say that a value of the spec contradicts the devices, the batch or the model."""
    return FailureText(why)


def no_graph(stage: str, problem: str) -> FailureText:
    """Say that the graph of stages cannot be built."""
    return FailureText(f"`{stage}` {problem}")


def no_target(target: str, known: Sequence[str], why: str) -> FailureText:
    """Say that an adapter's target is no matrix of the model, or one that the adapter cannot
    be on.
    """
    title = why or f"no matrix of the model is called `{target}`"
    return FailureText(title, help=f"the model has {listed(known)}")


# Preparing a run.


def not_built(feature: str) -> FailureText:
    """Say that this version cannot run a feature of the language."""
    return FailureText(f"{feature} is not supported yet")


def devices_missing(stage: str, wanted: str, available: str) -> FailureText:
    """Say that this machine lacks the hardware of a stage."""
    return FailureText(f"`{stage}` runs on {wanted}, but this machine has {available}")


_COMPILERS = {"tpu": "the compiler for TPUs", "cuda": "the compiler for NVIDIA GPUs"}


def missing_extra(extra: str) -> FailureText:
    """Say that an optional package is not installed, and name the `extra` that installs it."""
    package = _COMPILERS.get(extra, f"the package `{extra}`")
    return FailureText(f"{package} is not installed", help=f"pip install 'tunelang[{extra}]'")


def missing_input(missing: str, stage: str) -> FailureText:
    """Say that a stage reads another that is neither done nor part of this run."""
    return FailureText(
        f"`{missing}` is not done, and this command does not run it",
        help=f"run it first: `tune run SPEC --until {stage or missing}`",
    )


def no_metric(stage: str, metric: str, known: Sequence[str]) -> FailureText:
    """Say that no branch of a sweep has the metric that decides it."""
    shown = listed(known[:_LISTED_METRICS])
    return FailureText(
        f"no branch of `{stage}` has the metric `{metric}`",
        help=f"the metrics are {shown}" if known else None,
    )


def no_checkpoint(stage: str, step: int) -> FailureText:
    """Say that a stage starts from a step whose checkpoint was not kept."""
    return FailureText(
        f"`{stage}` has no checkpoint of step {step}",
        help=f"run it again: `tune run SPEC --force {stage}`",
    )


def not_alike(first: str, other: str) -> FailureText:
    """Say that two models to merge have different architectures."""
    return FailureText(f"`{first}` and `{other}` do not have the same architecture")


def other_tokenizer(name: str) -> FailureText:
    """Say that a teacher or value model has another tokenizer than the trained model."""
    return FailureText(f"`{name}` does not have the tokenizer of the model that is trained")


def bad_weights(folder: str, problems: Sequence[str]) -> FailureText:
    """Say that the weights of a pretrained model cannot be used."""
    return FailureText(f"the weights in `{folder}` cannot be used", notes=problems)


def bad_tokenizer(path: Path, reason: str) -> FailureText:
    """Say that the file of a tokenizer is missing or cannot be read."""
    return FailureText(f"{path}: {reason}")


def vocabulary_size(wanted: int, possible: int) -> FailureText:
    """Say that a tokenizer of the wanted size cannot be trained on the data."""
    return FailureText(
        f"the data does not yield a vocabulary of {wanted:,} tokens",
        help=f"the nearest size that works: `vocabulary = {possible}`",
    )


# Data.


def no_row(reason: str, excerpt: str) -> FailureText:
    """Say that a line of a file is no row."""
    return FailureText(f"{reason}: {excerpt}")


def too_long(length: int, limit: int) -> FailureText:
    """Say that a row has more tokens than fit."""
    return FailureText(f"{length:,} tokens, but only {limit:,} fit")


def missing_field(name: str, known: Sequence[str]) -> FailureText:
    """Say that a row lacks a field."""
    among = ", ".join(f"`{each}`" for each in known)
    return FailureText(f"no field `{name}` among {among}" if known else f"no field `{name}`")


_JSON_TYPES = {
    "NoneType": "null", "str": "text", "int": "a number", "float": "a number",
    "bool": "true or false", "list": "a list", "tuple": "a list", "dict": "an object",
}  # fmt: skip


def wrong_type(name: str, expected: str, value: object) -> FailureText:
    """Say that the value of a field has the wrong type."""
    actual = _JSON_TYPES.get(type(value).__name__, type(value).__name__)
    return FailureText(f"field `{name}` is {actual}, not {expected}")


def empty_mask(rendered: str) -> FailureText:
    """Say that a conversation has no token to train on."""
    return FailureText(f"no token of it would be trained: {excerpt(rendered)}")


def truncated_answer(answer: str) -> FailureText:
    """Say that a chat template omits a part of an answer."""
    return FailureText(f"the chat template leaves out a part of the answer: {excerpt(answer)}")


def template_rewrites(turn: int, rendered: str) -> FailureText:
    """Say that a chat template changes a turn (from 0) when the conversation continues."""
    return FailureText(f"the chat template rewrites turn {turn + 1}: {excerpt(rendered)}")


def no_stop_token() -> FailureText:
    """Say that neither the tokenizer nor the chat template has a token that ends an answer."""
    return FailureText(
        "no token ends an answer: the tokenizer has none, and the chat template writes none"
    )


def template_failed(reason: str, line: int | None) -> FailureText:
    """Say that a chat template does not parse, or raises an error."""
    where = f" (line {line})" if line else ""
    return FailureText(f"the chat template failed{where}: {reason}")


def bad_row(place: str, problem: str) -> FailureText:
    """Say that a row cannot be used, and that its policy is to stop."""
    return FailureText(f"{place}: {problem}")


def no_rows(source: str, rows: Sequence[tuple[str, str]]) -> FailureText:
    """Say that no row of the data can be used; `rows` are places and problems of the first."""
    notes = [f"{place}: {problem}" for place, problem in rows]
    if not rows:
        return FailureText(
            f"no row of `{source}` is left after `where`, `take`, `skip` and `split`"
        )
    return FailureText(f"no row of `{source}` can be used", notes=notes)


def dropped_rows(count: int) -> str:
    """Warn that rows of the data were dropped."""
    return f"warning: {plural(count, 'row')} {'was' if count == 1 else 'were'} dropped"


def generator_failed(task: str, reason: str) -> FailureText:
    """Say that a generator of procedural data refused its settings or raised an error."""
    return FailureText(f"the generator `{task}` failed", notes=[reason])


def excerpt(value: object) -> str:
    """Return the beginning of a value as a report shows it."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST_EXCERPT else text[: _LONGEST_EXCERPT - 1] + "…"


# Functions of the user, rewards and judges.


def python_function(reference: str, why: str) -> FailureText:
    """Say that a Python function cannot be loaded, failed, or returned a wrong value."""
    return FailureText(f"{reference}: {why}", help="`--traceback` shows where in the file")


def reward_not_loaded(why: str) -> FailureText:
    """Say that a reward function or judge cannot be loaded; the last line of `why` is the
    reason.
    """
    return FailureText("a reward cannot be loaded", notes=[why.strip().splitlines()[-1]])


def judge_down(judge: str, why: str) -> FailureText:
    """Say that a judge answered none of its requests."""
    return FailureText(
        f"the judge of `{judge}` no longer answers: {why}",
        help="run the same command to continue from the last checkpoint",
    )


def unscored(part: str, why: str) -> str:
    """Say that a reward has no score for any completion of `tune generate`."""
    return f"the reward scores no completion: {part}: {why}"


# Training and its results.


def diverged(metric: str, step: int) -> FailureText:
    """Say that a metric became infinite or not a number."""
    return FailureText(
        f"the {metric.replace('_', ' ')} of step {step} is not a finite number",
        help="try a lower learning rate or a smaller `clip_norm`; the last checkpoint is kept",
    )


def foreign_file(path: Path) -> FailureText:
    """Say that an export would overwrite a file that it did not write."""
    return FailureText(
        f"{path} exists, and this stage did not write it",
        help="choose another `path`, or move the file: other files are never overwritten",
    )


def adapter_not_separable(why: str) -> FailureText:
    """Say that an adapter cannot be exported without the model's weights."""
    return FailureText(
        "the adapter cannot be written by itself",
        help="`adapter = merged` writes all weights",
        notes=[why],
    )


def no_family() -> FailureText:
    """Say that no family of `transformers` has the architecture of the model."""
    return FailureText(
        "no family of `transformers` that `tune` writes has this architecture",
        help="it writes models with swiglu, rms and rope, as Llama, Mistral or Qwen 3",
    )


def no_tokenizer_file(why: str) -> FailureText:
    """Say that a tokenizer cannot be written as `tokenizer.json`."""
    return FailureText(f"the tokenizer cannot be written as `tokenizer.json`: {why}")


def store_failed(action: str, path: Path, reason: str) -> FailureText:
    """Say that the store could not read, write or lock a file."""
    return FailureText(f"cannot {action} {path}: {reason}")


def checkpoint_failed(action: str, path: Path, reason: str, stage: str) -> FailureText:
    """Say that a checkpoint cannot be written or read."""
    remedy = f"remove {path} to continue from the checkpoint before, or `--force {stage}`"
    return FailureText(
        f"cannot {action} {path}: {reason}", help=remedy if action == "read" else None
    )


def unreadable(path: object, reason: str | None) -> FailureText:
    """Say that a file of the spec cannot be read."""
    return FailureText(f"{path}: {reason}")


def unexpected(kind: str, message: str) -> FailureText:
    """Report an error without a class of its own: the name of its type, and its text."""
    lines = message.strip().splitlines()
    title = f"{kind}: {lines[0][:_LONGEST_TITLE]}" if lines else kind
    return FailureText(title, help=_AT_FAULT)


# What a command line names.


def unknown_stage(name: str, known: Sequence[str]) -> str:
    """Say that no stage has the name."""
    return f"no stage is called `{name}`: the spec has {listed(known) or 'none'}"


def unknown_reward(name: str, known: Sequence[str]) -> str:
    """Say that no reward has the name."""
    return f"no reward is called `{name}`: the spec declares {listed(known) or 'none'}"


def unread_data(name: str, known: Sequence[str]) -> str:
    """Say that no stage reads data of the name."""
    return f"no stage reads data called `{name}`: the stages read {listed(known) or 'none'}"


def unknown_hardware(name: str, why: str, known: Sequence[str]) -> str:
    """Say that a name is neither declared nor a known hardware."""
    declared = listed(known) or "none"
    return f"no hardware is called `{name}`: {why}; the spec declares {declared}"
