"""Every attribute of the vocabulary changes the fingerprint if and only if its effect says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.workspace import program, write
from tunelang.compiler.file_digests import Contents
from tunelang.compiler.fingerprint import fingerprints
from tunelang.compiler.graph import build
from tunelang.dsl.program import Branch, Declared, Program
from tunelang.dsl.vocabulary import data, models, optimizer_kinds, rewards, training, types
from tunelang.dsl.vocabulary.base import Attribute, Measure, Node, Reference, attributes
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.tables import FUNCTIONS, KINDS

SPEC = """\
hardware box : local { devices = 1 }
tokenizer letters : bytes { chat = chatml, special = ["<a>"] }
tokenizer pieces : sentencepiece { path = "pieces.model" }
tokenizer fast : huggingface { path = "models/tiny" }
tokenizer fitted : trained { data = prosa }
model tiny : pretrained { path = "models/tiny", tokenizer = pieces }
model small : transformer { tokenizer = letters, layers = 2, width = 8, heads = 2, experts = experts(count = 4, active = 2) }
model hub : pretrained { path = "google/gemma-2b", tokenizer = fast }
model fresh : transformer { tokenizer = fitted, preset = "qwen3-0.6b" }
data sums : jsonl { path = "data/sums.jsonl", prompt = "{question}", response = before("#", "{answer}"), target = after("####", "{answer}") }
data table : csv { path = "data/table.csv", prompt = "{question}", response = "{answer}", target = between("a", "b", "{answer}") }
data prosa : text { path = "data/prose.txt" }
data square : jsonl { path = "data/sums.jsonl", prompt = "{question}", response = "{answer}" }
data logic : procedural { task = "knights_knaves", settings = settings(n_people = 2) }
data spare : jsonl { path = "data/spare.jsonl", prompt = "{question}", response = "{answer}", target = "{answer}" }
data blend = 50% * sums.split(test = 20%).train.where(length < 90).shuffle() + 50% * spare.take(1).skip(0).repeat(2).map(prompt = "Q {question}")
reward spare_reward = exact()
reward judged : rubric { judge = endpoint("http://x/v1", model = "judge"), criteria = [criterion("Short")] }
reward inner : rubric { judge = local(tiny), criteria = [criterion("Kind")] }
reward mixed = 0.1 * numeric_match() + 0.1 * exact() + 0.1 * contains() + 0.1 * matches(pattern = /a/) + 0.1 * length() + 0.1 * overlong(9) + 0.1 * by_source(sums = judged, spare = inner) + 0.1 * python("rewards/mine.py:score")
reward solved = verified()
eval accuracy : generate { data = sums, score = spare_reward }
eval spare_eval : generate { data = spare, score = spare_reward }
eval fit_ : perplexity { data = sums }
stage a : pretrain { from = small, data = prosa, length = 9 steps, batch = 8 tokens, optimizer = muon(lr = 1e-3) }
stage b : sft { from = tiny, data = sums, length = 9 steps, batch = 8 sequences, adapter = lora(), optimizer = lion(lr = 1e-3), evals = [accuracy, fit_] }
stage c : sft { from = fresh, data = table, length = 9 steps, batch = 8 sequences, optimizer = sgd(lr = 1e-3), evals = [spare_eval] }
stage d : grpo { from = hub, data = blend, reward = mixed, length = 9 steps, batch = 8 prompts, rollout = sampling(stop = ["x"]), kl = k1(0.1), reference = tiny, correction = truncated(), mesh = axes() }
stage e : dapo { from = a, data = logic, reward = solved, length = 9 steps, batch = 8 prompts, kl = k2(0.1), correction = masked(), clip = clip_weights() }
stage f : gspo { from = b, data = square, reward = exact("{completion}", "{response}"), length = 9 steps, batch = 8 prompts, kl = k3(0.1), adapter = dora() }
data pairs : jsonl { path = "data/spare.jsonl", prompt = "{question}", chosen = "{answer}", rejected = "{question}" }
data marked : jsonl { path = "data/sums.jsonl", prompt = "{question}", response = "{answer}", label = "true" }
eval likes : preference { data = square.map(chosen = "{answer}", rejected = "{question}") }
stage early : sample { from = small, data = spare, rollout = sampling(max_tokens = 9) }
stage later : sample { from = hub, data = sums, score = spare_reward }
data tried : sampled { from = later }
stage g : dpo { from = b, data = pairs, length = 9 steps, batch = 8 sequences, evals = [likes] }
stage h : kto { from = b, data = marked, length = 9 steps, batch = 8 sequences }
stage i : reward_model { from = b, data = pairs, length = 9 steps, batch = 8 sequences }
reward scored : learned { from = i }
stage j : ppo { from = tiny, data = tried, reward = scored, length = 9 steps, batch = 8 prompts, value_model = i }
stage k : distill { from = small, teacher = hub, data = tried, length = 9 steps, batch = 8 sequences, divergence = jensen_shannon(), attention = maps(), features = hidden() }
stage l : distill { from = small, teacher = hub, data = tried, length = 9 steps, batch = 8 sequences, divergence = reverse_kl() }
stage m : merge { from = a, others = [b], method = linear() }
stage n : merge { from = a, others = [b], method = slerp() }
stage o : merge { from = a, others = [b], method = ties() }
stage p : merge { from = a, others = [b], method = dare() }
data own : python { function = "rewards/mine.py:score", settings = settings(completion = 1), prompt = "{a}", response = "{b}" }
stage r : sft { from = b, data = own, length = 9 steps, batch = 8 sequences }
stage q : evaluate { models = [a], evals = [likes] }
stage z : export { from = b, path = "out" }
"""

SAMPLES: dict[str, list[Node]] = {
    "text": [data.TemplateText.unvalidated(text="{other}")],
    "data": [
        data.DataRef.unvalidated(name="spare"),
        data.Take.unvalidated(of=data.DataRef.unvalidated(name="spare"), count=1),
    ],
    "reward": [rewards.Length.unvalidated(), rewards.RewardConstant.unvalidated(value=1.0)],
    "condition": [data.Literal.unvalidated(value=True), data.Literal.unvalidated(value=False)],
    "optimizer": [
        optimizer_kinds.Sgd.unvalidated(lr=0.5),
        optimizer_kinds.Lion.unvalidated(lr=0.5),
    ],
    "adapter": [training.Lora.unvalidated(), training.Dora.unvalidated()],
    "sampling": [training.Sampling.unvalidated(max_tokens=77)],
    "clip": [training.Clip.unvalidated(), training.ClipWeights.unvalidated()],
    "kl": [training.K1.unvalidated(coefficient=0.1), training.K2.unvalidated(coefficient=0.1)],
    "correction": [training.Truncated.unvalidated(), training.Masked.unvalidated()],
    "mesh": [training.Axes.unvalidated(fsdp=2), training.Axes.unvalidated()],
    "experts": [models.Experts.unvalidated(count=9, active=1)],
    "settings": [data.Settings.unvalidated(values={"n_people": 3})],
    "judge": [
        rewards.LocalJudge.unvalidated(model=Reference.unvalidated(noun="model", name="hub"))
    ],
    "criterion": [rewards.Criterion.unvalidated(text="Other")],
    "merging": [training.Linear.unvalidated(), training.Slerp.unvalidated()],
    "divergence": [training.ForwardKl.unvalidated(), training.ReverseKl.unvalidated()],
    "attention": [training.Maps.unvalidated(), training.Maps.unvalidated(weight=0.5)],
    "features": [training.Hidden.unvalidated(), training.Hidden.unvalidated(weight=0.5)],
    "critic": [training.Critic.unvalidated(trunk="shared")],
    "tracker": [training.TensorBoard.unvalidated()],
}
REFERENCES = {
    "tokenizer": ("letters", "pieces"),
    "model": ("hub", "small"),
    "eval": ("spare_eval", "accuracy"),
    "hardware": ("box", "box"),
    "stage": ("early", "a"),
}
FIRST = ("box", "letters", "pieces", "fast", "hub", "small", "spare", "spare_reward", "spare_eval")
"""What a changed value may name; a Program has what is used before its users."""
PATHS = {"file": "data/spare.jsonl", "model": "other/id", "python": "rewards/spare.py:score"}


def other(value: Any, want: types.Type) -> Any:
    """A value of the type that differs from this one."""
    match want:
        case types.Flag():
            return not value
        case types.Code() if value is None or isinstance(value, Python):
            return Python.unvalidated(reference="rewards/spare.py:score", on_error=0.0)
        case types.Choice(words=words):
            return next((word for word in words if word != value), "another")
        case types.Amount() if want.measured:
            return Measure.unvalidated(value=value.value + 1, unit=value.unit)
        case types.Whole() | types.Amount() | types.Memory() | types.Duration():
            return (value or 0) + 1
        case types.Number() | types.Price():
            return (value or 0.0) + 0.125
        case types.Path(what=what):
            return PATHS.get(what, "elsewhere")
        case types.Text() | types.Pattern():
            return (value or "") + "x"
        case types.Either(options=options):
            return "x" if value is None else other(value, options[-1])
        case types.ListOf(item=item):
            return (*(value or ()), other(value[0] if value else None, item))
        case types.Of(family=family):
            return next(sample for sample in SAMPLES[family] if sample != value)
        case types.Ref(nouns=nouns):
            one, two = REFERENCES[nouns[0]]
            name = two if value is not None and value.name == one else one
            return Reference.unvalidated(noun=nouns[0], name=name)
    raise AssertionError(want)


Mutation = tuple[type[Node], str, str, Node]
"""Whose attribute, its name, its effect, and the value with that attribute changed."""


def mutations(value: Node, outer: str = "result") -> Iterator[Mutation]:
    known = attributes(type(value))
    for name, info in type(value).model_fields.items():
        attribute = known.get(info.alias or name)
        held = getattr(value, name)
        effect = attribute.effect if attribute is not None and outer == "result" else outer
        if attribute is not None and not winner(attribute):
            changed = value.model_copy(update={name: other(held, attribute.type)})
            yield type(value), attribute.name, effect, changed
        for rebuild, inner in parts(held):
            for owner, word, deep, changed in mutations(inner, effect):
                yield owner, word, deep, value.model_copy(update={name: rebuild(changed)})


def parts(held: Any) -> Iterator[tuple[Any, Node]]:
    if isinstance(held, Node) and not isinstance(held, Measure | Reference):
        yield (lambda changed: changed), held
    elif isinstance(held, tuple):
        for at, item in enumerate(held):
            if isinstance(item, Node) and not isinstance(item, Reference):
                yield (lambda new, at=at: (*held[:at], new, *held[at + 1 :])), item
    elif isinstance(held, dict):
        for key, item in held.items():
            if isinstance(item, Node):
                yield (lambda new, key=key: {**held, key: new}), item


def winner(attribute: Attribute) -> bool:
    return isinstance(attribute.type, types.Of) and attribute.type.family == "winner"


def changed_program(base: Program, name: str, value: Node) -> Program:
    declared = base.declarations[name]
    if declared.branches:
        new = replace(declared, branches=(Branch((), value),))
    else:
        new = replace(declared, value=value)
    return replace(base, declarations={**base.declarations, name: new})


@pytest.fixture
def base(folder: Path) -> Program:
    write(folder / "data/other.parquet", "PAR1")
    made = program(SPEC, folder)
    square = made.declarations["square"]
    fields = {name: getattr(square.value, name) for name in type(square.value).model_fields}
    parquet = replace(square, kind="parquet", value=data.Parquet.unvalidated(**fields))
    first = {name: made.declarations[name] for name in FIRST}
    return replace(made, declarations={**first, **made.declarations, "square": parquet})


def all_digests(made: Program, contents: Contents) -> list[str]:
    return [found.digest for found in fingerprints(build(made), contents).values()]


def values(declared: Declared) -> list[Node]:
    held = [branch.value for branch in declared.branches] or [declared.value]
    return [value for value in held if isinstance(value, Node)]


def test_every_attribute_has_its_declared_effect(base: Program) -> None:
    contents = Contents()
    before = all_digests(base, contents)
    visited: set[tuple[type[Node], str]] = set()
    wrong: list[str] = []
    for declared in base.declarations.values():
        for value in values(declared):
            outer = "placement" if declared.noun == "hardware" else "result"
            for owner, word, effect, changed in mutations(value, outer):
                visited.add((owner, word))
                after = all_digests(changed_program(base, declared.name, changed), contents)
                if (after != before) != (effect == "result"):
                    wrong.append(f"{declared.title}: {owner.__name__}.{word} ({effect})")
    assert not wrong
    everything = [info.model for table in KINDS.values() for info in table.values()]
    everything += [*FUNCTIONS.values(), *data.METHODS.values()]
    for model in everything:
        if model in (models.Tpu, models.Gpu, training.Best, training.Lowest, training.Wandb):
            continue  # hardware, winners and trackers: tested by name
        for word, attribute in attributes(model).items():
            assert (model, word) in visited or winner(attribute), (model, word)
