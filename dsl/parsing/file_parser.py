"""The parser: tokens to a syntax tree, item by item, so that an error leaves other items intact."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lark.exceptions import UnexpectedToken

from tunelang.dsl.diagnostics.diagnostic import Diagnostic
from tunelang.dsl.messages import imports_and_overrides, malformed, unexpected_tokens
from tunelang.dsl.parsing.item_parser import parse_item
from tunelang.dsl.parsing.lexer import lex
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.tokens import CLOSING_BRACKETS, KEYWORDS, OPENING_BRACKETS, Comment, Lexeme

MAX_SYNTAX_ERRORS = 20
MAX_DEPTH = 100
_CONTINUES = {
    "PLUS", "MINUS", "STAR", "SLASH", "COMPARE", "AND", "OR", "NOT", "IF", "ELSE", "DOT",
}  # fmt: skip


class _Unreadable(Exception):
    """Nothing of an item remains without its errors."""


@dataclass
class _State:
    source: Source
    diagnostics: list[Diagnostic] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    unreadable: list[Span] = field(default_factory=list)

    def report(self, diagnostic: Diagnostic) -> None:
        self.diagnostics.append(diagnostic)
        if len(self.diagnostics) >= MAX_SYNTAX_ERRORS:
            raise _Unreadable


def parse(source: Source) -> tuple[nodes.File, list[Diagnostic]]:
    """Return a source as a syntax tree, with all errors of its syntax.

    Never raises for bad text: items that cannot be read are left out and reported.
    """
    lexed = lex(source)
    state = _State(source, lexed.diagnostics[:MAX_SYNTAX_ERRORS], unreadable=lexed.unreadable)
    docs = _docs(lexed.comments, source)
    items: list[nodes.Item] = []
    for chunk in _cut(lexed.tokens, state):
        if len(state.diagnostics) >= MAX_SYNTAX_ERRORS:
            state.diagnostics[-1] = malformed.too_many_errors(chunk[0].span)
            state.broken.update(token.text for token in lexed.tokens if token.type == "NAME")
            break
        item = _read_item(chunk, state)
        if isinstance(item, nodes.Declaration):
            item = replace(item, doc=docs.get(chunk[0].line, ""))
        if item is not None:
            items.append(item)
    tree = nodes.File(source, tuple(items), tuple(lexed.comments), frozenset(state.broken))
    return tree, state.diagnostics


def parse_expression(source: Source) -> tuple[nodes.Expr | None, list[Diagnostic]]:
    """Parse the right side of a `--set name=expression` by the same grammar; the source is
    the whole option.
    """
    lexed = lex(source)
    state = _State(source, lexed.diagnostics)
    if len(lexed.tokens) < 3:
        end = len(source.text)
        state.diagnostics.append(malformed.no_value(Span(source, end, end)))
        return None, state.diagnostics
    start = next(
        (index for index, token in enumerate(lexed.tokens) if token.type == "EQUALS"), None
    )
    if start is None:  # `a==b`
        state.diagnostics.append(
            imports_and_overrides.bad_override(Span(source, 0, len(source.text)))
        )
        return None, state.diagnostics
    noun = Lexeme("NAME", Span(source, 0, 0), 0)
    item = _read_item([noun, noun, *lexed.tokens[start:]], state)
    return (item.value if isinstance(item, nodes.Declaration) else None), state.diagnostics


def _docs(comments: list[Comment], source: Source) -> dict[int, str]:
    """Return the text of each run of `##` lines by the line after it."""
    docs: dict[int, str] = {}
    for comment in comments:
        if comment.alone and comment.text.startswith("##"):
            line = source.position(comment.span.start)[0]
            docs[line + 1] = f"{docs.pop(line, '')}\n{comment.text[2:].strip()}".strip()
    return docs


def _starts_item(tokens: list[Lexeme], index: int) -> bool:
    """Return whether an item starts here: two names and `:` or `=`, an import, a run block."""
    token = tokens[index]
    if token.type != "NAME" or (index and tokens[index - 1].last_line == token.line):
        return False
    kinds = [t.type for t in tokens[index + 1 : index + 3] if t.line == token.line]
    if token.text == "import":
        return kinds[:1] == ["TEXT"]
    if token.text == "run":
        return kinds[:1] == ["LBRACE"]
    named = kinds[:1] == ["NAME"] or (kinds and tokens[index + 1].text in KEYWORDS)
    return bool(named) and kinds[1:] in (["COLON"], ["EQUALS"], ["LBRACE"])


def _chunks(tokens: list[Lexeme], state: _State) -> list[list[Lexeme]]:
    """Divide the tokens into items: before each start of an item, and at line ends outside of
    brackets.
    """
    chunks: list[list[Lexeme]] = []
    stack: list[str] = []
    resume: tuple[list[Lexeme], list[str]] | None = None
    for index, token in enumerate(tokens):
        new_line = index > 0 and tokens[index - 1].last_line != token.line
        if new_line and not stack and resume is not None:  # a declaration inside a block is over
            current, stack = resume
            chunks.append(current)
            resume = None
        ended = not stack and token.type not in CLOSING_BRACKETS and token.type != "LBRACE"
        if index and ended and tokens[index - 1].type in _CONTINUES:
            ended = False
        starts = new_line and _starts_item(tokens, index)
        if starts and resume is None and stack == ["LBRACE"] and _inside(chunks[-1][0], token):
            resume = (chunks.pop(), stack)
            state.report(malformed.nested_declaration(token.span))
            chunks.append([])
            stack = []
        elif not chunks or (new_line and ended) or starts:
            if not (chunks and _lacks_brace(chunks[-1], tokens, index)):
                chunks.append([])
                stack = []
            else:
                last = chunks[-1][-1]
                chunks[-1].append(_after(last, "LBRACE"))
                stack = ["LBRACE"]
                state.report(malformed.missing_brace(last.span))
        chunks[-1].append(token)
        if token.type in OPENING_BRACKETS:
            stack.append(token.type)
        elif token.type in CLOSING_BRACKETS and CLOSING_BRACKETS[token.type] in stack:
            while stack.pop() != CLOSING_BRACKETS[token.type]:
                pass
    if resume is not None:
        chunks.append(resume[0])
    return chunks


def _cut(tokens: list[Lexeme], state: _State) -> list[list[Lexeme]]:
    """Return the tokens of each item; only the first token if there are too many errors."""
    try:
        return _chunks(tokens, state)
    except _Unreadable:
        return [tokens[:1]]


def _column(token: Lexeme) -> int:
    return token.span.source.position(token.span.start)[1]


def _inside(outer: Lexeme, token: Lexeme) -> bool:
    """Return whether a declaration is indented as if it were inside another."""
    return _column(token) > _column(outer)


def _lacks_brace(chunk: list[Lexeme], tokens: list[Lexeme], index: int) -> bool:
    """Return whether `noun name : kind` is followed by attributes without a `{`."""
    head = [token.type for token in chunk] == ["NAME", "NAME", "COLON", "NAME"]
    follows = [token.type for token in tokens[index : index + 2]]
    return head and follows in (["NAME", "EQUALS"], ["NAME", "COLON"])


def _read_item(chunk: list[Lexeme], state: _State) -> nodes.Item | None:
    """Parse one item; after a syntax error, parse it again without the damaged attribute."""
    before = len(state.diagnostics)
    span = chunk[0].span.to(chunk[-1].span)
    try:
        tokens = _separate(_balance(_keywords(chunk), state))
        for place in state.unreadable:
            if span.start <= place.start < span.end:
                near = next(t for t in tokens if t.span.end > place.start or t is tokens[-1])
                tokens = _without_attribute(tokens, near)
        while True:
            if not tokens:
                raise _Unreadable
            try:
                item = parse_item(tokens)
                break
            except UnexpectedToken as error:
                state.report(unexpected_tokens.syntax_error(tokens, error.token))
                tokens = _without_attribute(tokens, error.token)
        if _too_deep(item):
            state.report(malformed.too_deep(chunk[0].span))
            raise _Unreadable
    except _Unreadable:
        state.broken.update(token.text for token in chunk[:2] if token.type == "NAME")
        return None
    damaged = any(
        d.where.span.start >= span.start and d.where.span.end <= span.end
        for d in state.diagnostics[:before]
    )
    if (damaged or len(state.diagnostics) > before) and not isinstance(item, nodes.Import):
        if item.block is not None:
            item = replace(item, block=replace(item.block, damaged=True))
    return item


def _keywords(chunk: list[Lexeme]) -> list[Lexeme]:
    """Retype the words that are keywords only in an import or before a run block."""
    if chunk[0].text == "import":
        words = {"import": "IMPORT", "as": "AS", "with": "WITH"}
        return [
            t.retyped(words[t.text]) if t.type == "NAME" and t.text in words else t for t in chunk
        ]
    if chunk[0].text == "run" and chunk[1:2] and chunk[1].type == "LBRACE":
        return [chunk[0].retyped("RUN"), *chunk[1:]]
    return chunk


def _balance(chunk: list[Lexeme], state: _State) -> list[Lexeme]:
    """Remove closing brackets without a partner, and close brackets that are open.

    A parenthesis or square bracket that is not closed ends with its line and those indented below
    it, a brace with the item.
    """
    insert: dict[int, list[str]] = {}
    dropped: set[int] = set()
    stack: list[int] = []

    def close_early(opener: int) -> None:
        line = chunk[opener].line
        first = next(token for token in chunk if token.line == line)
        index = opener + 1
        while index < len(chunk) and (chunk[index].line == line or _inside(first, chunk[index])):
            if chunk[index].type == "RBRACE":
                break
            if chunk[index].line != chunk[index - 1].line and chunk[index].line != line:
                line_start = chunk[index]  # lines that are indented more belong to the bracket
                if not _inside(first, line_start):
                    break
            index += 1
        insert.setdefault(index, []).append(OPENING_BRACKETS[chunk[opener].type])
        state.report(malformed.unclosed_bracket(chunk[opener].span))

    for index, token in enumerate(chunk):
        if token.type in OPENING_BRACKETS:
            stack.append(index)
            if len(stack) > MAX_DEPTH // 2:
                state.report(malformed.too_deep(token.span))
                raise _Unreadable
        elif token.type in CLOSING_BRACKETS:
            opener = CLOSING_BRACKETS[token.type]
            if not any(chunk[i].type == opener for i in stack):
                dropped.add(index)
                state.report(malformed.unopened_bracket(token.span))
                continue
            while chunk[stack[-1]].type != opener:
                close_early(stack.pop())
            stack.pop()
    last = chunk[-1].span.text
    swallowed = last.startswith('"""') and (len(last) < 6 or not last.endswith('"""'))
    for index in reversed(stack):
        if swallowed:  # by text that is not closed, reported already
            insert.setdefault(len(chunk), []).append(OPENING_BRACKETS[chunk[index].type])
        elif chunk[index].type == "LBRACE":
            insert.setdefault(len(chunk), []).append("RBRACE")
            if chunk[index].text:  # else it was missing itself
                state.report(malformed.unclosed_bracket(chunk[index].span))
        else:
            close_early(index)
    if not insert and not dropped:
        return chunk
    out: list[Lexeme] = []
    for index in range(len(chunk) + 1):
        out.extend(_after(chunk[index - 1], kind) for kind in insert.get(index, ()))
        if index < len(chunk) and index not in dropped:
            out.append(chunk[index])
    return out


def _separate(tokens: list[Lexeme]) -> list[Lexeme]:
    """Make SEP tokens of line ends and commas directly inside `{ }`.

    A line end after an operator separates nothing.
    """
    out: list[Lexeme] = []
    stack: list[str] = []
    for index, token in enumerate(tokens):
        in_block = stack[-1:] == ["LBRACE"]
        if in_block and tokens[index - 1].last_line != token.line:
            if tokens[index - 1].type not in _CONTINUES and tokens[index - 1].type != "LBRACE":
                out.append(_after(tokens[index - 1], "SEP"))
        if token.type in OPENING_BRACKETS:
            stack.append(token.type)
        elif token.type in CLOSING_BRACKETS:
            stack.pop()
        out.append(token.retyped("SEP") if in_block and token.type == "COMMA" else token)
    return out


def _after(token: Lexeme, kind: str) -> Lexeme:
    """Return an empty token right after another."""
    return Lexeme(kind, Span(token.span.source, token.span.end, token.span.end), token.last_line)


def _without_attribute(tokens: list[Lexeme], bad: object) -> list[Lexeme]:
    """Return the tokens without the attribute that contains `bad`; raises `_Unreadable`
    outside a block.
    """
    where = next((index for index, token in enumerate(tokens) if token is bad), len(tokens) - 1)
    block = next((index for index, token in enumerate(tokens) if token.type == "LBRACE"), where)
    start, depth = block + 1, 0
    for index in range(block + 1, len(tokens)):
        kind = tokens[index].type
        if depth == 0 and kind in ("SEP", "RBRACE"):
            if index >= where and start < index:
                return tokens[:start] + tokens[index:]
            start = index + 1
        depth += (kind in OPENING_BRACKETS) - (kind in CLOSING_BRACKETS)
    raise _Unreadable


def _too_deep(item: nodes.Item) -> bool:
    """Return whether an expression is nested too deeply for the recursive evaluation."""
    level: list[nodes.Expr] = []
    if isinstance(item, nodes.Declaration):
        level = [part for part in (item.type, item.value) if part is not None]
    if not isinstance(item, nodes.Import) and item.block is not None:
        level += [attribute.value for attribute in item.block.attributes]
    if isinstance(item, nodes.Import):
        level = [argument.value for argument in item.arguments]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in nodes.children(node)]
        if not level:
            return False
    return True
