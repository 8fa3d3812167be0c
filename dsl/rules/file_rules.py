"""Rules for files and folders of models and tokenizers."""

from __future__ import annotations

from pathlib import Path

from tunelang.dsl.messages import outside, wrong_values
from tunelang.dsl.program import Declared
from tunelang.dsl.rules import named_files
from tunelang.dsl.rules.rule_context import RuleContext
from tunelang.dsl.syntax.source import Span
from tunelang.dsl.vocabulary import models, types


def check_files(context: RuleContext, declared: Declared) -> None:
    """Check the files of a model or tokenizer, and the name of its chat template."""
    match declared.value:
        case models.SentencePiece(path=path):
            find_file(context, context.span(declared, "path"), path)
        case models.Pretrained():
            _check_model(context, declared, declared.value)
        case models.HuggingFace(path=path):
            _find_folder(context, context.span(declared, "path"), path)
        case models.TokenizerKind(chat=str(chat)) if "{" not in chat:
            _check_chat_name(context, declared, chat)


def find_file(context: RuleContext, span: Span, name: str) -> Path | None:
    """Return the path of a file that exists; None after a report."""
    path = context.program.folder / Path(name).expanduser()
    if path.is_file():
        return path
    if path.exists():
        context.report(outside.not_a_file(span, name, path))
    else:
        context.report(outside.missing_file(span, name, path, named_files.neighbours(path)))
    return None


def _find_folder(context: RuleContext, span: Span, name: str) -> Path | None:
    """Return the path of a folder that exists; None for an id on the hub, or after a report."""
    path = context.program.folder / Path(name).expanduser()
    if path.is_dir():
        return path
    if not types.is_hub_id(name) or path.exists():
        context.report(outside.missing_folder(span, name, path, named_files.neighbours(path)))
    return None


def _check_model(context: RuleContext, declared: Declared, model: models.Pretrained) -> None:
    span = context.span(declared, "path")
    path = _find_folder(context, span, model.path)
    if path is None:
        return
    try:
        config = named_files.model_config(path)
    except named_files.BadFile as error:
        context.report(outside.bad_file(span, model.path, error.problem, error.line))
        return
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int):
        context.context_lengths[declared.name] = longest
        if model.context is not None and model.context > longest:
            context.report(outside.context_too_long(context.span(declared, "context"), longest))


def _check_chat_name(context: RuleContext, declared: Declared, chat: str) -> None:
    """Check a chat template without a brace: no Jinja, so the name of a known one."""
    span = context.span(declared, "chat")
    known = models.NAMED_CHAT_TEMPLATES
    if chat not in known:
        context.report(wrong_values.unknown_choice(span, "`chat`", chat, known))
    elif span.text.startswith('"'):
        context.report(wrong_values.quoted_choice(span, chat))
