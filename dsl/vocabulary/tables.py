"""Tables of everything that a spec can say: nouns, their kinds, functions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from tunelang.dsl.vocabulary import data, models, optimizer_kinds, rewards, stages, training
from tunelang.dsl.vocabulary.base import Function, Kind, KindInfo, doc_of
from tunelang.dsl.vocabulary.policy_stages import POLICIES, Policy, Ppo
from tunelang.dsl.vocabulary.preference_stages import PREFERENCES, Kto, Preference, RewardModel
from tunelang.dsl.vocabulary.supervised_stages import Distill, Pretrain, Sft
from tunelang.dsl.vocabulary.utility_stages import Evaluate, Export, Merge, Sample

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


STAGES: dict[str, type[stages.Stage]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "kto": Kto,
    "reward_model": RewardModel,
    "ppo": Ppo,
    "distill": Distill,
    "sample": Sample,
    "merge": Merge,
    "evaluate": Evaluate,
    "export": Export,
}
"""Kind of stage -> its class. Presets of a class are in `PREFERENCES` and `POLICIES`."""


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
    found = {
        noun: {word: KindInfo(noun, word, model, doc_of(model)) for word, model in table.items()}
        for noun, table in tables.items()
    }
    for model, rows in ((Preference, PREFERENCES), (Policy, POLICIES)):
        for word, (doc, presets) in rows.items():
            found["stage"][word] = KindInfo("stage", word, model, doc, tuple(presets.items()))
    return found


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
    """The words of a family's functions."""
    return tuple(word for word, function in FUNCTIONS.items() if function.family == family)
