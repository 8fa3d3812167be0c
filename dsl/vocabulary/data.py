"""Data: the kinds of sources, expressions over them, and the text functions of their templates."""

from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Condition,
    Count,
    Data,
    DataExpression,
    Function,
    Kind,
    MaybeTemplate,
    Reference,
    Template,
    TextExpression,
    Words,
    result,
)

ROLES = (
    "prompt", "response", "target", "messages", "system", "text",
    "chosen", "rejected", "label", "margin",
)  # fmt: skip
"""Roles of the fields of an example; each is an attribute of every data kind."""


LONG_ROW = ("drop", "cut", "divide", "stop")


class DataKind(Kind):
    """A source of examples. The roles say which text of a row is the prompt, the response, ..."""

    prompt: MaybeTemplate = result(
        "The prompt: a template over the fields of a row.",
        'prompt = "{question}"',
        None,
    )
    response: MaybeTemplate = result(
        "The answer that the model should give; supervised fine-tuning trains on it alone.",
        'response = "{answer}"',
        None,
    )
    target: MaybeTemplate = result(
        "The reference that rewards compare a completion with.",
        'target = after("####", "{answer}")',
        None,
    )
    messages: MaybeTemplate = result(
        "The field with a conversation: a list of objects with `role` and `content`.",
        'messages = "{messages}"',
        None,
    )
    system: MaybeTemplate = result(
        "A system message before the prompt.", 'system = "Answer with a number."', None
    )
    text: MaybeTemplate = result(
        "Plain text, for pre-training and perplexity: every token counts.",
        'text = "{body}"',
        None,
    )
    chosen: MaybeTemplate = result(
        "The better of two answers, for learning from preferences.", 'chosen = "{good}"', None
    )
    rejected: MaybeTemplate = result(
        "The worse of two answers, for learning from preferences.", 'rejected = "{bad}"', None
    )
    label: MaybeTemplate = result(
        "Whether the response is desirable: `true`, `yes` or `1`; or `false`, `no` or `0`.",
        'label = "{is_correct}"',
        None,
    )
    margin: MaybeTemplate = result(
        "By how much the chosen answer is better: the margin that a reward model must keep between"
        " the two scores.",
        'margin = "{gap}"',
        None,
    )
    on_bad_row: Annotated[str, types.Choice(("drop", "stop"))] = result(
        "What happens to a row with a missing field or a field of the wrong type. Dropped rows are"
        " counted and the first few are shown.",
        "on_bad_row = stop",
        "drop",
    )
    on_long_row: Annotated[str, types.Choice(LONG_ROW)] = result(
        "What happens to a row that is longer than the context. `cut` truncates its end;"
        " `divide` splits plain text into several rows, so that every token is trained on once. The"
        " prompts of a rollout are never truncated: `cut` drops them.",
        "on_long_row = cut",
        "drop",
    )


Files = Annotated[tuple[str, ...], types.ListOf(types.Path("file"), low=1)]


class Jsonl(DataKind):
    """Rows from files with one JSON object a line."""

    path: Files = result(
        "The file, or a list of files read one after another.", 'path = "train.jsonl"'
    )


class Parquet(DataKind):
    """Rows from Parquet files."""

    path: Files = result(
        "The file, or a list of files read one after another.", 'path = "a.parquet"'
    )


class Csv(DataKind):
    """Rows from files of comma-separated values whose first line names the fields."""

    path: Files = result(
        "The file, or a list of files read one after another.", 'path = "train.csv"'
    )
    separator: Words = result("What separates the fields of a line.", 'separator = ";"', ",")


class TextFiles(DataKind):
    """Plain text. Each row has one field, `text`, which is also the default role `text`."""

    path: Files = result(
        "The file, or a list of files read one after another.", 'path = "input.txt"'
    )
    rows: Annotated[str, types.Choice(("file", "line", "paragraph"))] = result(
        "What one row is: a file, a line, or a paragraph (text between empty lines).",
        "rows = paragraph",
        "file",
    )
    on_long_row: Annotated[str, types.Choice(LONG_ROW)] = result(
        "What happens to a row that is longer than the context. By default it is divided, so that"
        " every token is trained on once.",
        "on_long_row = cut",
        "divide",
    )


FileData = Jsonl | Parquet | Csv | TextFiles
"""Sources whose rows stand in files: their attribute `path` lists them."""


class Settings(Function):
    """Named settings that are passed on unchanged, checked against the generator's list."""

    family = "settings"
    word = "settings"
    variadic: ClassVar[str] = "values"
    values: dict[str, int | float | str | bool | tuple[int | float | str, ...] | None] = {}


class Procedural(DataKind):
    """Problems from a generator of reasoning-gym, which also verifies answers.

    The fields are `question`, `answer` and `metadata`, of which `{metadata.name}` is a part.
    Unless roles are set, the prompt is `{question}`, and the response and the target are
    `{answer}`.
    """

    task: Words = result("The name of the generator.", 'task = "knights_knaves"')
    size: Count = result("Number of problems to generate.", "size = 5k", 1000)
    seed: Annotated[int, types.Whole(low=0)] = result("The generator's seed.", "seed = 3", 0)
    settings: Annotated[Settings | None, types.Of("settings")] = result(
        "Settings of the generator.", "settings = settings(n_people = 2)", None
    )


class PythonData(DataKind):
    """Rows from a custom Python function: `function` is called once, with `settings` by
    name, and returns an iterable of dicts with equal keys, the fields of the rows.

    The rows are cached in the store, and generated again if the file or the settings change.
    Changes of other files that the function reads are not noticed.
    """

    function: Annotated[str, types.Path("python")] = result(
        "The file, relative to the spec, and the function.", 'function = "data/mine.py:rows"'
    )
    settings: Annotated[Settings | None, types.Of("settings")] = result(
        "Arguments of the function.", "settings = settings(count = 2000)", None
    )
    fields: Annotated[tuple[str, ...] | None, types.ListOf(types.Text(), low=1)] = result(
        "The fields, so that templates are checked before anything runs.",
        'fields = ["question", "answer"]',
        None,
    )


class Sampled(DataKind):
    """The rows that a `sample` stage wrote.

    The fields are those of the prompt's own data, `prompt`, `completion`, `target`, `reward` and
    `tokens`; with `pairs`, `chosen` and `rejected` with their rewards in place of the completion.
    Unless roles are set, these are the roles, and the completion is the response.
    """

    reads = {"from": ("rows",)}

    from_: Annotated[Reference, types.Ref(("stage",))] = result(
        "The stage.", "from = tries", alias="from"
    )
    rows: Annotated[str, types.Choice(("completions", "pairs"))] = result(
        "One row for each completion; or one for each prompt, its best completion against its"
        " worst, if their rewards differ.",
        "rows = pairs",
        "completions",
    )


def sampled_roles(kind: Sampled) -> dict[str, str]:
    """Return the roles, besides prompt and target, that sampled data implies, with their fields."""
    if kind.rows == "pairs":
        return {"chosen": "chosen", "rejected": "rejected"}
    return {"response": "completion"}


# Expressions over data.


class DataRef(DataExpression):
    """Declared data, by name."""

    word = ""
    name: str


class Weighted(DataExpression):
    """`80% * gsm8k`: data with its share of a mixture."""

    word = ""
    of: Data
    weight: float


class Mixture(DataExpression):
    """`80% * a + 20% * b`: each batch has examples of each source in its proportion.

    An epoch is as many examples as the sources have together.
    """

    word = ""
    parts: tuple[SerializeAsAny[Weighted], ...]


class DataMethod(DataExpression):
    """Base of what is written `data.method(...)`; `of` is the data before the dot."""

    word = ""
    of: Data


class Take(DataMethod):
    """The first `count` examples."""

    word = "take"
    count: Count = result("Number of examples.", "gsm8k.take(1000)", positional=True)


class Skip(DataMethod):
    """All examples except the first `count`."""

    word = "skip"
    count: Annotated[int, types.Whole(low=0)] = result(
        "Number of examples.", "gsm8k.skip(1000)", positional=True
    )


class Shuffle(DataMethod):
    """The examples in a random order, fixed by the seed."""

    word = "shuffle"
    seed: Annotated[int, types.Whole(low=0)] = result(
        "The seed of the order.", "gsm8k.shuffle(seed = 1)", 0, positional=True
    )


class Repeat(DataMethod):
    """The examples, repeated."""

    word = "repeat"
    times: Count = result("How many times.", "gsm8k.repeat(3)", positional=True)


class Where(DataMethod):
    """The examples that meet a condition. `length` is the example's number of tokens."""

    word = "where"
    condition: Annotated[SerializeAsAny[Condition], types.Of("condition")] = result(
        "The condition, over the fields of the example.",
        "gsm8k.where(length < 512)",
        positional=True,
    )


class Map(DataMethod):
    """The examples with other templates for some of their roles."""

    word = "map"
    prompt: MaybeTemplate = result("The new prompt.", 'gsm8k.map(prompt = "Q: {question}")', None)
    response: MaybeTemplate = result("The new response.", 'gsm8k.map(response = "{answer}")', None)
    target: MaybeTemplate = result("The new target.", 'gsm8k.map(target = "{answer}")', None)
    messages: MaybeTemplate = result(
        "The new conversation.", 'gsm8k.map(messages = "{chat}")', None
    )
    system: MaybeTemplate = result(
        "The new system message.", 'gsm8k.map(system = "Be brief.")', None
    )
    text: MaybeTemplate = result("The new plain text.", 'gsm8k.map(text = "{body}")', None)
    chosen: MaybeTemplate = result("The new better answer.", 'gsm8k.map(chosen = "{good}")', None)
    rejected: MaybeTemplate = result("The new worse answer.", 'gsm8k.map(rejected = "{bad}")', None)
    label: MaybeTemplate = result("The new label.", 'gsm8k.map(label = "{is_correct}")', None)
    margin: MaybeTemplate = result("The new margin.", 'gsm8k.map(margin = "{gap}")', None)


class Split(DataMethod):
    """Named parts of the data, each a share of it; `train` is the remainder.

    The part of an example depends only on its content, so adding rows moves no other
    row from one part to another.
    """

    word = "split"
    variadic: ClassVar[str] = "parts"
    parts: dict[str, float]
    part: str | None = None


# Conditions on one example.


class FieldValue(Condition):
    """A field of the example, or `length`, its number of tokens."""

    word = ""
    name: str


class Literal(Condition):
    """A constant."""

    word = ""
    value: int | float | str | bool | None


class Operator(Condition):
    """`and`, `or`, `not`, a comparison or an arithmetic operator over conditions."""

    word = ""
    operator: str
    operands: tuple[SerializeAsAny[Condition], ...]


# Text functions.


class TemplateText(TextExpression):
    """Text with `{field}` in it; `{{` and `}}` stand for braces."""

    word = ""
    text: str


class After(TextExpression):
    """The text after the last `marker`, without outer white space; empty if there is none."""

    word = "after"
    marker: Words = result("What to look for.", 'after("####", "{answer}")', positional=True)
    text: Template = result("Where to look.", 'after("####", "{answer}")', positional=True)


class Before(TextExpression):
    """The text before the first `marker`, without outer white space; all of it if there is none."""

    word = "before"
    marker: Words = result("What to look for.", 'before("####", "{answer}")', positional=True)
    text: Template = result("Where to look.", 'before("####", "{answer}")', positional=True)


class Between(TextExpression):
    """The text between two markers, at their last occurrence, without outer white space; empty if
    there is none.
    """

    word = "between"
    start: Words = result(
        "The marker in front.", 'between("<answer>", "</answer>", "{completion}")', positional=True
    )
    end: Words = result(
        "The marker behind.", 'between("<answer>", "</answer>", "{completion}")', positional=True
    )
    text: Template = result(
        "Where to look.", 'between("<answer>", "</answer>", "{completion}")', positional=True
    )


KINDS: dict[str, type[DataKind]] = {
    "jsonl": Jsonl,
    "parquet": Parquet,
    "csv": Csv,
    "text": TextFiles,
    "procedural": Procedural,
    "python": PythonData,
    "sampled": Sampled,
}
METHODS: dict[str, type[DataMethod]] = {
    m.word: m for m in (Take, Skip, Shuffle, Repeat, Where, Map, Split)
}
FUNCTIONS: tuple[type[Function], ...] = (Settings, After, Before, Between)
