"""Adapters as data: low-rank updates of chosen matrices of a decoder, and what is trained of them.

An architecture with adapters is a decoder of its own: its weights are frozen, in the form that
`Architecture.storage` says, and the last adapter is trained. Those before it stay as they are.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import cast

from typing_extensions import override

from tunelang.compiler.models.architecture import Adapter, Architecture, Storage
from tunelang.dsl.diagnostics.tune_error import WRONG_SPEC, FailureText, SpecPlace, TuneError
from tunelang.dsl.messages import run_failures
from tunelang.dsl.vocabulary.models import Pretrained, Transformer
from tunelang.dsl.vocabulary.training import TARGETS, Dora, Lora

_ROLES = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
    "embed": ("embedding",),
}


@dataclass(eq=False)
class NoTargetError(TuneError):
    """A target of an adapter is no matrix of the architecture, whose matrices are `known`; or the
    adapter cannot be on it, and `why` says so.
    """

    code = "no-target"
    exit_code = WRONG_SPEC
    target: str
    known: tuple[str, ...]
    why: str = ""

    @override
    def text(self, stage: str) -> FailureText:
        return run_failures.no_target(self.target, self.known, self.why)

    @override
    def place(self) -> SpecPlace:
        return SpecPlace(attribute="adapter")


def storage_of(model: Pretrained | Transformer) -> Storage:
    """Return how a declared model keeps weights that are not trained."""
    return cast(Storage, getattr(model, "weights", None) or model.dtype)


def matrices(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return path -> inputs and outputs of every matrix that an adapter may be on.

    A path of a block stands for the matrix in all layers.
    """
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    sizes = {
        "blocks.attention.q": (a.width, queries),
        "blocks.attention.k": (a.width, keys),
        "blocks.attention.v": (a.width, keys),
        "blocks.attention.o": (queries, a.width),
        "embedding": (a.vocabulary, a.width),
    }
    if a.experts is None:
        sizes["blocks.mlp.up"] = a.width, a.mlp
        sizes["blocks.mlp.down"] = a.mlp, a.width
    if a.gated and a.experts is None:
        sizes["blocks.mlp.gate"] = a.width, a.mlp
    if not a.tied and not a.scores:
        sizes["head"] = a.vocabulary, a.width
    return sizes


def adapter_of(lora: Lora, architecture: Architecture) -> Adapter:
    """Return the adapter that a stage asks for; raises `NoTargetError`."""
    known = tuple(matrices(architecture))
    chosen: set[str] = set()
    for target in lora.targets:
        if target in TARGETS:
            names = _ROLES.get(target, (target,))
            hits = [path for path in known if path.rpartition(".")[2] in names]
        else:
            hits = [path for path in known if re.search(target, path)]
        if not hits:
            raise NoTargetError(target, known)
        chosen.update(hits)
    if isinstance(lora, Dora) and chosen & {"embedding", "head"}:
        raise NoTargetError("embedding", known, "`dora` is for the matrices of blocks")
    root = math.sqrt(lora.rank) if lora.rank_stabilized else lora.rank
    return Adapter(
        rank=lora.rank,
        scale=lora.alpha / root,
        matrices=tuple(path for path in known if path in chosen),
        dropout=lora.dropout,
        magnitudes=isinstance(lora, Dora),
    )


def adapted(architecture: Architecture, loras: tuple[Lora, ...], storage: Storage) -> Architecture:
    """Return an architecture without adapters with these, on weights that are kept so.

    Raises `NoTargetError`.
    """
    if not loras:
        return architecture
    adapters = tuple(adapter_of(lora, architecture) for lora in loras)
    return replace(architecture, adapters=adapters, storage=storage)
