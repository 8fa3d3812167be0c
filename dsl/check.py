"""Check a spec: source text in, a Program or diagnostics out. Runs no user code and imports no
JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostics
from tunelang.dsl.messages import attribute_use, malformed, naming, wrong_values
from tunelang.dsl.messages.attribute_use import Owner
from tunelang.dsl.messages.wording import article
from tunelang.dsl.program import Branch, Declared, Origin, Program
from tunelang.dsl.references import reachable
from tunelang.dsl.resolve import overrides
from tunelang.dsl.resolve.binding import Entry, Place, bind
from tunelang.dsl.resolve.each_calls import each_nodes
from tunelang.dsl.resolve.expressions import NONE_VALUE, Evaluator
from tunelang.dsl.resolve.fit import fit
from tunelang.dsl.resolve.load import Loaded, load, read
from tunelang.dsl.resolve.scope import Module, Symbol, in_order
from tunelang.dsl.rules.apply_rules import apply_rules, warn_of_unused
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Source
from tunelang.dsl.syntax.units import Quantity
from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import Kind, KindInfo
from tunelang.dsl.vocabulary.raw_values import INVALID, Invalid, Word
from tunelang.dsl.vocabulary.stages import Run
from tunelang.dsl.vocabulary.tables import EXPRESSION_NOUNS, KINDS, RUN

MAX_BRANCHES = 256


@dataclass(frozen=True)
class Checked:
    """The outcome: diagnostics, and the Program unless one of them is an error."""

    diagnostics: Diagnostics
    program: Program | None


def check_file(path: Path, sets: Sequence[str] = (), *, elsewhere: bool = False) -> Checked:
    """Check a file; one that cannot be read is a diagnostic too."""
    try:
        source = read(path)
    except (OSError, ValueError) as error:
        diagnostics = Diagnostics()
        diagnostics.add(malformed.unreadable(Source(str(path), ""), error))
        return Checked(diagnostics, None)
    return check(source, sets, elsewhere=elsewhere)


def check(source: Source, sets: Sequence[str] = (), *, elsewhere: bool = False) -> Checked:
    """Check the text of a spec with `--set` overrides. `elsewhere` says that it is for other
    hardware than its own.
    """
    diagnostics = Diagnostics()
    loaded = load(source, diagnostics)
    overrides.apply(list(sets), loaded, diagnostics)
    checker = _Checker(loaded, diagnostics, source.folder)
    program = checker.program(elsewhere)
    return Checked(diagnostics, None if diagnostics.errors else program)


class _Checker:
    """Evaluates every declaration of a spec once, in order."""

    def __init__(self, loaded: Loaded, diagnostics: Diagnostics, folder: Path) -> None:
        self.loaded, self.diagnostics, self.folder = loaded, diagnostics, folder
        self.origins: dict[str, Origin] = {}
        self.places: dict[int, Place] = {}
        symbols = dict.fromkeys(s for m in loaded.modules for s in m.names.values())
        self.symbols = {symbol.name: symbol for symbol in symbols}

    def program(self, elsewhere: bool) -> Program:
        """Evaluate all declarations, apply the rules, and return the Program."""
        declared: dict[str, Declared] = {}
        for symbol in in_order(list(self.symbols.values()), self.diagnostics):
            declaration = self._declaration(symbol)
            if declaration is not None:
                declared[symbol.name] = declaration
        run = self._run()
        program = Program(declared, run, self.folder, self.origins)
        apply_rules(program, self.places, self.diagnostics, elsewhere)
        if not self.diagnostics.errors:  # what is wrong may be what would have used it
            warn_of_unused(self.loaded.root, self.diagnostics)
        root = self.loaded.root
        declared = reachable(program, {s.name for s in root.names.values() if s.module is root})
        return Program(declared, run, self.folder, self.origins)

    def _evaluator(self, module: Module, path: str) -> Evaluator:
        return Evaluator(
            module,
            self.diagnostics.add,
            self.symbols.get,
            self.folder,
            self.origins,
            self.places,
            path=path.split(".", 1),
        )

    def _declaration(self, symbol: Symbol) -> Declared | None:
        declaration = symbol.declaration
        if declaration.kind is not None and declaration.block is not None:
            value, branches = self._kinded(symbol, declaration.kind, declaration.block)
        else:
            value, branches = self._bound(symbol), ()
        symbol.value = value
        if value is INVALID:
            symbol.module.broken.add(declaration.name.text)
            return None
        kind = declaration.kind.text if declaration.kind else None
        stored = None if branches or value is NONE_VALUE else value
        damaged = declaration.block is not None and declaration.block.damaged
        return Declared(
            symbol.noun, symbol.name, kind, stored, declaration.doc, branches, symbol.span, damaged
        )

    def _bound(self, symbol: Symbol) -> object:
        """Evaluate `noun name = expression`."""
        declaration = symbol.declaration
        node = declaration.value
        assert node is not None
        if symbol.noun not in EXPRESSION_NOUNS:
            self.diagnostics.add(naming.needs_kind(declaration, KINDS[symbol.noun]))
            return INVALID
        module = symbol.module
        kind = "override" if node.span.source.kind == "override" else "spec"
        self.origins[f"{symbol.noun}.{symbol.name}"] = Origin(kind, node.span)  # type: ignore[arg-type]
        if symbol.noun == "param":
            return self._param(symbol, node)
        evaluator = self._evaluator(module, f"{symbol.noun}.{symbol.name}")
        if symbol.noun == "let":
            value = evaluator.value(node, types.Anything())
            return NONE_VALUE if value is None else value
        return evaluator.value(node, types.Of(symbol.noun))

    def _param(self, symbol: Symbol, node: nodes.Expr) -> object:
        declaration, module = symbol.declaration, symbol.module
        if declaration.type is None:
            self.diagnostics.add(attribute_use.param_without_type(declaration))
            return INVALID
        want = self._param_type(declaration.type)
        if symbol.declaration.name.text in module.arguments:
            argument, module = module.arguments[symbol.declaration.name.text]
            node = argument.value
        if want is None:
            return INVALID
        evaluator = self._evaluator(module, f"param.{symbol.name}")
        if isinstance(want, types.Choice):
            word = evaluator.value(node, want)
            return Word(word) if isinstance(word, str) else INVALID
        raw = evaluator.value(node, types.Anything())
        if raw is INVALID or fit(raw, want, evaluator.site(node.span)) is INVALID:
            return INVALID
        if isinstance(raw, Quantity) and raw.dimension is None and isinstance(want, types.Amount):
            return Quantity(raw.value, want.units[0])
        return raw

    def _param_type(self, node: nodes.Expr) -> types.Type | None:
        if isinstance(node, nodes.Name) and node.text in types.PARAMETERS:
            return types.PARAMETERS[node.text]
        if isinstance(node, nodes.Chain) and isinstance(node.head, nodes.Name):
            call = node.links[0]
            words = call.arguments if isinstance(call, nodes.Call) else ()
            names = [a.value.text for a in words if isinstance(a.value, nodes.Name) and not a.name]
            if node.head.text == "choice" and names and len(names) == len(words):
                return types.Choice(tuple(names))
        self.diagnostics.add(attribute_use.unknown_type(node.span, list(types.PARAMETERS)))
        return None

    def _kinded(
        self, symbol: Symbol, kind: nodes.Name, block: nodes.Block
    ) -> tuple[object, tuple[Branch, ...]]:
        """Evaluate `noun name : kind { ... }`; for a stage, return its branches too."""
        info = KINDS.get(symbol.noun, {}).get(kind.text)
        if info is None:
            diagnostic = naming.unknown_kind(symbol.declaration, kind, KINDS)
            self.diagnostics.add(diagnostic)
            info = (
                KINDS.get(symbol.noun, {}).get(diagnostic.fix[0].text) if diagnostic.fix else None
            )
            block = nodes.Block(block.attributes, block.span, damaged=True)
        if info is None:
            for attribute in block.attributes:
                self._touch(attribute.value, symbol.module)
            return INVALID, ()
        path = f"{symbol.noun}.{symbol.name}"
        if symbol.noun != "stage":
            evaluator = self._evaluator(symbol.module, path)
            return self._block(info, block, evaluator, symbol.declaration.name), ()
        branches = self._branches(symbol, info, block, path)
        return (branches, tuple(branches)) if branches else (INVALID, ())

    def _branches(
        self, symbol: Symbol, info: KindInfo, block: nodes.Block, path: str
    ) -> list[Branch]:
        """Evaluate a stage for each combination of its `each` values; empty after a report."""
        forks = each_nodes([attribute.value for attribute in block.attributes])
        sizes = [len(values) for _, values in forks]
        if prod(sizes) > MAX_BRANCHES:
            span = forks[-1][0].span
            self.diagnostics.add(wrong_values.too_many_branches(span, sizes, MAX_BRANCHES))
            return []
        combinations = list(product(*(range(max(size, 1)) for size in sizes)))
        branches: list[Branch] = []
        for combination in combinations:
            evaluator = self._evaluator(symbol.module, path)
            evaluator.choice = {
                fork.span: index for (fork, _), index in zip(forks, combination, strict=True)
            }
            value = self._block(info, block, evaluator, symbol.declaration.name)
            if not isinstance(value, Invalid):
                choices = tuple(
                    (evaluator.forks[fork.span], values[index].span.text)
                    for (fork, values), index in zip(forks, combination, strict=True)
                    if fork.span in evaluator.forks
                )
                branches.append(Branch(choices, value))
        return branches if len(branches) == len(combinations) else []

    def _block(
        self, info: KindInfo, block: nodes.Block, evaluator: Evaluator, name: nodes.Name
    ) -> Kind | Invalid:
        entries: list[Entry] = [(a.name, a.value, a.span) for a in block.attributes]
        title = f"{article(info.word)} {info.noun}" if info.noun != info.word else "the run block"
        if info.noun in ("data", "hardware"):
            title = f"`{info.word}` {info.noun}"
        owner = Owner(title, info.noun, name.span, block.damaged, info.word)
        bound = bind(evaluator, entries, info.attributes, owner)
        if isinstance(bound, Invalid):
            return INVALID
        return info.model.unvalidated(**(dict(info.presets) | bound))

    def _run(self) -> Run:
        run = self.loaded.run
        if run is None:
            return Run.unvalidated()
        evaluator = self._evaluator(self.loaded.root, "run")
        value = self._block(RUN, run.block, evaluator, nodes.Name("run", run.span))
        return value if isinstance(value, Run) else Run.unvalidated()

    def _touch(self, node: nodes.Expr, module: Module) -> None:
        for part in nodes.walk(node):
            if isinstance(part, nodes.Name) and part.text in module.names:
                module.names[part.text].used = True
