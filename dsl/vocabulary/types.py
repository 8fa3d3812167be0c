"""The types that an attribute or argument may have: what is accepted, how it reads, its JSON
Schema.

A type stands in the annotation of a pydantic field: `rank: Annotated[int, Whole(low=1)]`. The
Python value that a field holds is named in each docstring.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from tunelang.dsl.syntax.units import COUNTED, show

Json = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Type:
    """Base of all types."""

    def describe(self) -> str:
        """Return its name in messages and the reference: `a whole number from 1`."""
        raise NotImplementedError

    def json(self) -> Json:
        """Return the JSON Schema of the value in a resolved Program."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Number(Type):
    """A plain number (`float`), within inclusive (`low`, `high`) or exclusive (`above`, `below`)
    bounds.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    noun = "a number"

    @override
    def describe(self) -> str:
        bounds = [
            f"from {show(self.low)}" if self.low is not None else "",
            f"above {show(self.above)}" if self.above is not None else "",
            f"to {show(self.high)}" if self.high is not None else "",
            f"below {show(self.below)}" if self.below is not None else "",
        ]
        return " ".join([self.noun, *filter(None, bounds)])

    @override
    def json(self) -> Json:
        limits = {
            "minimum": self.low,
            "maximum": self.high,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
        }
        return {"type": "number", **{k: v for k, v in limits.items() if v is not None}}

    def admits(self, value: float) -> bool:
        """Return whether a value is within the bounds."""
        return not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )


@dataclass(frozen=True, eq=False, repr=False)
class Whole(Number):
    """A whole number (`int`): `8`, `10_000`, `5k`, `4Ki`."""

    noun = "a whole number"

    @override
    def json(self) -> Json:
        return {**super().json(), "type": "integer"}


@dataclass(frozen=True, eq=False, repr=False)
class Share(Number):
    """A part of a whole (`float` from 0 to 1): `5%`, or `0.05`."""

    low: float | None = 0
    high: float | None = 1

    @override
    def describe(self) -> str:
        return "a percentage" if self.high != 1 else "a percentage up to 100%"


@dataclass(frozen=True, eq=False, repr=False)
class Amount(Type):
    """A whole number of something.

    With one unit the value is an `int` and the unit may be left out (`max_tokens = 512`); with
    several, a `Measure`, and the unit must be written (`length = 2 epochs`). `share` also admits a
    percentage (`warmup = 3%`), which makes it a `Measure` too.
    """

    units: tuple[str, ...]
    low: int = 1
    share: bool = False

    @property
    def measured(self) -> bool:
        """Return whether the value keeps its unit."""
        return len(self.units) > 1 or self.share

    @override
    def describe(self) -> str:
        names = "a number of " + " or ".join(
            [", ".join(self.units[:-1]), self.units[-1]][-len(self.units) :]
        )
        return f"{names}, or a percentage" if self.share else names

    @override
    def json(self) -> Json:
        if not self.measured:
            return {"type": "integer", "minimum": self.low}
        units = [*self.units, "%"] if self.share else list(self.units)
        properties = {"value": {"type": "number", "minimum": 0}, "unit": {"enum": units}}
        return {"type": "object", "properties": properties, "required": ["value", "unit"]}


@dataclass(frozen=True, eq=False, repr=False)
class Memory(Type):
    """An amount of memory in bytes (`int`): `16 GiB`, `5 GB`."""

    @override
    def describe(self) -> str:
        return "an amount of memory, such as `16 GiB`"

    @override
    def json(self) -> Json:
        return {"type": "integer", "minimum": 1}


@dataclass(frozen=True, eq=False, repr=False)
class Duration(Type):
    """A time in seconds (`float`): `30s`, `5m`, `2h`."""

    @override
    def describe(self) -> str:
        return "a time, such as `30s` or `5m`"

    @override
    def json(self) -> Json:
        return {"type": "number", "exclusiveMinimum": 0}


@dataclass(frozen=True, eq=False, repr=False)
class Price(Type):
    """Money per device and hour (`float`): `1.2 per device_hour`."""

    @override
    def describe(self) -> str:
        return "a price, such as `1.2 per device_hour`"

    @override
    def json(self) -> Json:
        return {"type": "number", "minimum": 0}


@dataclass(frozen=True, eq=False, repr=False)
class Text(Type):
    """Text taken as it stands (`str`); braces mean nothing in it. `among` closes the set of
    texts.
    """

    among: tuple[str, ...] = ()

    @override
    def describe(self) -> str:
        words = ", ".join(f'`"{word}"`' for word in self.among)
        return f"one of {words}" if self.among else "text"

    @override
    def json(self) -> Json:
        return {"enum": list(self.among)} if self.among else {"type": "string"}


@dataclass(frozen=True, eq=False, repr=False)
class Path(Type):
    """A path (`str`), relative to the file that it is written in; the Program has it relative to
    the spec.

    `what` is `file`, which must exist; `model`, a folder or an id on the hub (`google/gemma-2b`);
    `python`, a file and a function (`rewards/mine.py:score`); or `output`, which the run makes.
    """

    what: str = "file"
    suffixes: tuple[str, ...] = ()

    @override
    def describe(self) -> str:
        return {
            "file": "the path of a file",
            "python": "a Python function, as `file.py:function`",
            "model": "the path of a model folder, or a hub id such as `google/gemma-2b`",
            "output": "the path of a folder to write",
        }[self.what]

    @override
    def json(self) -> Json:
        return {"type": "string", "minLength": 1}


def is_hub_id(path: str) -> bool:
    """Return whether a path has the form of an id on the Hugging Face hub: `organisation/name`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


@dataclass(frozen=True, eq=False, repr=False)
class Pattern(Type):
    """A regular expression in Python's syntax (`str`): `/a+b/`."""

    @override
    def describe(self) -> str:
        return "a regular expression between slashes"

    @override
    def json(self) -> Json:
        return {"type": "string", "format": "regex"}


@dataclass(frozen=True, eq=False, repr=False)
class Flag(Type):
    """`true` or `false` (`bool`)."""

    @override
    def describe(self) -> str:
        return "`true` or `false`"

    @override
    def json(self) -> Json:
        return {"type": "boolean"}


@dataclass(frozen=True, eq=False, repr=False)
class Choice(Type):
    """One of a few words, written bare (`str`): `decay = cosine`."""

    words: tuple[str, ...]

    @override
    def describe(self) -> str:
        return "one of " + ", ".join(f"`{word}`" for word in self.words)

    @override
    def json(self) -> Json:
        return {"enum": list(self.words)}


@dataclass(frozen=True, eq=False, repr=False)
class Code(Choice):
    """A Python function of the user's own (`Python`), or one of a few words (`str`)."""

    takes: dict[str, str] = field(default_factory=dict)
    """Parameter -> what it is given, with the shape. Each may be left out."""
    gives: str = ""
    """The function's result, in words."""
    fields: bool = False
    """Whether the parameters are fields of the data too."""

    @override
    def describe(self) -> str:
        words = f"{super().describe()}, or " if self.words else ""
        return f'{words}a Python function, `python("file.py:function")`'

    def signature(self) -> str:
        """Return the parameters and result of the function as Markdown."""
        given = "; ".join(f"`{name}`, {what}" for name, what in self.takes.items())
        fields = "; and any field of the data" if self.fields else ""
        return (
            f"called with those of these that its parameters name: {given}{fields}. Returns"
            f" {self.gives}"
        )

    @override
    def json(self) -> Json:
        words = [super().json()] if self.words else []
        return {"anyOf": [*words, {"$ref": "#/$defs/family.reward"}]}


@dataclass(frozen=True, eq=False, repr=False)
class Ref(Type):
    """A declaration of one of these nouns (`Reference`)."""

    nouns: tuple[str, ...]

    @override
    def describe(self) -> str:
        names = [f"{'an' if noun[0] in 'aeiou' else 'a'} `{noun}`" for noun in self.nouns]
        return "the name of " + " or ".join(names)

    @override
    def json(self) -> Json:
        return {"$ref": "#/$defs/reference"}


@dataclass(frozen=True, eq=False, repr=False)
class Of(Type):
    """A value of a family: a call such as `adamw(lr = 1e-5)`, or an expression over data or
    rewards.

    The Python value is an instance of the family's base class.
    """

    family: str

    @override
    def describe(self) -> str:
        return FAMILIES[self.family]

    @override
    def json(self) -> Json:
        return {"$ref": f"#/$defs/family.{self.family}"}


FAMILIES = {
    "text": 'a template such as `"{question}"`',
    "data": "data: a name, or an expression such as `80% * a + 20% * b`",
    "reward": "a reward: a name, or an expression such as `0.8 * correct + 0.2 * shape`",
    "optimizer": "an optimizer, such as `adamw(lr = 1e-5)`",
    "adapter": "an adapter, such as `lora(rank = 16)`",
    "sampling": "settings of sampling, such as `sampling(max_tokens = 512)`",
    "tracker": "a tracker, such as `tensorboard()`",
    "criterion": 'a criterion, such as `criterion("Opens with an image", weight = 2)`',
    "judge": 'a judge: `endpoint("http://localhost:8000/v1", model = "judge")` or `local(gemma)`',
    "winner": "`best(metric)`, `lowest(metric)` or `all`",
    "merging": "`linear()`, `slerp(50%)`, `ties(density = 20%)` or `dare(density = 50%)`",
    "divergence": "`forward_kl()`, `reverse_kl()` or `jensen_shannon(0.5)`",
    "attention": "a term for attention maps, such as `maps(weight = 1.0)`",
    "features": "a term for hidden states, such as `hidden(weight = 1.0)`",
    "critic": "a critic, such as `critic(optimizer = adamw(lr = 1e-5))`",
    "mesh": "mesh axes, such as `axes(fsdp = 8, tensor = 4)`",
    "clip": "`clip(low = 0.2, high = 0.28)` or `clip_weights(high = 5)`",
    "kl": "a KL term, such as `k3(0.04)`",
    "correction": "`truncated(2.0)` or `masked(2.0)`",
    "experts": "`experts(count = 64, active = 8, width = 768)`",
    "settings": "`settings(name = value, ...)`",
    "condition": "a condition on an example, such as `length < 512`",
}
"""Family -> how a message calls its values."""


@dataclass(frozen=True, eq=False, repr=False)
class ListOf(Type):
    """`[a, b]` (`tuple`); a single value stands for a list of one."""

    item: Type
    low: int = 0

    @override
    def describe(self) -> str:
        return f"{self.item.describe()}, or a list of them in `[ ]`"

    @override
    def json(self) -> Json:
        return {"type": "array", "items": self.item.json(), "minItems": self.low}


@dataclass(frozen=True, eq=False, repr=False)
class Either(Type):
    """A value of any of several types; the first that accepts it decides."""

    options: tuple[Type, ...]

    @override
    def describe(self) -> str:
        return " or ".join(option.describe() for option in self.options)

    @override
    def json(self) -> Json:
        return {"anyOf": [option.json() for option in self.options]}


@dataclass(frozen=True, eq=False, repr=False)
class Metric(Type):
    """A metric that a stage yields (`MetricName`): an eval, `eval.metric`, `loss`,
    `data.reward`.
    """

    @override
    def describe(self) -> str:
        return "a metric: the name of an eval, or `loss`, `reward`, ..."

    @override
    def json(self) -> Json:
        return {"type": "string"}


@dataclass(frozen=True, eq=False, repr=False)
class Anything(Type):
    """Any value: of a `let`, or a setting of a generator."""

    @override
    def describe(self) -> str:
        return "a value"

    @override
    def json(self) -> Json:
        return {}


def count(*units: str, low: int = 1, share: bool = False) -> Amount:
    """Return an `Amount` of the given units."""
    assert all(unit in COUNTED for unit in units)
    return Amount(units, low, share)


PARAMETERS: dict[str, Type] = {
    "number": Number(),
    "integer": Whole(),
    "percent": Share(),
    "text": Text(),
    "flag": Flag(),
    "regex": Pattern(),
    "memory": Memory(),
    "time": Duration(),
    "tokens": count("tokens", low=0),
    "steps": count("steps", low=0),
    "epochs": count("epochs", low=0),
    "prompts": count("prompts"),
    "sequences": count("sequences"),
    "tokenizer": Ref(("tokenizer",)),
    "model": Ref(("model", "stage")),
    "stage": Ref(("stage",)),
    "eval": Ref(("eval",)),
    "hardware": Ref(("hardware",)),
    "data": Of("data"),
    "reward": Of("reward"),
}
"""The types that a parameter may state, beside `choice(a, b)`."""
