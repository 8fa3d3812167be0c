"""`--set name=expression`: put into the syntax tree, so that everything else sees an ordinary
value.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostic, Diagnostics
from tunelang.dsl.messages import imports_and_overrides
from tunelang.dsl.parsing.file_parser import parse_expression
from tunelang.dsl.resolve.load import Loaded
from tunelang.dsl.resolve.scope import Module, Symbol
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Source, Span
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import Attribute, Function
from tunelang.dsl.vocabulary.tables import KINDS, RUN


def apply(overrides: list[str], loaded: Loaded, diagnostics: Diagnostics) -> None:
    """Apply the overrides in order; what cannot be applied is reported at the override's own
    text.
    """
    for text in overrides:
        source = Source(f"--set {text}", text, Path(), kind="override")
        left, equals, _ = text.partition("=")
        path = [part.strip() for part in left.split(".")]
        if not equals or not all(part.isidentifier() for part in path):
            diagnostics.add(imports_and_overrides.bad_override(Span(source, 0, len(text))))
            continue
        value, syntax_errors = parse_expression(source)
        target = Span(source, 0, len(left.rstrip()))
        wanted = _wanted(loaded, path)
        if _is_text(wanted) and not _reads_as_text(value, loaded.root):
            right = Span(source, len(left) + 1, len(text))
            diagnostics.add(imports_and_overrides.override_needs_quotes(right, left.strip()))
            continue
        diagnostics.extend(syntax_errors)
        if value is None:
            continue
        problem = _Override(loaded, target, value).apply(path)
        if problem is not None:
            diagnostics.add(problem)


def _wanted(loaded: Loaded, path: list[str]) -> types.Type | None:
    """Return the type of the attribute that a path leads to, if it is one of a block."""
    if path[0] == "run" and len(path) == 2:
        attribute = RUN.attributes.get(path[1])
        return attribute.type if attribute else None
    if path[0] in KINDS and len(path) > 2:
        symbol = loaded.root.names.get(path[1])
        kind = symbol.declaration.kind if symbol is not None else None
        info = KINDS[path[0]].get(kind.text) if kind is not None else None
        attribute = info.attributes.get(path[2]) if info is not None and len(path) == 3 else None
        return attribute.type if attribute else None
    return None


def _is_text(want: types.Type | None) -> bool:
    want = want.item if isinstance(want, types.ListOf) else want
    return isinstance(want, types.Text | types.Path)


def _reads_as_text(value: nodes.Expr | None, root: Module) -> bool:
    """Return whether an expression may be text; unquoted words and operators may not."""
    if isinstance(value, nodes.Name):
        return value.text in root.names
    return isinstance(value, nodes.Text | nodes.Constant | nodes.ListOf | nodes.Conditional)


class _Override:
    def __init__(self, loaded: Loaded, target: Span, value: nodes.Expr) -> None:
        self.loaded, self.target, self.value = loaded, target, value

    def apply(self, path: list[str]) -> Diagnostic | None:
        if path[0] == "run" and len(path) > 1:
            empty = nodes.Run(nodes.Block((), self.target), self.target)
            run = self.loaded.run or empty
            block = self._block(run.block, path[1:])
            if not isinstance(block, nodes.Block):
                return block
            self.loaded.run = replace(run, block=block)
            return None
        if path[0] in KINDS:
            symbol, rest = self._find(self.loaded.root, path[1:])
            if symbol is not None and symbol.noun == path[0]:
                return self._into(symbol, rest)
            names = [s.name for s in self.loaded.root.names.values() if s.noun == path[0]]
            return imports_and_overrides.unknown_override(
                self.target, ".".join(path), path[0], names
            )
        symbol, rest = self._find(self.loaded.root, path)
        if symbol is not None and symbol.noun == "param" and not rest:
            symbol.module.arguments.pop(symbol.declaration.name.text, None)
            symbol.declaration = replace(symbol.declaration, value=self.value)
            symbol.used = True
            return None
        if symbol is not None:
            return imports_and_overrides.override_needs_noun(self.target, symbol, rest)
        names = [n for n, s in self.loaded.root.names.items() if s.noun == "param"]
        return imports_and_overrides.unknown_override(self.target, ".".join(path), "param", names)

    def _find(self, module: Module, path: list[str]) -> tuple[Symbol | None, list[str]]:
        """Return the symbol at the start of a path, and the remaining path."""
        while len(path) > 1 and path[0] in module.prefixes and path[0] not in module.names:
            module, path = module.prefixes[path[0]], path[1:]
        return (module.names.get(path[0]), path[1:]) if path else (None, [])

    def _into(self, symbol: Symbol, path: list[str]) -> Diagnostic | None:
        declaration = symbol.declaration
        if not path:
            if declaration.value is None:
                return imports_and_overrides.override_needs_attribute(self.target, symbol)
            symbol.declaration = replace(declaration, value=self.value)
            return None
        if declaration.block is None:
            return imports_and_overrides.override_of_expression(self.target, symbol)
        block = self._block(declaration.block, path, symbol)
        if not isinstance(block, nodes.Block):
            return block
        symbol.declaration = replace(declaration, block=block)
        return None

    def _block(
        self, block: nodes.Block, path: list[str], symbol: Symbol | None = None
    ) -> nodes.Block | Diagnostic:
        """Return a block with the attribute at `path` replaced or added."""
        name = nodes.Name(path[0], self.target)
        existing = next((a for a in block.attributes if a.name.text == path[0]), None)
        value: nodes.Expr | Diagnostic = self.value
        if len(path) > 1:
            known = self._known(symbol)
            if existing is None and path[0] not in known:
                return imports_and_overrides.unknown_override(
                    self.target, path[0], "attribute", list(known)
                )
            value = self._call(
                existing.value if existing else self._default(symbol, path[0]), path[1:], symbol
            )
        if isinstance(value, Diagnostic):
            return value
        if existing is None:
            added = nodes.Attribute(name, value, self.target)
            return replace(block, attributes=(*block.attributes, added))
        changed = replace(existing, value=value)
        return replace(
            block, attributes=tuple(changed if a is existing else a for a in block.attributes)
        )

    def _call(
        self, node: nodes.Expr | None, path: list[str], symbol: Symbol | None
    ) -> nodes.Expr | Diagnostic:
        """Return a call with one argument replaced or added; a name is followed to its `let`."""
        if isinstance(node, nodes.Name) and symbol is not None:
            target = symbol.module.names.get(node.text)
            if target is not None and target.noun == "let":
                target.used = True
                node = target.declaration.value
        if not isinstance(node, nodes.Chain) or not isinstance(node.links[-1], nodes.Call):
            return imports_and_overrides.override_needs_call(self.target, path[0])
        call = node.links[-1]
        argument = next((a for a in call.arguments if a.name and a.name.text == path[0]), None)
        value: nodes.Expr | Diagnostic = self.value
        if len(path) > 1:
            value = self._call(argument.value if argument else None, path[1:], symbol)
        if isinstance(value, Diagnostic):
            return value
        new = nodes.Argument(nodes.Name(path[0], self.target), value, self.target)
        if argument is None:
            arguments = (*call.arguments, new)
        else:
            arguments = tuple(new if a is argument else a for a in call.arguments)
        return replace(node, links=(*node.links[:-1], replace(call, arguments=arguments)))

    def _known(self, symbol: Symbol | None) -> dict[str, Attribute]:
        """Return the attributes of a declaration's kind."""
        if symbol is None or symbol.declaration.kind is None:
            return RUN.attributes if symbol is None else {}
        info = KINDS[symbol.noun].get(symbol.declaration.kind.text)
        return info.attributes if info else {}

    def _default(self, symbol: Symbol | None, name: str) -> nodes.Expr | None:
        """Return the default of an attribute as an empty call, where it is a call:
        `rollout.max_tokens` alone.
        """
        attribute = self._known(symbol).get(name)
        if attribute is None or not isinstance(attribute.default, Function):
            return None
        head = nodes.Name(attribute.default.word, self.target)
        arguments = tuple(
            nodes.Argument(nodes.Name(key, self.target), _literal(value, self.target), self.target)
            for key, value in attribute.default
            if value != type(attribute.default).model_fields[key].default
            and isinstance(value, int | float)
        )
        return nodes.Chain(head, (nodes.Call(arguments, self.target),), self.target)


def _literal(value: int | float, span: Span) -> nodes.Expr:
    return nodes.Number(Quantity(value), span)
