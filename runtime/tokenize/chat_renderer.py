"""Renders examples to token ids and a loss mask, for training and for sampling alike.

The mask needs no marks in the chat template. A turn of the assistant begins where the same
conversation, cut off before it and rendered with the generation prompt, ends; it ends with the stop
token that the template writes behind a stand-in for the answer. Both are looked for in the
rendering of the whole conversation, and a template for which they are not found is an error, never
a guess. So the ids of a training example begin with exactly the ids that a sampler would be given
as its prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import FailureText
from tunelang.dsl.messages import run_failures
from tunelang.runtime.data.examples import Example, Message
from tunelang.runtime.tokenize.chat_templates import (
    ChatError,
    ChatTemplate,
    TemplateFailedError,
    render_template,
)
from tunelang.runtime.tokenize.tokenizers import Tokenizer

# Stand-ins come from a plane of Unicode that is set aside for private use.
_PRIVATE = 0xF0000
_STAND_IN = "\U0010fff0"


@dataclass(eq=False)
class EmptyMaskError(ChatError):
    """The `rendered` conversation trains nothing: no turn of the assistant has text."""

    droppable = True
    rendered: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.empty_mask(self.rendered)


@dataclass(eq=False)
class TemplateRewritesError(ChatError):
    """A template changes what came before turn `turn` (from 0) when the conversation continues.

    `expected` is how the conversation began up to that turn, `rendered` all of it.
    """

    turn: int
    expected: str
    rendered: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.template_rewrites(self.turn, self.rendered)


@dataclass(eq=False)
class TruncatedAnswerError(ChatError):
    """A template omits a part of the `answer` of turn `turn` (from 0) in `rendered`."""

    turn: int
    answer: str
    rendered: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.truncated_answer(self.answer)


@dataclass(eq=False)
class NoStopTokenError(ChatError):
    """Neither template nor tokenizer has a token that ends an answer in the `rendered` text."""

    rendered: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_stop_token()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids `[length]`; `mask[i]` says whether predicting `ids[i]` counts in the loss."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Turn:
    """Span of an assistant's turn in the text; `stopped` if a stop token ends it."""

    begin: int
    end: int
    stopped: bool


@dataclass(frozen=True)
class Renderer:
    """Tokenizer with a chat template; `added` are the special tokens that the spec declares."""

    tokenizer: Tokenizer
    template: ChatTemplate
    added: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Hash of everything that ids and masks of examples depend on."""
        start = self.tokenizer.start, self.tokenizer.end
        parts = (self.tokenizer.digest, repr(start), self.template.source, repr(self.added))
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def tokens(self, example: Example) -> Tokens:
        """Return the ids and mask of a whole example.

        Plain text: every token but the first. A conversation: every turn of the assistant with its
        stop token. Raises `EmptyMaskError`, `TemplateRewritesError`, `TruncatedAnswerError`,
        `NoStopTokenError` or `TemplateFailedError`.
        """
        if example.text is not None and example.prompt is None and example.messages is None:
            return self._plain(example.text)
        messages = messages_of(example)
        if not any(m.role == "assistant" and m.content.strip() for m in messages):
            raise EmptyMaskError(self._show(messages))
        escapes, escaped = self._escape(messages)
        rendered = self._render(escaped, generate=False)
        ids, mask, _ = self._ids(rendered, self._find_turns(escaped, rendered, escapes), escapes)
        # What a template writes behind the last answer (a line end) is not part of the example: the
        # model stops before it.
        mask[0] = False
        if not any(mask):
            raise EmptyMaskError(_unescape(rendered, escapes))
        return Tokens(tuple(ids), tuple(mask))

    def prompt(self, example: Example) -> list[int]:
        """Return the ids up to where the model's answer begins, for a sampler to continue.

        A conversation that ends with an answer is asked for that answer again.
        """
        messages = messages_of(replace(example, response=None))
        if messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        escapes, escaped = self._escape(messages)
        head = self._head(escaped)
        try:
            turns = self._find_turns(escaped, head, escapes)
        except (TemplateRewritesError, TruncatedAnswerError):
            # Templates that drop the thoughts of earlier turns do so here as well; nothing of those
            # turns is trained.
            turns = []
        ids, _, end = self._ids(head, turns, escapes)
        return ids + self._encode(head[end:], escapes, ids)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer: the one that the template writes, and the tokenizer's `end`."""
        tail = self._split(self._tail((Message("user", "a"),)))
        written = [self.tokenizer.special[p] for p in tail if p in self.tokenizer.special][:1]
        declared = [] if self.tokenizer.end is None else [self.tokenizer.end]
        return tuple(dict.fromkeys(written + declared))

    # Text.

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        names = sorted(self.tokenizer.special, key=len, reverse=True)
        # `(?!)` matches nothing: a tokenizer may have no special tokens.
        return re.compile("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")")

    def _split(self, text: str) -> list[str]:
        """Split a text into special tokens and the text between them."""
        return [part for part in self._specials.split(text) if part]

    @cached_property
    def _model_words(self) -> frozenset[str]:
        """Special tokens of the spec that the model itself writes, such as `<think>`.

        Those that frame turns in the template are not among them: they stand in front of the first
        turn's text, or behind an answer.
        """
        first = self._render((Message("user", _STAND_IN),), generate=False).partition(_STAND_IN)[0]
        frame = {*self._split(first), *self._split(self._tail((Message("user", "a"),)))}
        return frozenset(self.added) - frame - self._frame

    @property
    def _frame(self) -> set[str]:
        """Texts of the tokens that frame a sequence."""
        return {self._name(self.tokenizer.start), self._name(self.tokenizer.end)}

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id: name for name, id in self.tokenizer.special.items()}

    def _name(self, id: int | None) -> str:
        """Return the text of a special id; empty if there is none."""
        return self._names.get(id, "") if id is not None else ""

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        return render_template(
            self.template,
            messages,
            generate=generate,
            start=self._name(self.tokenizer.start),
            end=self._name(self.tokenizer.end),
        )

    def _show(self, messages: Sequence[Message]) -> str:
        """Return a rendering for an error, even if the template refuses the conversation."""
        try:
            return self._render(messages, generate=False)
        except TemplateFailedError:
            return "\n".join(message.content for message in messages)

    def _escape(self, messages: Sequence[Message]) -> tuple[dict[str, str], list[Message]]:
        """Return the messages with the names of special tokens in their text replaced by stand-ins.

        So a special token in the rendering was written by the template. Answers keep the special
        tokens that the model writes itself.
        """
        names = {
            name
            for message in messages
            for name in self._specials.findall(message.content)
            if not (message.role == "assistant" and name in self._model_words)
        }
        if not names:
            return {}, list(messages)
        used = {char for message in messages for char in message.content}
        free = (chr(code) for code in range(_PRIVATE, _PRIVATE + 0xFFF0) if chr(code) not in used)
        escapes = dict(zip(sorted(names), free, strict=False))

        def escape(message: Message) -> Message:
            keep = self._model_words if message.role == "assistant" else frozenset()
            text = self._specials.sub(
                lambda m: m[0] if m[0] in keep else escapes[m[0]], message.content
            )
            return Message(message.role, text)

        return escapes, [escape(message) for message in messages]

    # Turns.

    def _head(self, before: Sequence[Message]) -> str:
        """Return the text up to where the assistant's next turn begins."""
        if before:
            prompted = self._render(before, generate=True)
            if prompted != self._render(before, generate=False):
                return prompted
        # The template has no generation prompt: what it writes in front of an answer is one. A
        # space at its end belongs to the answer's first word, as in the words of the models'
        # vocabularies.
        answered = self._render([*before, Message("assistant", _STAND_IN)], generate=False)
        return answered.rpartition(_STAND_IN)[0].rstrip(" ")

    def _tail(self, before: Sequence[Message]) -> str:
        """Return what the template writes behind an answer."""
        return self._render([*before, Message("assistant", _STAND_IN)], generate=False).rpartition(
            _STAND_IN
        )[2]

    def _find_turns(
        self, escaped: Sequence[Message], rendered: str, escapes: Mapping[str, str]
    ) -> list[_Turn]:
        """Return the spans of the assistant's turns in the `rendered` text."""
        turns: list[_Turn] = []
        for index, message in enumerate(escaped):
            if message.role != "assistant":
                continue
            head = self._head(escaped[:index])
            upto = self._render(escaped[: index + 1], generate=False)
            begin = len(head)
            end, stopped = self._end(escaped, index, upto, begin)
            for start, rendering in ((head, upto), (head, rendered), (upto[:end], rendered)):
                if not rendering.startswith(start):
                    expected = _unescape(start, escapes)
                    raise TemplateRewritesError(index, expected, _unescape(rendering, escapes))
            if _squeezed(message.content) not in _squeezed(rendered[begin:end]):
                answer = _unescape(message.content, escapes)
                raise TruncatedAnswerError(index, answer, _unescape(rendered, escapes))
            turns.append(_Turn(begin, end, stopped))
        return turns

    def _end(
        self, messages: Sequence[Message], index: int, upto: str, begin: int
    ) -> tuple[int, bool]:
        """Return where turn `index` ends in `upto`: after its stop token, or after its text."""
        tail = self._tail(messages[:index])
        if not upto.endswith(tail):
            # The template looks at the answer; what it wrote behind it must be found by the answer.
            _, marker, tail = upto[begin:].rpartition(messages[index].content.rstrip())
            if not marker:
                raise TruncatedAnswerError(index, messages[index].content, upto)
        stop = self._specials.search(tail)
        if stop is None:
            return len(upto) - len(tail), False
        return len(upto) - len(tail) + stop.end(), True

    # Ids.

    def _ids(
        self, rendered: str, turns: Sequence[_Turn], escapes: Mapping[str, str]
    ) -> tuple[list[int], list[bool], int]:
        """Return the ids and mask up to the end of the last turn, and where that is in the text."""
        ids: list[int] = []
        mask: list[bool] = []
        end = 0
        for turn in turns:
            before, answer = rendered[end : turn.begin], rendered[turn.begin : turn.end]
            for text, trained in ((before, False), (answer, True)):
                new = self._encode(text, escapes, ids)
                ids += new
                mask += [trained] * len(new)
            end = turn.end
            if not turn.stopped:
                if self.tokenizer.end is None:
                    raise NoStopTokenError(_unescape(rendered, escapes))
                ids.append(self.tokenizer.end)
                mask.append(True)
        return ids, mask, end

    def _encode(self, text: str, escapes: Mapping[str, str], before: Sequence[int]) -> list[int]:
        """Return the ids of rendered text that follows the ids `before`; the start token stands
        first, once.
        """
        start = self.tokenizer.start
        ids: list[int] = []
        if not before and start is not None:
            ids.append(start)
        for part in self._split(text):
            special = self.tokenizer.special.get(part)
            if special is None:
                last = ids[-1] if ids else before[-1] if before else start
                continues = last is not None and last != start
                ids += self.tokenizer.encode(_unescape(part, escapes), continues=continues)
            elif not (special == start and not before and ids == [start]):
                ids.append(special)
        return ids

    def _plain(self, text: str) -> Tokens:
        """Return the tokens of plain text between start and end token."""
        words = frozenset(self.added) - self._frame
        ids = [] if self.tokenizer.start is None else [self.tokenizer.start]
        first = len(ids)
        joined: list[str] = []
        for part in self._specials.split(text):
            if part not in words:
                joined.append(part)
                continue
            ids += self._ordinary(joined, len(ids) > first)
            ids.append(self.tokenizer.special[part])
            joined = []
        ids += self._ordinary(joined, len(ids) > first)
        if not ids[first:]:
            raise EmptyMaskError(text)
        if self.tokenizer.end is not None:
            ids.append(self.tokenizer.end)
        return Tokens(tuple(ids), (False, *[True] * (len(ids) - 1)))

    def _ordinary(self, parts: Iterable[str], continues: bool) -> list[int]:
        text = "".join(parts)
        return self.tokenizer.encode(text, continues=continues) if text else []


def messages_of(example: Example) -> list[Message]:
    """Return the conversation of an example: its own, or one turn made of prompt and response. A
    response also answers a conversation that ends with another's turn.
    """
    lead = [] if example.system is None else [Message("system", example.system)]
    if example.messages is not None:
        messages = list(example.messages)
        if example.response is not None and messages[-1].role != "assistant":
            messages.append(Message("assistant", example.response))
        return lead + messages
    messages = [] if example.prompt is None else [Message("user", example.prompt)]
    if example.response is not None:
        messages.append(Message("assistant", example.response))
    return lead + messages


def _unescape(text: str, escapes: Mapping[str, str]) -> str:
    for name, stand_in in escapes.items():
        text = text.replace(stand_in, name)
    return text


def _squeezed(text: str) -> str:
    """Return a text without white space: templates may trim answers and set them off."""
    return "".join(text.split())
