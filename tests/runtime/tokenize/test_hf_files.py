"""Tokenizers written as `tokenizer.json`: the ids and texts of the originals, on hard text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunelang.dsl.vocabulary import models
from tunelang.runtime.tokenize.hf_files import library_tokenizer, tokenizer_files
from tunelang.runtime.tokenize.open_tokenizer import open_renderer

LLAMA = Path(__file__).parents[4] / "shared" / "data" / "llama2-tokenizer" / "tokenizer.model"
PROSE = Path(__file__).parents[3] / "specs" / "data" / "shakespeare" / "validation.txt"
HARD = [
    "Hello world", " leading", "trailing ", " two  spaces   three", "tab\tnew\nline\r\n\n",
    "emoji 👩‍👩‍👧‍👦🇩🇪 ok", "def f(x):\n    return x**2", "1234567890123456789012345",
    "3.14159e-10", "naïve café Ångström ﬁ", "日本語 中文 한국어 العربية עברית",
    "\x00\x01\x07\x1b control", "[INST] <|im_end|>", "▁ underscore ▁▁", "a" * 300, "",
    "\u200b zero width \ufeff bom", "é e\u0301 combining", "𝕳𝖊𝖑𝖑𝖔", "￼ \ufffd",
]  # fmt: skip


def trained_kind(algorithm: str, **settings: object) -> models.Trained:
    return models.Trained.model_construct(
        data=None, vocabulary=700, algorithm=algorithm, byte_fallback=True, split_digits=True,
        **{"chat": None, "special": (), **settings},
    )  # fmt: skip


KINDS = {
    "bytes": models.Bytes(special=("<think>",)),
    "unigram": trained_kind("unigram", special=("<think>",)),
    "bpe": trained_kind("bpe", chat="chatml"),
    "llama 2": models.SentencePiece(path=str(LLAMA)),
}


@pytest.mark.parametrize("name", KINDS)
def test_written_tokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    if name == "llama 2" and not LLAMA.exists():
        pytest.skip("the model is not beside this checkout")
    renderer = open_renderer(
        KINDS[name], tmp_path, cache=tmp_path, texts=lambda: [PROSE.read_text(), *HARD]
    )
    ours, theirs = renderer.tokenizer, library_tokenizer(renderer.tokenizer)
    theirs.encode_special_tokens = True
    for text in HARD:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids), text
    for token, id in ours.special.items():
        assert theirs.token_to_id(token) == id
    assert theirs.get_vocab_size() == ours.size
    files = tokenizer_files(renderer, {}, 128)
    assert ("tokenizer.model" in files) is (name != "bytes")
