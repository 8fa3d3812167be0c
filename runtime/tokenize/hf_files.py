"""Converts tokenizers to the files that `transformers` reads: `tokenizer.json` and others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.runtime.tokenize.chat_renderer import Renderer
from tunelang.runtime.tokenize.tokenizers import Bytes, HuggingFace, SentencePiece, Tokenizer

_SPACE = "\u2581"
"""Character that stands for a space in SentencePiece models."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Types of pieces (`sentencepiece_model.proto`)."""
_UNIGRAM, _BPE, _WORD = 1, 2, 3
"""Types of models."""


@dataclass(eq=False)
class NoTokenizerFileError(TuneError):
    """A tokenizer cannot be written as `tokenizer.json`; `why` in words."""

    code = "export-fails"
    why: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_tokenizer_file(self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="from")


def tokenizer_files(
    renderer: Renderer, published: Mapping[str, object], context: int
) -> dict[str, bytes]:
    """Return name -> content of the files of a tokenizer with its chat template.

    `published` is the `tokenizer_config.json` that the tokenizer came with, if any. Raises
    `NoTokenizerFileError`.
    """
    tokenizer = renderer.tokenizer
    target = library_tokenizer(tokenizer)
    names = {id: name for name, id in tokenizer.special.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{name: value for name, value in published.items() if name != "chat_template"},
    }
    roles = {"bos_token": tokenizer.start, "eos_token": tokenizer.end, "pad_token": tokenizer.pad}
    for role, id in roles.items():
        if role not in published and id is not None and id in names:
            config[role] = names[id]
    template = renderer.template.source
    if tokenizer.start is not None and "bos_token" not in template and not published:
        template = "{{- bos_token -}}\n" + template
    files = {
        "tokenizer.json": target.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "chat_template.jinja": template.encode(),
    }
    if isinstance(tokenizer, SentencePiece):
        files["tokenizer.model"] = tokenizer.source
    return files


def library_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer of the tokenizers library with the same ids.

    Raises `NoTokenizerFileError`.
    """
    match tokenizer:
        case HuggingFace():
            target = tokenizers.Tokenizer.from_str(tokenizer.source)
        case Bytes():
            target = _bytes()
        case SentencePiece():
            target = _sentencepiece(tokenizer.source)
        case _:
            raise TypeError(f"not a tokenizer: {type(tokenizer).__name__}")
    # In the order of their ids, which the library hands out one after another.
    for name, id in sorted(tokenizer.special.items(), key=lambda item: item[1]):
        target.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        if target.token_to_id(name) != id:
            raise NoTokenizerFileError(f"`{name}` would not keep its id")
    if not isinstance(tokenizer, HuggingFace) and tokenizer.start is not None:
        name = next(n for n, id in tokenizer.special.items() if id == tokenizer.start)
        target.post_processor = processors.TemplateProcessing(
            single=f"{name} $A",
            pair=f"{name} $A $B:1",
            special_tokens=[(name, tokenizer.start)],
        )
    return target


def _bytes() -> tokenizers.Tokenizer:
    """Return a tokenizer with one id for each byte: a model of byte pairs without merges."""
    vocabulary = {char: byte for byte, char in _byte_characters()}
    target = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    target.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    target.decoder = decoders.ByteLevel()
    return target


def _byte_characters() -> Iterator[tuple[int, str]]:
    """Yield each byte with the character that stands for it in models of bytes (GPT-2's)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = 0
    for byte in range(256):
        if byte in shown:
            yield byte, chr(byte)
        else:
            yield byte, chr(256 + hidden)
            hidden += 1


def _sentencepiece(source: bytes) -> tokenizers.Tokenizer:
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(source)
    entries, trainer, rules = proto.pieces, proto.trainer_spec, proto.normalizer_spec
    unknown = next((index for index, piece in enumerate(entries) if piece.type == _UNKNOWN), None)
    marked = rules.escape_whitespaces and not trainer.treat_whitespace_as_suffix
    if trainer.model_type == _WORD or not marked:
        raise NoTokenizerFileError("a SentencePiece model of words, or without a mark before words")
    if trainer.model_type == _UNIGRAM:
        # The names of control pieces and of bytes are ordinary text: no path may go through them.
        never = min(piece.score for piece in entries) - 100
        vocabulary = [
            (p.piece, never if p.type in (_UNKNOWN, _CONTROL, _BYTE) else p.score) for p in entries
        ]
        model: models.Model = models.Unigram(vocabulary, unknown, trainer.byte_fallback)
    else:
        ids = {piece.piece: index for index, piece in enumerate(entries)}
        model = models.BPE(
            vocab=ids,
            merges=_merges(proto) if trainer.model_type == _BPE else [],
            unk_token=None if unknown is None else entries[unknown].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    target = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    target.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back: list[decoders.Decoder] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if rules.add_dummy_prefix:
        back.append(decoders.Strip(" ", 1, 0))
    target.decoder = decoders.Sequence(back)
    for piece in entries:
        if piece.type == _CONTROL or piece.type == _UNKNOWN:
            target.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == _USER_DEFINED:
            target.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    return target


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return the merges of a model of byte pairs: each makes a piece; highest score first."""
    ranks = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    merges = []
    for piece, score in ranks.items():
        halves = [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in ranks and piece[cut:] in ranks
        ]
        merges += [(-score, -ranks[left], -ranks[right], (left, right)) for left, right in halves]
    return [half for *_, half in sorted(merges)]
