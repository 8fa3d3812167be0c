"""Tokenizers of bytes, SentencePiece and Hugging Face behind one interface.

`encode` reads its text as *ordinary* text: the name of a special token inside it, as a user may
type it, never becomes the special id. Only the chat renderer, which knows which part of a text the
template wrote, places special ids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import sentencepiece
import tokenizers

REPLACEMENT = "\ufffd"


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back."""

    @property
    def size(self) -> int:
        """Number of ids, which are 0 to `size - 1`."""

    @property
    def start(self) -> int | None:
        """Id that every sequence begins with, if any."""

    @property
    def end(self) -> int | None:
        """Id that ends a text, if any."""

    @property
    def pad(self) -> int:
        """Id that fills up a sequence. It may have other uses too: only masks tell padding."""

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens: text -> id; tokens that the spec adds come last."""

    @property
    def digest(self) -> str:
        """Hash of everything that the ids of a text depend on."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the ids of ordinary text.

        `continues` is for text in the middle of a sequence: no space is put in front of it, as some
        SentencePiece models do at the beginning of a text.
        """

    def decode(
        self, ids: Iterable[int], *, continues: bool = False, hide: Collection[int] = ()
    ) -> str:
        """Return the text of ids; special ids stand as their text, except those in `hide`.

        Bytes that are no UTF-8 become U+FFFD. `continues` as for `encode`.
        """


class UnknownIdError(Exception):
    """An id is outside of the vocabulary: `id` and `size`."""

    def __init__(self, id: int, size: int) -> None:
        super().__init__(id, size)
        self.id = id
        self.size = size


class Bytes:
    """Tokenizer of UTF-8 bytes: ids 0 to 255, then `<start>`, `<end>`, `<pad>`, then added ones."""

    def __init__(self, added: Sequence[str] = ()) -> None:
        self.special: Mapping[str, int] = _append(
            {"<start>": 256, "<end>": 257, "<pad>": 258}, 259, added
        )
        self.start, self.end, self.pad = 256, 257, 258
        self.size = 256 + len(self.special)
        self.digest = _digest(b"bytes", self.special)
        self._names = {id: name for name, id in self.special.items()}

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the bytes of the text; lone surrogates, which JSON can carry, become U+FFFD."""
        del continues  # A byte has no neighbours.
        return list(well_formed(text).encode("utf-8"))

    def decode(
        self, ids: Iterable[int], *, continues: bool = False, hide: Collection[int] = ()
    ) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        del continues
        parts = _runs(ids, self._names, self.size, hide)
        return "".join(
            p if isinstance(p, str) else bytes(p).decode(errors="replace") for p in parts
        )


class SentencePiece:
    """Tokenizer of a SentencePiece model; added tokens get the ids after those of the model.

    `guarded` names pieces of the model's user-defined kind that frame turns (Gemma's
    `<start_of_turn>`): SentencePiece would find them in any text, so `encode` cuts them apart.
    """

    def __init__(
        self, model: bytes, added: Sequence[str] = (), guarded: Collection[str] = ()
    ) -> None:
        self.source = model
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model)
        # A serialised message that follows another one is merged into it (protobuf's rules of
        # encoding): this one sets normalizer_spec.add_dummy_prefix (field 3 of field 3) to false.
        inner = model + b"\x1a\x02\x18\x00"
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=inner)
        model_size = self._first.vocab_size()
        control = {
            name: id
            for id in range(model_size)
            if self._first.is_control(id) or self._first.is_unknown(id)
            for name in [self._first.id_to_piece(id)]
        }
        framing = {name: self._first.piece_to_id(name) for name in guarded}
        self.special: Mapping[str, int] = _append(control | framing, model_size, added)
        self.size = model_size + sum(id >= model_size for id in self.special.values())
        self.start = _maybe(self._first.bos_id())
        self.end = _maybe(self._first.eos_id())
        pad = _maybe(self._first.pad_id())
        self.pad = max(self._first.unk_id(), 0) if pad is None else pad
        self._names = {id: name for name, id in self.special.items()}
        self._start_name = None if self.start is None else self._names.get(self.start)
        self._guarded = _any_of(guarded)
        self.digest = _digest(model, self.special)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the ids of ordinary text, guarded tokens cut apart."""
        ids: list[int] = []
        for part in _cut_apart(well_formed(text), self._guarded):
            model = self._inner if continues or ids else self._first
            ids += model.encode(part)
        return ids

    def decode(
        self, ids: Iterable[int], *, continues: bool = False, hide: Collection[int] = ()
    ) -> str:
        """Return the text of ids; the start token hides the space that the model puts in front."""
        out: list[str] = []
        for part in _runs(ids, self._names, self.size, hide):
            if isinstance(part, str):
                # The space in front of a first text belongs behind the start token only.
                continues = part != self._start_name
                out.append(part)
            else:
                out.append((self._inner if continues else self._first).decode(part))
                continues = True
        return "".join(out)


class HuggingFace:
    """Tokenizer of a `tokenizer.json`; added tokens get the ids after those of the file.

    `start` and `end` name the tokens that frame a sequence (the configuration beside the file
    says); `guarded` as for `SentencePiece`, for added tokens that the file does not mark as
    special.
    """

    def __init__(
        self,
        json: str,
        *,
        start: str | None = None,
        end: str | None = None,
        pad: str | None = None,
        added: Sequence[str] = (),
        guarded: Collection[str] = (),
    ) -> None:
        self.source = json
        self._model = tokenizers.Tokenizer.from_str(json)
        self._model.encode_special_tokens = True
        self._model.no_padding()
        self._model.no_truncation()
        vocabulary = self._model.get_vocab_size(with_added_tokens=True)
        known = self._model.get_added_tokens_decoder()
        highest = max([vocabulary - 1, *known])
        marked = {token.content: id for id, token in known.items() if token.special}
        named = (*guarded, *added, *(name for name in (start, end, pad) if name is not None))
        # A token that is there keeps its id, also where the file does not mark it as special.
        ids = {name: self._model.token_to_id(name) for name in named}
        framing = {name: id for name, id in ids.items() if id is not None}
        self.special: Mapping[str, int] = _append(marked | framing, highest + 1, added)
        self.size = max([highest, *self.special.values()]) + 1
        self.start = self._id(start)
        self.end = self._id(end)
        pads = (self._id(pad), self.end, 0)
        self.pad = next(id for id in pads if id is not None)
        self._names = {id: name for name, id in self.special.items()}
        self._start_name = None if self.start is None else self._names.get(self.start)
        self._guarded = _any_of(framing.keys() - marked.keys())
        self.digest = _digest(json.encode(), self.special)
        # A token in front of a text, taken off again, makes the model treat it as a continuation.
        self._guard = "\U0010fffd"
        self._inner = tokenizers.Tokenizer.from_str(json)
        self._inner.encode_special_tokens = True
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.add_tokens([tokenizers.AddedToken(self._guard, normalized=False)])
        self._anchor = self._model.encode(".", add_special_tokens=False).ids
        self._anchored = len(self._model.decode(self._anchor, skip_special_tokens=False))

    def _id(self, name: str | None) -> int | None:
        if name is None:
            return None
        id = self._model.token_to_id(name)
        return self.special.get(name) if id is None else id

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the ids of ordinary text, guarded tokens cut apart."""
        ids: list[int] = []
        for part in _cut_apart(well_formed(text), self._guarded):
            if (continues or ids) and self._guard not in part:
                ids += self._inner.encode(self._guard + part, add_special_tokens=False).ids[1:]
            else:
                ids += self._model.encode(part, add_special_tokens=False).ids
        return ids

    def decode(
        self, ids: Iterable[int], *, continues: bool = False, hide: Collection[int] = ()
    ) -> str:
        """Return the text of ids, decoding a continuation behind an anchor token."""
        out: list[str] = []
        for part in _runs(ids, self._names, self.size, hide):
            if isinstance(part, str):
                continues = part != self._start_name
                out.append(part)
            elif continues:
                text = self._model.decode([*self._anchor, *part], skip_special_tokens=False)
                out.append(text[self._anchored :])
            else:
                out.append(self._model.decode(part, skip_special_tokens=False))
                continues = True
        return "".join(out)


class StreamDecoder:
    """Decodes ids that arrive one by one; a character appears once all of its bytes have come."""

    # A character has at most 4 bytes: what is still incomplete after that never will be complete.
    _LONGEST = 4

    def __init__(self, tokenizer: Tokenizer, hide: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hide = hide
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, id: int) -> str:
        """Take an id, and return the text that became certain with it."""
        self._waiting.append(id)
        text = self._new(self._waiting)
        if not text.endswith(REPLACEMENT):
            return self._settle(len(self._waiting))
        if len(self._waiting) < self._LONGEST:
            return ""
        # The first bytes are no character; the last ones may begin one. Cut where that changes
        # nothing.
        for cut in range(1, len(self._waiting)):
            tail = self._tokenizer.decode(self._waiting[cut:], continues=True, hide=self._hide)
            if self._new(self._waiting[:cut]) + tail == text:
                return self._settle(cut)
        return self._settle(len(self._waiting))

    def finish(self) -> str:
        """Return the remaining text; an incomplete character becomes U+FFFD."""
        return self._settle(len(self._waiting))

    def _settle(self, count: int) -> str:
        """Move the first waiting ids to the decoded ones, and return their text."""
        text = self._new(self._waiting[:count])
        self._before, self._waiting = self._waiting[:count], self._waiting[count:]
        return text

    def _new(self, ids: list[int]) -> str:
        """Return the text that ids add; some decoders look at the id before them."""

        def decode(sequence: list[int]) -> str:
            return self._tokenizer.decode(sequence, continues=True, hide=self._hide)

        return decode(self._before + ids)[len(decode(self._before)) :]


def _append(special: dict[str, int], first: int, added: Sequence[str]) -> dict[str, int]:
    """Return the special tokens with new ones added, numbered from `first`."""
    tokens = dict(special)
    for name in added:
        if name not in tokens:
            tokens[name] = first
            first += 1
    return tokens


def _digest(model: bytes, special: Mapping[str, int]) -> str:
    digest = hashlib.blake2b(model, digest_size=16)
    digest.update(repr(sorted(special.items())).encode())
    return digest.hexdigest()


def _runs(
    ids: Iterable[int], names: Mapping[int, str], size: int, hide: Collection[int]
) -> Iterator[str | list[int]]:
    """Yield runs of ordinary ids, and the texts of the special ids between them."""
    run: list[int] = []
    for raw in ids:
        id = int(raw)  # NumPy integers come from arrays.
        if not 0 <= id < size:
            raise UnknownIdError(id, size)
        if id not in names:
            run.append(id)
            continue
        if id in hide:
            continue
        if run:
            yield run
            run = []
        yield names[id]
    if run:
        yield run


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern for any of some texts, the longest first."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _cut_apart(text: str, guarded: re.Pattern[str] | None) -> list[str]:
    """Split a text so that no part contains a complete guarded token."""
    cuts = [match.start() + 1 for match in guarded.finditer(text)] if guarded else []
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def well_formed(text: str) -> str:
    """Return a text without lone surrogates, which no UTF-8 can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _maybe(id: int) -> int | None:
    return id if id >= 0 else None
