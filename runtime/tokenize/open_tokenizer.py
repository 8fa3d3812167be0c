"""Opens declared tokenizers: reads their files, or fits them to data first."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary import models
from tunelang.runtime import hub
from tunelang.runtime.store.atomic_files import replacing
from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.tokenize.chat_templates import ChatTemplate, chat_template
from tunelang.runtime.tokenize.tokenizers import Bytes, HuggingFace, SentencePiece, well_formed

# SentencePiece skips sentences above its limit without a word: longer lines are cut to this.
_SENTENCE_BYTES = 4096
_NEWLINE = "\n"

Configuration = dict[str, Any]
"""A parsed `tokenizer_config.json` or `tokenizer.json`."""


@dataclass(eq=False)
class BadTokenizerError(TuneError):
    """A tokenizer's file is missing or malformed: its `path`, and the `reason` in words."""

    code = "tokenizer-fails"
    path: Path
    reason: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.bad_tokenizer(self.path, self.reason)


@dataclass(eq=False)
class VocabularySizeError(TuneError):
    """Data cannot fill a vocabulary of `wanted`, or has more characters than fit into it.

    `possible` is the nearest size that works, all special tokens included.
    """

    code = "tokenizer-fails"
    wanted: int
    possible: int

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.vocabulary_size(self.wanted, self.possible)


def open_renderer(
    kind: models.TokenizerKind,
    folder: Path,
    *,
    cache: Path,
    texts: Callable[[], Iterable[str]] | None = None,
) -> Renderer:
    """Open the tokenizer and chat template of a declaration.

    `folder` is what its paths are relative to. `texts` gives the data of a `trained` tokenizer; the
    fitted model is kept in `cache`. The special tokens of a named template that the tokenizer lacks
    are added to it. Raises `BadTokenizerError` or `VocabularySizeError`.
    """
    published: str | None = None
    config: Configuration = {}
    source = Path()
    if isinstance(kind, models.HuggingFace):
        try:
            source = hub.folder_of(kind.path, folder, patterns=hub.DESCRIBING)
        except hub.NoModelError as error:
            raise BadTokenizerError(Path(kind.path), error.why) from None
        config = _configuration(source)
        published = config.get("chat_template")
    template = chat_template(kind.chat, published)
    added = tuple(dict.fromkeys((*template.markers, *kind.special)))
    match kind:
        case models.Bytes():
            return Renderer(Bytes(added), template, kind.special)
        case models.SentencePiece():
            path = folder / Path(kind.path).expanduser()
            piece = _sentencepiece(path, _read(path), template, added)
            return Renderer(piece, template, kind.special)
        case models.HuggingFace():
            return Renderer(_hugging_face(source, config, template, added), template, kind.special)
        case models.Trained():
            if texts is None:
                raise TypeError("a trained tokenizer needs the texts to fit it to")
            model = fit_tokenizer(kind, texts(), added, cache)
            return Renderer(SentencePiece(model, added), template, kind.special)
    raise TypeError(f"not a tokenizer: {type(kind).__name__}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadTokenizerError(path, (error.strerror or "it cannot be read").lower()) from None


def _sentencepiece(
    path: Path, model: bytes, template: ChatTemplate, added: tuple[str, ...]
) -> SentencePiece:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise BadTokenizerError(path, "it is not a SentencePiece model") from None
    size = processor.vocab_size()
    # Pieces like Gemma's `<start_of_turn>` are not marked as control, but the template makes them
    # so.
    guarded = {
        piece
        for piece in (*_marks(template.source), *added)
        if processor.piece_to_id(piece) not in (processor.unk_id(), size)
    }
    return SentencePiece(model, added, guarded)


def _marks(source: str) -> set[str]:
    """Return the words in a template's source that look like special tokens."""
    return set(re.findall(r"<\|?[\w/]+\|?>|\[/?[A-Z_]+\]", source))


def _configuration(folder: Path) -> Configuration:
    """Return `tokenizer_config.json` with the chat template, which may be in a separate file."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except FileNotFoundError:
        config = {}
    except ValueError:
        raise BadTokenizerError(folder / "tokenizer_config.json", "it is not JSON") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template}
        config["chat_template"] = named.get("default")
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        config["chat_template"] = template_file.read_text("utf-8")
    return dict(config)


def _hugging_face(
    folder: Path, config: Configuration, template: ChatTemplate, added: tuple[str, ...]
) -> HuggingFace:
    path = folder / "tokenizer.json"
    text = _read(path).decode("utf-8", "replace")

    def name(key: str) -> str | None:
        token = config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) else None

    try:
        written = json.loads(text)
        known = {token["content"] for token in written.get("added_tokens") or ()}
        return HuggingFace(
            text,
            start=name("bos_token") if _adds_start(written, name("bos_token"), template) else None,
            end=name("eos_token"),
            pad=name("pad_token"),
            added=added,
            guarded=known & set(template.markers),
        )
    except BadTokenizerError:
        raise
    except Exception:  # The library raises bare `Exception`.
        raise BadTokenizerError(path, "the tokenizers library cannot read it") from None


def _adds_start(written: Configuration, start: str | None, template: ChatTemplate) -> bool:
    """Return whether sequences begin with the start token.

    Many configurations name a `bos_token` that the model was never trained with (GPT-2's): it
    counts where the file's own post-processor or the chat template writes it.
    """
    processor = json.dumps(written.get("post_processor") or {}, ensure_ascii=False)
    mentioned = start is not None and json.dumps(start, ensure_ascii=False) in processor
    return mentioned or "bos_token" in template.source


def fit_tokenizer(
    kind: models.Trained, texts: Iterable[str], added: tuple[str, ...], cache: Path
) -> bytes:
    """Fit a SentencePiece model to texts; it is kept in `cache` by the content of the texts.

    Text is taken as it is: no normalisation, no space put in front, and line ends are a piece.
    Raises `VocabularySizeError`.
    """
    size = kind.vocabulary - len(added)
    settings = {
        "model_type": kind.algorithm,
        "vocab_size": size,
        "byte_fallback": kind.byte_fallback,
        "split_digits": kind.split_digits,
        "version": sentencepiece.__version__,
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    lines = list(_sentences(texts))
    for line in lines:
        digest.update(line.encode() + b"\n")
    path = cache / f"tokenizer-{digest.hexdigest()}.model"
    if path.exists():
        return path.read_bytes()
    model = _fit(kind, size, lines, len(added))
    with replacing(path) as temporary:
        temporary.write_bytes(model)
    return model


def _fit(kind: models.Trained, size: int, lines: list[str], added: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind.algorithm,
            vocab_size=size,
            byte_fallback=kind.byte_fallback,
            split_digits=kind.split_digits,
            character_coverage=0.9999 if kind.byte_fallback else 1.0,
            user_defined_symbols=[_NEWLINE],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            pad_id=3,
            max_sentence_length=2 * _SENTENCE_BYTES,
            # Sums over threads depend on their number: one, so that machines agree.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error)) or re.search(r"vs (\d+)", str(error))
        if limit is None:
            raise
        raise VocabularySizeError(size + added, int(limit[1]) + added) from None
    written = model.getvalue()
    if not kind.byte_fallback:
        _check_characters(written, lines, size, added)
    return written


def _check_characters(model: bytes, lines: list[str], size: int, added: int) -> None:
    """Raise `VocabularySizeError` if the model has no piece for a character of the texts."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    characters = {char for line in lines for char in line}
    lost = [char for char in characters if processor.unk_id() in processor.encode(char)]
    if lost:
        raise VocabularySizeError(size + added, size + added + len(lost))


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of texts, long ones cut: a sentence contains no line end."""
    step = _SENTENCE_BYTES // 4  # A character has at most 4 bytes.
    for text in texts:
        for line in well_formed(text).split(_NEWLINE):
            for start in range(0, len(line), step):
                yield line[start : start + step]
