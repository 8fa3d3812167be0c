"""Read a spec and everything that it imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tunelang.dsl.diagnostics.diagnostic import Diagnostics
from tunelang.dsl.messages import imports_and_overrides, naming
from tunelang.dsl.parsing.file_parser import parse
from tunelang.dsl.resolve.scope import Module
from tunelang.dsl.syntax import nodes
from tunelang.dsl.syntax.source import Source
from tunelang.dsl.vocabulary.tables import KINDS, NOUNS


def read(path: Path, name: str | None = None) -> Source:
    """Read a file as a source; raises `OSError`, or `UnicodeDecodeError` if it is not UTF-8."""
    text = path.read_bytes().decode("utf-8-sig")
    return Source(name or str(path), text, path.parent)


@dataclass
class Loaded:
    """The root module, every module, and the run block of the root."""

    root: Module
    modules: list[Module] = field(default_factory=list)
    run: nodes.Run | None = None


def load(source: Source, diagnostics: Diagnostics) -> Loaded:
    """Parse a spec and its imports, and declare their names. Problems go to `diagnostics`."""
    return _Loader(diagnostics).load(source)


@dataclass
class _Loader:
    diagnostics: Diagnostics
    files: dict[Path, nodes.File] = field(default_factory=dict)
    modules: dict[tuple[Path, str], Module] = field(default_factory=dict)
    order: list[Module] = field(default_factory=list)
    stack: list[tuple[Path, str]] = field(default_factory=list)

    def load(self, source: Source) -> Loaded:
        root_path = (source.folder / Path(source.name).name).resolve()
        self.files[root_path] = self._parse(source)
        module = self._module(root_path, self.files[root_path], "")
        run = None
        for item in module.file.items:
            if isinstance(item, nodes.Run):
                if run is not None:
                    self.diagnostics.add(naming.second_run(item.span, run.span))
                else:
                    run = item
        return Loaded(module, self.order, run)

    def _parse(self, source: Source) -> nodes.File:
        tree, syntax_errors = parse(source)
        self.diagnostics.extend(syntax_errors)
        return tree

    def _module(self, path: Path, tree: nodes.File, prefix: str) -> Module:
        module = Module(tree, prefix, broken=set(tree.broken))
        self.order.append(module)
        self.stack.append((path, tree.source.name))
        for item in tree.items:
            if isinstance(item, nodes.Declaration):
                if item.noun.text in NOUNS:
                    module.declare(item, self.diagnostics)
                else:
                    self.diagnostics.add(naming.unknown_noun(item, list(NOUNS), KINDS))
                    module.broken.add(item.name.text)
            elif isinstance(item, nodes.Run) and len(self.stack) > 1:
                self.diagnostics.add(imports_and_overrides.run_in_import(item.span))
        for item in tree.items:
            if isinstance(item, nodes.Import):
                self._import(module, item)
        self.stack.pop()
        return module

    def _import(self, module: Module, item: nodes.Import) -> None:
        here = module.file.source
        path = here.folder / item.path.value
        if item.prefix is not None:
            module.broken.add(item.prefix.text)
        try:
            resolved = path.resolve()
        except (OSError, ValueError) as error:  # a NUL in the path, a loop of links
            self._unreadable(module, item, path, error)
            return
        if resolved in [entry for entry, _ in self.stack]:
            start = [entry for entry, _ in self.stack].index(resolved)
            cycle = [name for _, name in self.stack[start:]]
            self.diagnostics.add(
                imports_and_overrides.import_cycle(item.path.span, [*cycle, cycle[0]])
            )
            return
        tree = self.files.get(resolved)
        if tree is None:
            try:
                source = read(path, _display(here.name, item.path.value))
            except (OSError, ValueError) as error:
                self._unreadable(module, item, path, error)
                return
            tree = self.files[resolved] = self._parse(source)
        prefix = f"{module.prefix}{item.prefix.text}." if item.prefix else module.prefix
        text = ", ".join(a.span.text for a in item.arguments)
        imported = self.modules.get((resolved, text))
        if imported is None:
            imported = self.modules[resolved, text] = self._module(resolved, tree, prefix)
            self._arguments(module, imported, item)
        if item.prefix is None:
            module.include(imported, item.path.span, self.diagnostics)
        else:
            module.broken.discard(item.prefix.text)
            taken = module.names.get(item.prefix.text)
            if taken is not None:
                self.diagnostics.add(naming.name_taken(item.prefix.span, taken))
            module.prefixes[item.prefix.text] = imported

    def _unreadable(self, module: Module, item: nodes.Import, path: Path, error: Exception) -> None:
        self.diagnostics.add(imports_and_overrides.unreadable_import(item.path.span, path, error))
        if item.prefix is None:
            module.anything = True

    def _arguments(self, module: Module, imported: Module, item: nodes.Import) -> None:
        params = [
            n for n, s in imported.names.items() if s.noun == "param" and s.module is imported
        ]
        for argument in item.arguments:
            if argument.name is None:
                self.diagnostics.add(
                    imports_and_overrides.nameless_parameter(argument.span, params)
                )
            elif argument.name.text not in params:
                self.diagnostics.add(
                    imports_and_overrides.unknown_parameter(
                        argument.name.span, argument.name.text, params
                    )
                )
            else:
                imported.arguments[argument.name.text] = (argument, module)


def _display(importer: str, path: str) -> str:
    """Return the name of an imported file for messages, relative to the importer's name."""
    return str(Path(importer).parent / path)
