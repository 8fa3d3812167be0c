"""`tune check --render`: examples as a stage reads them, with the tokens that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from pydantic import BaseModel
from rich.text import Text

from tunelang.compiler.graph import build, models_of
from tunelang.dsl.diagnostics.tune_error import CommandError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.data import DataRef
from tunelang.dsl.vocabulary.policy_stages import Policy
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.store.run_store import Store
from tunelang.runtime.tokenize.chat_renderer import Renderer

TRAINED = "bold green"
_MARKS = "⟦", "⟧"
_MOST = 600
"""Tokens shown of an example: three quarters from its beginning, the others from its end."""


class UnreadDataError(CommandError):
    """No stage reads data of this name; `known` are the names that stages read."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(run_failures.unread_data(name, known))


def preview_examples(
    program: Program, store: Store, data: str, count: int, marks: bool
) -> Iterator[Text]:
    """Yield some examples of declared data, as the first stage that reads it sees them.

    Trained tokens have the style `TRAINED`, and with `marks` stand in brackets too. Where the model
    answers itself (a policy's data, that of an evaluation), the prompt is shown. Raises
    `UnreadDataError`, and what opening data and tokenizers raises.
    """
    stage, model, prompts = _reader(program, data)
    resources = Resources(program, store.root / "cache", ())
    renderer = resources.renderer_of(model)
    stream = resources.stream(DataRef(name=data), seed=0, renderer=renderer, shuffled=False)
    for example, _ in zip(stream.once(), range(count), strict=False):
        if prompts:
            ids: Iterable[int] = renderer.prompt(example)
            mask: Iterable[bool] = (False for _ in ids)
        else:
            tokens = renderer.tokens(example)
            ids, mask = tokens.ids, tokens.mask
        pairs = list(zip(ids, mask, strict=True))
        counted = sum(trained for _, trained in pairs)
        what = "the prompt" if prompts else f"{counted:,} of them trained"
        head = f"{example.source}, row {example.row}, by {stage}: {len(pairs):,} tokens, {what}\n"
        text = Text(head, style="bold")
        if len(pairs) <= _MOST:
            yield text + _text(renderer, pairs, marks)
            continue
        begin, end = pairs[: _MOST * 3 // 4], pairs[-_MOST // 4 :]
        left_out = f"\n[{len(pairs) - _MOST:,} tokens are not shown]\n"
        yield (
            text.append_text(_text(renderer, begin, marks))
            .append(left_out)
            .append_text(_text(renderer, end, marks))
        )


def _text(renderer: Renderer, pairs: list[tuple[int, bool]], marks: bool) -> Text:
    line, begun = Text(), False
    for trained, run in groupby(pairs, key=lambda pair: pair[1]):
        text = renderer.tokenizer.decode([id for id, _ in run], continues=begun)
        begun = True
        if trained and marks:
            text = _MARKS[0] + text + _MARKS[1]
        line.append(text, style=TRAINED if trained else "dim")
    return line


def _reader(program: Program, data: str) -> tuple[str, str, bool]:
    """Return the first stage that reads the data, if possible to train on its answers; the model
    that the stage begins with; and whether it reads prompts only.
    """
    graph = build(program)
    reader: tuple[str, str, bool] | None = None
    known: dict[str, None] = {}
    for node in graph.nodes.values():
        known |= dict.fromkeys(name for noun, name in node.uses if noun == "data")
        if ("data", data) not in node.uses:
            continue
        trained = data in _names(program, getattr(node.value, "data", None))
        prompts = not trained or isinstance(node.value, Policy)
        if reader is None or (reader[2] and not prompts):
            reader = node.stage, models_of(graph, node.id)[0], prompts
    if reader is None:
        raise UnreadDataError(data, tuple(known))
    return reader


def _names(program: Program, value: object) -> Iterator[str]:
    """Yield the names of the data that an expression reads, also through other declarations."""
    if isinstance(value, DataRef):
        yield value.name
        yield from _names(program, program.declarations[value.name].value)
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _names(program, getattr(value, field))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _names(program, item)
