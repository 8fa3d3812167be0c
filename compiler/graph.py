"""The stage graph: one node for each stage and branch, and the inputs of each.

A stage that fans out has a node for each of its branches. With `keep = best(...)` or
`lowest(...)` the branches fold: a later stage reads a *selection* from all of them. With
`keep = all` every later stage fans out too, and the choices add up; a stage that reads two
stages of one sweep reads the same branch of both, not each combination.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import networkx as nx
from typing_extensions import override

from tunelang.dsl.diagnostics.tune_error import (
    WRONG_SPEC,
    CommandError,
    FailureText,
    SpecPlace,
    TuneError,
)
from tunelang.dsl.messages import run_failures
from tunelang.dsl.program import Branch, Declared, Program
from tunelang.dsl.references import references_in
from tunelang.dsl.vocabulary import training
from tunelang.dsl.vocabulary.base import Kind

MAX_NODES = 4096
"""Nodes of one stage. One stage has at most 256 branches of its own; with `keep = all`
their numbers multiply.
"""
_LABEL_WIDTH = 32


@dataclass(frozen=True)
class Choice:
    """The value that a branch takes for one `each`: the stage, the path of the attribute, the
    text.
    """

    stage: str
    path: str
    text: str


@dataclass(frozen=True)
class Selection:
    """The rule that finds the winner of a sweep.

    Of branches with equal values the one with the smallest fingerprint wins, so that the order of
    the branches in the spec does not matter.
    """

    direction: Literal["best", "lowest"]
    metric: str

    def __str__(self) -> str:
        return f"{self.direction}({self.metric})"


@dataclass(frozen=True)
class Input:
    """A stage that a node reads."""

    stage: str
    paths: tuple[str, ...]
    """The attributes through which it is read: `from`, `reference`, `reward`."""
    nodes: tuple[str, ...]
    """The node that is read; with a selection, all candidates."""
    selection: Selection | None = None


@dataclass(frozen=True)
class StageNode:
    """A stage in one of its branches."""

    id: str
    """`specialist`, or `specialist[optimizer.lr=1e-6]`."""
    stage: str
    kind: str
    choices: tuple[Choice, ...]
    """Inherited ones first."""
    inputs: tuple[Input, ...]
    uses: tuple[tuple[str, str], ...]
    """Noun and name of every model, tokenizer, data, reward and eval that it depends on, directly
    or through others.
    """
    value: Kind = field(repr=False)


@dataclass(frozen=True)
class StageGraph:
    """All nodes of a Program, by id, in a topological order."""

    program: Program = field(repr=False)
    nodes: dict[str, StageNode]
    by_stage: dict[str, tuple[str, ...]]
    selections: dict[str, Selection]
    """Stage -> how its branches fold; only stages with several nodes."""
    edges: nx.DiGraph[str] = field(repr=False, compare=False)
    """Node ids; an edge leads from what is read to its reader, with the attributes in `paths`."""


@dataclass(eq=False)
class GraphError(TuneError, ValueError):
    """The graph of stages cannot be built: `problem` says what is wrong with `stage`."""

    code = "cannot-lay-out"
    exit_code = WRONG_SPEC
    stage: str
    problem: str

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_graph(self.stage, self.problem)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(declaration=self.stage)


class UnknownStage(CommandError):
    """No stage and no node has the name; `known` are the names of the stages."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(run_failures.unknown_stage(name, known))
        self.name, self.known = name, known


def build(program: Program) -> StageGraph:
    """Build the graph of a checked Program, in time linear in its nodes and references.

    Raises `GraphError` for a stage of more than `MAX_NODES` nodes, and for a sweep without a
    winner, which the checker reports before.
    """
    builder = _Builder(program)
    for declared in program.declarations.values():
        if declared.noun == "stage":
            builder.stage(declared)
        else:
            builder.reached[declared.name] = builder.reach(declared.value)
    edges: nx.DiGraph[str] = nx.DiGraph()
    edges.add_nodes_from(builder.nodes)
    for node in builder.nodes.values():
        for read in node.inputs:
            edges.add_edges_from(((name, node.id) for name in read.nodes), paths=read.paths)
    position = {name: index for index, name in enumerate(builder.nodes)}
    order = nx.lexicographical_topological_sort(edges, key=position.__getitem__)
    nodes = {name: builder.nodes[name] for name in order}
    return StageGraph(program, nodes, builder.by_stage, builder.selections, edges)


def named(graph: StageGraph, name: str) -> tuple[str, ...]:
    """Return the nodes of a stage, or the one node with this id. Raises `UnknownStage`."""
    if name in graph.by_stage:
        return graph.by_stage[name]
    if name in graph.nodes:
        return (name,)
    raise UnknownStage(name, tuple(graph.by_stage))


def only(graph: StageGraph, names: Iterable[str]) -> tuple[str, ...]:
    """Return the nodes of these stages or ids, in order. Raises `UnknownStage`."""
    wanted = {node for name in names for node in named(graph, name)}
    return tuple(node for node in graph.nodes if node in wanted)


def until(graph: StageGraph, names: Iterable[str]) -> tuple[str, ...]:
    """Return the nodes of these stages or ids and all that they depend on, in order. Raises
    `UnknownStage`.
    """
    wanted: set[str] = set()
    pending = list(only(graph, names))
    while pending:
        node = pending.pop()
        if node not in wanted:
            wanted.add(node)
            pending += graph.edges.predecessors(node)
    return tuple(node for node in graph.nodes if node in wanted)


def models_of(graph: StageGraph, node: str) -> tuple[str, ...]:
    """Return the declared models that a node's weights may descend from: several if the branches of
    a sweep that it reads start from different ones.
    """
    sources: dict[str, None] = {}
    pending, seen = [node], {node}
    while pending:
        value = graph.nodes[pending[-1]].value
        inputs = {read.stage: read for read in graph.nodes[pending.pop()].inputs}
        source = getattr(value, "from_", None)
        if source is None:
            continue
        if source.name not in inputs:
            sources[source.name] = None
            continue
        new = [name for name in inputs[source.name].nodes if name not in seen]
        seen.update(new)
        pending += new
    return tuple(sources)


def loras_of(graph: StageGraph, node: str) -> tuple[training.Lora, ...]:
    """Return the adapters of the weights that a node works with; the one that it trains is last.

    Where the branches of a sweep that it starts from differ in theirs, the first branch decides.
    """
    adapters: list[training.Lora] = []
    while True:
        value = graph.nodes[node].value
        adapter, source = getattr(value, "adapter", None), getattr(value, "from_", None)
        if source is None or not isinstance(adapter, training.Adapter):
            break
        if isinstance(adapter, training.Lora):  # one that is continued is of a stage below
            adapters.append(adapter)
        read = next((e for e in graph.nodes[node].inputs if e.stage == source.name), None)
        if read is None:
            break
        node = read.nodes[0]
    return tuple(reversed(adapters))


# Building.


@dataclass
class _Reach:
    """The stages that a value leads to without passing through a stage, with the attributes that
    lead there, and the other declarations. Dicts for their order.
    """

    stages: dict[str, dict[str, None]] = field(default_factory=dict)
    uses: dict[tuple[str, str], None] = field(default_factory=dict)


_Branching = dict[str, int]
"""Stage that fans out -> the index of its branch, for each sweep that a node belongs to."""


@dataclass
class _Builder:
    program: Program
    nodes: dict[str, StageNode] = field(default_factory=dict)
    by_stage: dict[str, tuple[str, ...]] = field(default_factory=dict)
    selections: dict[str, Selection] = field(default_factory=dict)
    reached: dict[str, _Reach] = field(default_factory=dict)
    branching: dict[str, _Branching] = field(default_factory=dict)
    """Node -> its branch of each sweep that it belongs to."""

    def reach(self, value: object) -> _Reach:
        """Return the stages and declarations that a value refers to, which were all visited
        before.
        """
        reach = _Reach()
        for path, reference in references_in(value, ""):
            declared = self.program.declarations[reference.name]
            attribute = path.removeprefix(".").split(".")[0]
            if declared.noun == "stage":
                reach.stages.setdefault(declared.name, {})[attribute] = None
            elif declared.noun != "hardware":
                reach.uses[declared.noun, declared.name] = None
                inner = self.reached[declared.name]
                reach.uses.update(inner.uses)
                for name in inner.stages:
                    reach.stages.setdefault(name, {})[attribute] = None
        return reach

    def stage(self, declared: Declared) -> None:
        """Add the nodes of a stage."""
        branches = _distinct(declared.branches)
        ids: list[str] = []
        for index, branch in enumerate(branches):
            reach = self.reach(branch.value)
            own_branch: _Branching = {declared.name: index} if len(branches) > 1 else {}
            for inherited, inputs in self.join(declared.name, reach):
                choices = self.inherited(inputs) + tuple(
                    Choice(declared.name, path, _shorten(text)) for path, text in branch.choices
                )
                node = StageNode(
                    self.unique_id(_identity(declared.name, choices)),
                    declared.name,
                    declared.kind or "",
                    choices,
                    inputs,
                    tuple(reach.uses),
                    branch.value,
                )
                self.nodes[node.id] = node
                self.branching[node.id] = inherited | own_branch
                ids.append(node.id)
                if len(ids) > MAX_NODES:
                    raise GraphError(declared.name, f"would fan out into more than {MAX_NODES}")
        self.by_stage[declared.name] = tuple(ids)
        match getattr(branches[0].value, "keep", None):
            case training.Best(metric=metric) if len(ids) > 1:
                self.selections[declared.name] = Selection("best", metric)
            case training.Lowest(metric=metric) if len(ids) > 1:
                self.selections[declared.name] = Selection("lowest", metric)

    def join(self, reader: str, reach: _Reach) -> Iterator[tuple[_Branching, tuple[Input, ...]]]:
        """Yield each way to pick a node of every stage that is read, with one branch of each
        sweep.
        """
        ways: list[tuple[_Branching, tuple[Input, ...]]] = [({}, ())]
        for name, attributes in reach.stages.items():
            paths = tuple(attributes)
            options = self.options(name, paths)
            ways = [
                (branching | more, (*inputs, read))
                for branching, inputs in ways
                for more, read in options
                if all(branching.get(stage, branch) == branch for stage, branch in more.items())
            ]
            if len(ways) > MAX_NODES:
                raise GraphError(reader, f"would fan out into more than {MAX_NODES}")
        yield from ways

    def options(self, name: str, paths: tuple[str, ...]) -> list[tuple[_Branching, Input]]:
        """Return the inputs that a reference to a stage may mean: its selection, or any of its
        nodes.
        """
        nodes = self.by_stage[name]
        if name in self.selections:
            return [({}, Input(name, paths, nodes, self.selections[name]))]
        if len(nodes) > 1 and not isinstance(self.keep(name), training.All):
            raise GraphError(name, "fans out and names no winner")
        return [(self.branching[node], Input(name, paths, (node,))) for node in nodes]

    def keep(self, name: str) -> object:
        """Return the rule by which a stage keeps branches."""
        return getattr(self.nodes[self.by_stage[name][0]].value, "keep", None)

    def inherited(self, inputs: tuple[Input, ...]) -> tuple[Choice, ...]:
        """Return the choices of the nodes that are read, without duplicates; a selection has
        none.
        """
        choices: dict[Choice, None] = {}
        for read in inputs:
            if read.selection is None:
                choices.update(dict.fromkeys(self.nodes[read.nodes[0]].choices))
        return tuple(choices)

    def unique_id(self, identity: str) -> str:
        """Return an id that no node has: long choices may have been shortened to the same text."""
        count, unique = 1, identity
        while unique in self.nodes:
            count += 1
            unique = f"{identity}#{count}"
        return unique


def _distinct(branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
    """Return the distinct branches: an `each` inside a choice not taken makes copies of a
    branch.
    """
    return tuple({branch.choices: branch for branch in branches}.values())


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LABEL_WIDTH else flat[: _LABEL_WIDTH - 1] + "…"


def _identity(stage: str, choices: tuple[Choice, ...]) -> str:
    if not choices:
        return stage
    parts = [
        f"{choice.path}={choice.text}"
        if choice.stage == stage
        else f"{choice.stage}.{choice.path}={choice.text}"
        for choice in choices
    ]
    return f"{stage}[{', '.join(parts)}]"
