"""What goes wrong while planning or running, said at the line of the spec that it is about."""

from __future__ import annotations

from pathlib import Path

from tunelang.compiler.file_digests import ContentError
from tunelang.compiler.graph import GraphError
from tunelang.compiler.layout.layout_query import DoesNotFitError, NoLayoutError
from tunelang.compiler.layout.layout_search import MARGIN
from tunelang.compiler.layout.remedies import remedies
from tunelang.compiler.models.adapters import NoTargetError
from tunelang.compiler.models.families import UndescribedError
from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages.wording import error as message
from tunelang.dsl.program import Program
from tunelang.dsl.syntax.source import Source, Span
from tunelang.runtime.data.procedural import GeneratorError
from tunelang.runtime.data.row_errors import (
    BadRowError,
    NoRowsError,
    NotARowError,
    TooLongError,
    excerpt,
)
from tunelang.runtime.human_units import size_text
from tunelang.runtime.loading.resources import NotBuiltError
from tunelang.runtime.models.pretrained import BadWeightsError
from tunelang.runtime.pipeline.runner import HardwareMissingError, NotAlikeError, StageFailed
from tunelang.runtime.pipeline.training_stage import OtherTokenizerError
from tunelang.runtime.pipeline.weight_sources import (
    MissingInputError,
    NoCheckpointError,
    NoMetricError,
)
from tunelang.runtime.planning.prepare import LayoutError
from tunelang.runtime.rewards.judges import JudgeDownError
from tunelang.runtime.stages.export import ForeignFileError, NotApartError
from tunelang.runtime.store.atomic_files import StoreError
from tunelang.runtime.tokenize.chat_renderer import (
    EmptyMaskError,
    NoStopTokenError,
    TemplateRewritesError,
    TruncatedAnswerError,
)
from tunelang.runtime.tokenize.chat_templates import TemplateFailedError
from tunelang.runtime.tokenize.hf_files import NoTokenizerFileError
from tunelang.runtime.tokenize.open_tokenizer import BadTokenizerError, VocabularySizeError
from tunelang.runtime.training.checkpoints import CheckpointError
from tunelang.runtime.training.metrics import MissingExtraError
from tunelang.runtime.training.training_loop import DivergedError
from tunelang.runtime.user_functions import CustomError
from tunelang.runtime.workers.worker_pool import LoadError

FAILED, DOES_NOT_FIT, WRONG_SPEC = 3, 4, 1


def diagnose(error: Exception, program: Program) -> tuple[Diagnostic, int]:
    """Return what to show for an error, and the exit code of the command."""
    stage = ""
    if isinstance(error, StageFailed) and isinstance(error.__cause__, Exception):
        stage, error = error.stage, error.__cause__
    if isinstance(error, LayoutError):
        stage, error = error.stage, error.cause
    place = _Place(program, stage)
    match error:
        case DoesNotFitError():
            return _does_not_fit(error, place), DOES_NOT_FIT
        case NoLayoutError():
            where = place.attribute(error.attribute)
            return message("cannot-lay-out", error.why, where), WRONG_SPEC
        case NotAlikeError():
            what = f"`{error.first}` and `{error.other}` are not of one architecture"
            return message("not-alike", what, place.attribute("others")), WRONG_SPEC
        case OtherTokenizerError():
            what = f"`{error.name}` has another tokenizer than the model that is trained"
            return message("other-tokenizer", what, place.attribute(error.attribute)), WRONG_SPEC
        case NoTargetError():
            return _no_target(error, place), WRONG_SPEC
        case NotBuiltError():
            where = place.declared(error.title.partition(" ")[2])
            return message("not-built", f"{error.what} is not built yet", where), FAILED
        case GraphError():
            return message("cannot-lay-out", str(error), place.declared(error.stage)), WRONG_SPEC
        case _:
            return _failed(error, place), FAILED


def row_problem(cause: Exception) -> str:
    """Return in words why a row cannot be used."""
    match cause:
        case TooLongError():
            return f"{cause.length:,} tokens, and {cause.limit:,} fit"
        case NotARowError():
            return f"{cause.reason}: {cause.excerpt}"
        case EmptyMaskError():
            return f"nothing in it would be trained: {excerpt(cause.rendered)}"
        case TruncatedAnswerError():
            return f"the chat template leaves out a part of the answer: {excerpt(cause.answer)}"
        case TemplateRewritesError():
            return f"the chat template rewrites turn {cause.turn + 1}: {excerpt(cause.rendered)}"
        case NoStopTokenError():
            return "no token ends an answer: the tokenizer has none, and the template writes none"
        case TemplateFailedError():
            line = f" (line {cause.line})" if cause.line else ""
            return f"the chat template failed{line}: {cause.reason}"
    return str(cause)


class _Place:
    """Finds places in the spec."""

    def __init__(self, program: Program, stage: str) -> None:
        self.program = program
        self.stage = stage

    def attribute(self, name: str) -> Span:
        """The value of an attribute of the stage, or else the stage's name."""
        for path in (f"stage.{self.stage}.{name}", f"run.{name}"):
            origin = self.program.origins.get(path)
            if origin is not None:
                return origin.span
        return self.declared(self.stage)

    def model(self, folder: Path) -> Span:
        """The path of the model that is in a folder."""
        for each in self.program.of("model"):
            path = getattr(each.value, "path", None)
            if path is not None and folder in (Path(path), self.program.folder / path):
                return self.program.origins[f"model.{each.name}.path"].span
        return self.declared(self.stage)

    def naming(self, text: str) -> Span:
        """The first value that names something; or else the stage's name."""
        for origin in self.program.origins.values():
            if text in origin.span.text:
                return origin.span
        return self.declared(self.stage)

    def declared(self, name: str) -> Span:
        """The name of a declaration; the beginning of nothing where there is none."""
        found = self.program.declarations.get(name)
        if found is not None and found.span is not None:
            return found.span
        if name != self.stage and self.stage:
            return self.declared(self.stage)
        return Span(Source("<run>", ""), 0, 0)


def _does_not_fit(error: DoesNotFitError, place: _Place) -> Diagnostic:
    nearest, chip = error.nearest, error.query.devices.chip
    largest = sorted(nearest.memory.items(), key=lambda part: -part[1])[:4]
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    mesh = " × ".join(f"{axis} {size}" for axis, size in nearest.mesh.items() if size > 1)
    several = f", {nearest.branches} branches in one program" if nearest.branches > 1 else ""
    notes = [
        f"the smallest layout ({mesh or 'one device'}, remat {nearest.remat}{several}): {parts}"
    ]
    if error.pinned:
        notes.append(f"the spec itself decides {', '.join(f'`{name}`' for name in error.pinned)}")
    if nearest.total <= chip.memory:
        share = f"{size_text(int(MARGIN * chip.memory))}, {MARGIN:.0%} of the memory"
        notes.append(f"a plan takes no more than {share}: its estimate can be too low")
    would = [f"{what} ({size_text(size)})" for what, size in remedies(error.query)]
    nothing = "no single change would do, as far as the estimate goes"
    return message(
        "does-not-fit",
        f"`{place.stage}` needs {size_text(nearest.total)} of {size_text(chip.memory)} in a device",
        place.declared(place.stage),
        f"on {error.query.devices}",
        notes=notes,
        help=f"by the estimate it would fit with {' or '.join(would)}" if would else nothing,
    )


def _no_target(error: NoTargetError, place: _Place) -> Diagnostic:
    paths = ", ".join(f"`{path}`" for path in error.known)
    return message(
        "no-target",
        error.why or f"no matrix of the model is `{error.target}`",
        place.attribute("adapter"),
        help=f"there is {paths}",
    )


def _failed(error: Exception, place: _Place) -> Diagnostic:
    here = place.declared(place.stage)
    match error:
        case BadRowError():
            where = place.declared(error.source)
            why = row_problem(error.cause)
            return message("unusable-row", f"{error.place}: {why}", where)
        case NoRowsError():
            shown = [f"{each.place}: {row_problem(each.cause)}" for each in error.dropped.shown]
            title = f"no row of `{error.source}` can be used"
            return message("no-rows", title, place.declared(error.source), notes=shown)
        case BadWeightsError():
            title = f"the weights in `{error.path.name}` cannot be used"
            return message("weights-fail", title, place.model(error.path), notes=error.problems)
        case ForeignFileError():
            title = f"{error.path} is there, and this stage did not write it"
            fix = "another `path`, or move the file: nothing of others is ever overwritten"
            return message("export-fails", title, place.attribute("path"), help=fix)
        case NotApartError():
            fix = "`adapter = merged` writes all weights"
            title = f"the adapter cannot be written by itself: {error}"
            return message("export-fails", title, place.attribute("adapter"), help=fix)
        case UndescribedError():
            title = "no family of `transformers` that the decoder knows has this architecture"
            fix = "what can be written: swiglu and rms, with rope; as Llama, Mistral or Qwen 3"
            return message("export-fails", title, place.attribute("from"), help=fix)
        case NoTokenizerFileError():
            title = f"the tokenizer cannot be written as `tokenizer.json`: {error}"
            return message("export-fails", title, place.attribute("from"))
        case BadTokenizerError():
            return message("tokenizer-fails", f"{error.path}: {error.reason}", here)
        case VocabularySizeError():
            title = f"the data gives no vocabulary of {error.wanted:,}"
            fix = f"the nearest that works: `vocabulary = {error.possible}`"
            return message("tokenizer-fails", title, here, help=fix)
        case GeneratorError():
            title = f"the generator `{error.task}` failed: {error.reason}"
            return message("generator-fails", title, here)
        case LoadError():
            title = f"a reward cannot be loaded: {error.why.strip().splitlines()[-1]}"
            return message("reward-fails", title, place.attribute("reward"))
        case CustomError():
            title = f"{error.reference}: {error.why}"
            fix = "`--traceback` shows where in the file"
            return message("python-function", title, place.naming(error.reference), help=fix)
        case MissingExtraError():
            compiler = {"tpu": "the compiler for TPUs", "cuda": "the compiler for NVIDIA's GPUs"}
            title = f"{compiler.get(error.extra, f'the package {error.extra}')} is not installed"
            fix = f"pip install 'tunelang[{error.extra}]'"
            where = place.attribute("on" if error.extra in compiler else "track")
            return message("missing-package", title, where, help=fix)
        case JudgeDownError():
            title = f"the judge of `{error.judge}` answers nothing any more: {error.why}"
            fix = "the same command goes on from the last checkpoint"
            return message("reward-fails", title, place.declared(error.judge), help=fix)
        case DivergedError():
            title = f"the {error.name.replace('_', ' ')} of step {error.step} is no number"
            fix = "a lower learning rate or a smaller `clip_norm`; an earlier checkpoint is kept"
            return message("diverged", title, place.attribute("optimizer"), help=fix)
        case HardwareMissingError():
            title = f"`{place.stage}` runs on {error.wanted}, and here are {error.there}"
            return message("devices-missing", title, place.attribute("on"))
        case MissingInputError():
            title = f"`{error.missing}` is not done, and this run leaves it out"
            fix = f"run it first: `--until {place.stage or error.missing}`"
            return message("missing-input", title, here, help=fix)
        case NoMetricError():
            title = f"no branch of `{error.stage}` has the metric `{error.metric}`"
            known = ", ".join(f"`{name}`" for name in error.known[:12])
            return message("no-metric", title, here, help=f"there is {known}" if known else None)
        case NoCheckpointError():
            title = f"`{error.stage}` kept no checkpoint of step {error.step}"
            fix = f"run it again: `--force {error.stage}`"
            return message("no-checkpoint", title, here, help=fix)
        case CheckpointError(what="read"):
            fix = f"remove {error.path} to go on from the one before, or `--force {place.stage}`"
            return message("store-fails", str(error), here, help=fix)
        case StoreError() | ContentError():
            return message("store-fails", str(error), here)
        case OSError():
            return message("store-fails", f"{error.filename}: {error.strerror}", here)
    text = str(error).strip().splitlines()
    title = f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
    return message("stage-fails", title, here, help="`--traceback` shows where in the program")
