"""Tables of everything that a spec can say: nouns, their kinds, functions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tunelang.dsl.vocabulary import (
    data,
    models,
    optimizer_kinds,
    policy_stages,
    preference_stages,
    rewards,
    stages,
    supervised_stages,
    training,
    utility_stages,
)
from tunelang.dsl.vocabulary.base import Function, Kind, KindInfo, doc_of

NOUNS: dict[str, str] = {
    "param": "A value that `--set`, or an importing file, may override.",
    "let": "A named expression.",
    "tokenizer": "A tokenizer, its special tokens and its chat template.",
    "model": "Initial weights of one architecture.",
    "data": "A stream of examples with named fields.",
    "reward": "A function that gives each completion a number.",
    "eval": "Metrics of a model, measured on examples.",
    "hardware": "A set of devices, here or elsewhere.",
    "stage": "A step of the pipeline. Its name refers to the model that it yields.",
}
"""Noun -> documentation."""

EXPRESSION_NOUNS = ("param", "let", "data", "reward")
"""Nouns that may be declared as `noun name = expression`."""


_STAGE_MODULES = (supervised_stages, preference_stages, policy_stages, utility_stages)


def _stages() -> dict[str, type[stages.Stage]]:
    """Return the stages that have a word of their own: the name of their semantics."""
    return {
        model.semantics[0]: model
        for module in _STAGE_MODULES
        for model in vars(module).values()
        if isinstance(model, type)
        and issubclass(model, stages.Stage)
        and "semantics" in vars(model)
        and model not in _PRESETS
    }


_PRESETS: dict[type[stages.Stage], dict[str, tuple[str, dict[str, object]]]] = {
    preference_stages.Preference: preference_stages.PREFERENCES,
    policy_stages.Policy: policy_stages.POLICIES,
}
"""Classes of stages that are written by the words of their presets only."""

STAGES = _stages()
"""Kind of stage -> its class, for all but presets."""


def _kinds() -> dict[str, dict[str, KindInfo]]:
    tables: dict[str, Mapping[str, type[Kind]]] = {
        "tokenizer": models.TOKENIZERS,
        "model": models.MODELS,
        "data": data.KINDS,
        "reward": rewards.REWARDS,
        "eval": rewards.EVALS,
        "hardware": models.HARDWARE,
        "stage": STAGES,
    }
    kinds = {
        noun: {word: KindInfo(noun, word, model, doc_of(model)) for word, model in table.items()}
        for noun, table in tables.items()
    }
    for model, rows in _PRESETS.items():
        for word, (doc, presets) in rows.items():
            kinds["stage"][word] = KindInfo("stage", word, model, doc, tuple(presets.items()))
    return kinds


KINDS = _kinds()
"""Noun -> kind -> what it is."""

RUN = KindInfo("run", "run", stages.Run, doc_of(stages.Run))
"""The attributes of the `run` block."""

FUNCTIONS: dict[str, type[Function]] = {
    function.word: function
    for function in (
        *data.FUNCTIONS,
        *models.FUNCTIONS,
        *rewards.FUNCTIONS,
        *optimizer_kinds.FUNCTIONS,
        *training.FUNCTIONS,
    )
}
"""Function -> its model. Data methods stand in `data.METHODS`."""

FORMS: dict[str, str] = {
    "each": "Fan out a stage into one branch for each value, and for each"
    " combination of several `each`.",
}
"""Forms of the language that look like calls."""


@cache
def functions_of(family: str) -> tuple[str, ...]:
    """Return the words of a family's functions."""
    return tuple(word for word, function in FUNCTIONS.items() if function.family == family)
