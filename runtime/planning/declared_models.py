"""Looks up the architectures of the models of stages, without reading data or weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tunelang.compiler import graph as graphs
from tunelang.compiler.graph import StageGraph
from tunelang.compiler.layout.layout_query import Judge
from tunelang.compiler.models.adapters import adapted, storage_of
from tunelang.compiler.models.architecture import Architecture, from_transformer
from tunelang.compiler.models.presets import PRESETS
from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary import models
from tunelang.dsl.vocabulary.base import Reference
from tunelang.dsl.vocabulary.rewards import Learned, LocalJudge, Rubric
from tunelang.runtime.models import model_folder
from tunelang.runtime.tokenize.open_tokenizer import open_renderer

DTYPE_BYTES = {"f32": 4, "bf16": 2}


class DeclaredModels:
    """Architectures of a program's models; each declaration is read once."""

    def __init__(self, program: Program, graph: StageGraph) -> None:
        self._program = program
        self._graph = graph
        self._architectures: dict[str, Architecture] = {}

    def with_adapters(self, node: str, architecture: Architecture) -> Architecture:
        """Return the architecture that a node trains, with the adapters of its weights.

        Raises `NoTargetError` and `ValueError`.
        """
        loras = graphs.loras_of(self._graph, node)
        storage = storage_of(self._program.declarations[self.name_of(node)].value)
        return adapted(architecture, loras, storage)

    def referenced(self, node: str, reference: Reference) -> Architecture:
        """Return the declared architecture that a reference of a node descends from."""
        return self.architecture(self._origin(node, reference))

    def merged(self, node: str, reference: Reference) -> Shapes:
        """Return the model that a reference of a node stands for, its adapters merged into it."""
        name = self._origin(node, reference)
        inputs = [read for read in self._graph.nodes[node].inputs if read.stage == reference.name]
        makers = (self._graph.nodes[maker].value for read in inputs for maker in read.nodes)
        scores = any(getattr(maker, "yields", "") == "scores" for maker in makers)
        return Shapes(replace(self.architecture(name), scores=scores), self.dtype(name))

    def judges(self, node: str) -> tuple[Judge, ...]:
        """Return the models of the spec that score the completions of a node."""
        speaks: dict[Reference, bool] = {}
        for noun, name in self._graph.nodes[node].uses:
            reward = self._program.declarations[name].value if noun == "reward" else None
            if isinstance(reward, Learned):
                speaks[reward.from_] = False
            elif isinstance(reward, Rubric) and isinstance(reward.judge, LocalJudge):
                speaks[reward.judge.model] = True
        shapes = ((self.merged(node, reference), spoken) for reference, spoken in speaks.items())
        return tuple(Judge(s.architecture, DTYPE_BYTES[s.dtype], spoken) for s, spoken in shapes)

    def name_of(self, node: str) -> str:
        """Return the declared model that a node's weights descend from."""
        return graphs.models_of(self._graph, node)[0]

    def dtype(self, name: str) -> str:
        """Return the dtype of a declared model, as the spec writes it."""
        dtype: str = self._program.declarations[name].value.dtype
        return dtype

    def architecture(self, name: str) -> Architecture:
        """Return the architecture of a declared model."""
        if name not in self._architectures:
            self._architectures[name] = self._read(name)
        return self._architectures[name]

    def _read(self, name: str) -> Architecture:
        kind = self._program.declarations[name].value
        vocabulary = 0 if kind.tokenizer is None else self._vocabulary(kind.tokenizer.name)
        if isinstance(kind, models.Pretrained):
            planned = model_folder.plan_architecture(kind, self._program.folder)
            return model_folder.with_vocabulary(planned, vocabulary)
        return from_transformer(kind, vocabulary, PRESETS)

    def _vocabulary(self, name: str) -> int:
        tokenizer = self._program.declarations[name].value
        if isinstance(tokenizer, models.Trained):
            return tokenizer.vocabulary  # at most: fitting it takes its data
        return open_renderer(tokenizer, self._program.folder, cache=Path()).tokenizer.size

    def _origin(self, node: str, reference: Reference) -> str:
        """Return the declared model that a reference of a node descends from."""
        for read in self._graph.nodes[node].inputs:
            if read.stage == reference.name:
                return self.name_of(read.nodes[0])
        return reference.name
