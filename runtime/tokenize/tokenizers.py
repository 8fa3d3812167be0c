"""Text to token ids and back: one interface over bytes, SentencePiece and Hugging Face tokenizers.

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
    """What the rest of the runtime knows of a tokenizer."""

    @property
    def size(self) -> int:
        """The number of ids: 0 to `size - 1`."""

    @property
    def start(self) -> int | None:
        """The id that every sequence begins with, if any."""

    @property
    def end(self) -> int | None:
        """The id that ends a text, if any."""

    @property
    def pad(self) -> int:
        """The id that fills a sequence up. It may have another use: masks tell, not ids."""

    @property
    def special(self) -> Mapping[str, int]:
        """The special tokens by their text; those that the spec adds come last."""

    @property
    def digest(self) -> str:
        """Changes with anything that changes the ids of some text."""

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
    """An id outside of the vocabulary: `id` and `size`."""

    def __init__(self, id: int, size: int) -> None:
        super().__init__(id, size)
        self.id = id
        self.size = size


class Bytes:
    """One id for each byte of UTF-8, then `<start>`, `<end>`, `<pad>`, then the added tokens."""

    def __init__(self, added: Sequence[str] = ()) -> None:
        self.special: Mapping[str, int] = _append(
            {"<start>": 256, "<end>": 257, "<pad>": 258}, 259, added
        )
        self.start, self.end, self.pad = 256, 257, 258
        self.size = 256 + len(self.special)
        self.digest = _digest(b"bytes", self.special)
        self._names = {at: name for name, at in self.special.items()}

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `Tokenizer`. Lone surrogates, which JSON can carry, become U+FFFD."""
        del continues  # A byte has no neighbours.
        return list(well_formed(text).encode("utf-8"))

    def decode(
        self, ids: Iterable[int], *, continues: bool = False, hide: Collection[int] = ()
    ) -> str:
        """See `Tokenizer`."""
        del continues
        parts = _runs(ids, self._names, self.size, hide)
        return "".join(
            p if isinstance(p, str) else bytes(p).decode(errors="replace") for p in parts
        )


class SentencePiece:
    """A SentencePiece model; the added tokens get the ids after its own.

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
        pieces = self._first.vocab_size()
        own = {
            name: at
            for at in range(pieces)
            if self._first.is_control(at) or self._first.is_unknown(at)
            for name in [self._first.id_to_piece(at)]
        }
        framing = {name: self._first.piece_to_id(name) for name in guarded}
        self.special: Mapping[str, int] = _append(own | framing, pieces, added)
        self.size = pieces + sum(at >= pieces for at in self.special.values())
        self.start = _maybe(self._first.bos_id())
        self.end = _maybe(self._first.eos_id())
        pad = _maybe(self._first.pad_id())
        self.pad = max(self._first.unk_id(), 0) if pad is None else pad
        self._names = {at: name for name, at in self.special.items()}
        self._start_name = None if self.start is None else self._names.get(self.start)
        self._guarded = _any_of(guarded)
        self.digest = _digest(model, self.special)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `Tokenizer`."""
        ids: list[int] = []
        for part in _cut_apart(well_formed(text), self._guarded):
            model = self._inner if continues or ids else self._first
            ids += model.encode(part)
        return ids

    def decode(
        self, ids: Iterable[int], *, continues: bool = False, hide: Collection[int] = ()
    ) -> str:
        """See `Tokenizer`."""
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
    """A `tokenizer.json` of the tokenizers library; the added tokens get the ids after its own.

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
        own = {token.content: at for at, token in known.items() if token.special}
        named = (*guarded, *added, *(name for name in (start, end, pad) if name is not None))
        # A token that is there keeps its id, also where the file does not mark it as special.
        ids = {name: self._model.token_to_id(name) for name in named}
        framing = {name: at for name, at in ids.items() if at is not None}
        self.special: Mapping[str, int] = _append(own | framing, highest + 1, added)
        self.size = max([highest, *self.special.values()]) + 1
        self.start = self._id(start)
        self.end = self._id(end)
        pads = (self._id(pad), self.end, 0)
        self.pad = next(at for at in pads if at is not None)
        self._names = {at: name for name, at in self.special.items()}
        self._start_name = None if self.start is None else self._names.get(self.start)
        self._guarded = _any_of(framing.keys() - own.keys())
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
        at = self._model.token_to_id(name)
        return self.special.get(name) if at is None else at

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """See `Tokenizer`."""
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
        """See `Tokenizer`."""
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
    """Text from ids that arrive one by one: a character appears when all of its bytes are there."""

    # A character has at most 4 bytes: what is still incomplete after that never will be complete.
    _LONGEST = 4

    def __init__(self, tokenizer: Tokenizer, hide: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hide = hide
        self._before: list[int] = []
        self._waiting: list[int] = []

    def push(self, id: int) -> str:
        """Return the text that is certain now and was not before."""
        self._waiting.append(id)
        text = self._new(self._waiting)
        if not text.endswith(REPLACEMENT):
            return self._settle(len(self._waiting))
        if len(self._waiting) < self._LONGEST:
            return ""
        # The first bytes are no character; the last ones may begin one. Cut where that changes
        # nothing.
        for cut in range(1, len(self._waiting)):
            rest = self._tokenizer.decode(self._waiting[cut:], continues=True, hide=self._hide)
            if self._new(self._waiting[:cut]) + rest == text:
                return self._settle(cut)
        return self._settle(len(self._waiting))

    def finish(self) -> str:
        """Return what is left at the end; an incomplete character is U+FFFD."""
        return self._settle(len(self._waiting))

    def _settle(self, count: int) -> str:
        """Return the text of the first waiting ids, which wait no longer."""
        text = self._new(self._waiting[:count])
        self._before, self._waiting = self._waiting[:count], self._waiting[count:]
        return text

    def _new(self, ids: list[int]) -> str:
        """Return the text that ids add: some decoders look at the id in front."""

        def decode(whole: list[int]) -> str:
            return self._tokenizer.decode(whole, continues=True, hide=self._hide)

        return decode(self._before + ids)[len(decode(self._before)) :]


def _append(own: dict[str, int], first: int, added: Sequence[str]) -> dict[str, int]:
    """Return the special tokens with those added that are not there yet."""
    special = dict(own)
    for name in added:
        if name not in special:
            special[name] = first
            first += 1
    return special


def _digest(model: bytes, special: Mapping[str, int]) -> str:
    digest = hashlib.blake2b(model, digest_size=16)
    digest.update(repr(sorted(special.items())).encode())
    return digest.hexdigest()


def _runs(
    ids: Iterable[int], names: Mapping[int, str], size: int, hide: Collection[int]
) -> Iterator[str | list[int]]:
    """Ids as runs of ordinary ids, and the texts of the special ones between them."""
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
    """Return a text in pieces such that none holds a guarded token whole."""
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


def _maybe(at: int) -> int | None:
    return at if at >= 0 else None
