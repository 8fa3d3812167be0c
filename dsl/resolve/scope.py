"""Scopes: the names of each file and its imports, and the order of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tunelang.dsl.diagnostics.diagnostic import Diagnostics
from tunelang.dsl.messages import naming
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Span


@dataclass(eq=False)
class Symbol:
    """A declared name. `value` is None until it is evaluated, and if it is invalid."""

    noun: str
    name: str
    """Qualified: `base.math`."""
    declaration: nodes.Declaration
    module: Module
    value: object = None
    used: bool = False

    @property
    def local_name(self) -> str:
        """Return the name as its own file declares it: `math`."""
        return self.declaration.name.text

    @property
    def span(self) -> Span:
        """Return the place of the name in its declaration."""
        return self.declaration.name.span

    @property
    def title(self) -> str:
        """Return the noun and the name: `data math`."""
        return f"{self.noun} {self.name}"


@dataclass(eq=False)
class Module:
    """A file or import: its declarations and the names that it can use."""

    file: nodes.File
    prefix: str
    names: dict[str, Symbol] = field(default_factory=dict)
    prefixes: dict[str, Module] = field(default_factory=dict)
    arguments: dict[str, tuple[nodes.Argument, Module]] = field(default_factory=dict)
    """Parameters that the importing file sets, with that file's own names."""
    broken: set[str] = field(default_factory=set)
    """Names of declarations with syntax errors: their uses are not reported."""
    anything: bool = False
    """An import could not be read, so that any name may be declared."""

    def excuses(self, name: str) -> bool:
        """Return whether an unknown name is the consequence of an error that was reported
        already.
        """
        return self.anything or name in self.broken

    def declare(self, declaration: nodes.Declaration, diagnostics: Diagnostics) -> Symbol | None:
        """Add a declaration; report a name that is already declared."""
        name = declaration.name.text
        taken = self.names.get(name)
        if taken is not None:
            diagnostics.add(naming.name_taken(declaration.name.span, taken))
            return None
        symbol = Symbol(declaration.noun.text, f"{self.prefix}{name}", declaration, self)
        self.names[name] = symbol
        return symbol

    def include(self, other: Module, place: Span, diagnostics: Diagnostics) -> None:
        """Add the names of an import without a prefix."""
        for name, symbol in other.names.items():
            taken = self.names.setdefault(name, symbol)
            if taken is not symbol:
                diagnostics.add(naming.name_taken_by_import(place, taken, symbol))
        self.broken |= other.broken
        self.anything = self.anything or other.anything
        for prefix, module in other.prefixes.items():
            self.prefixes.setdefault(prefix, module)


def references(symbol: Symbol) -> Iterator[tuple[Symbol, Span]]:
    """Yield the symbols that a declaration refers to, each with the place of the reference."""
    declaration, module = symbol.declaration, symbol.module
    pending: list[nodes.Expr] = []
    if declaration.value is not None:
        pending.append(declaration.value)
    if declaration.block is not None:
        pending += [attribute.value for attribute in declaration.block.attributes]
    if symbol.noun == "param" and declaration.name.text in module.arguments:
        argument, module = module.arguments[declaration.name.text]
        pending = [argument.value]
    while pending:
        node = pending.pop()
        symbol_named: Symbol | None = None
        if isinstance(node, nodes.Name):
            symbol_named = module.names.get(node.text)
        elif isinstance(node, nodes.Chain) and isinstance(node.head, nodes.Name):
            first = node.links[0]
            if isinstance(first, nodes.Member):
                other = module.prefixes.get(node.head.text)
                if other is not None and node.head.text not in module.names:
                    symbol_named = other.names.get(first.name.text)
                else:
                    symbol_named = module.names.get(node.head.text)
            pending += _arguments(node)
        else:
            pending += list(nodes.children(node))
        if symbol_named is not None:
            yield symbol_named, node.span


def _arguments(node: nodes.Chain) -> Iterator[nodes.Expr]:
    """Yield the arguments of a chain's calls, except conditions, whose names are fields."""
    method = ""
    for link in node.links:
        if isinstance(link, nodes.Member):
            method = link.name.text
        elif method != "where":
            for argument in link.arguments:
                yield argument.value


def in_order(symbols: list[Symbol], diagnostics: Diagnostics) -> list[Symbol]:
    """Return the symbols, each after those that it refers to; report those on a cycle.

    Depth-first without recursion, so that a chain of thousands of declarations is fine.
    """
    order: list[Symbol] = []
    done: set[Symbol] = set()
    for root in symbols:
        if root in done:
            continue
        path: list[Symbol] = [root]
        spans: list[Span] = [root.span]
        on_path = {root}
        pending = [references(root)]
        while path:
            step = next(pending[-1], None)
            if step is None:
                finished = path.pop()
                spans.pop()
                pending.pop()
                on_path.discard(finished)
                done.add(finished)
                order.append(finished)
                continue
            target, span = step
            if target in on_path:
                start = path.index(target)
                cycle = path[start:]
                if not any(symbol.name in symbol.module.broken for symbol in cycle):
                    diagnostics.add(naming.cycle(cycle, [*spans[start + 1 :], span]))
                for symbol in cycle:
                    symbol.module.broken.add(symbol.local_name)
            elif target not in done:
                path.append(target)
                spans.append(span)
                on_path.add(target)
                pending.append(references(target))
    return [s for s in order if s.local_name not in s.module.broken]
