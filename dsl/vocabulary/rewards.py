"""Rewards, judges and evaluations."""

from typing import Annotated, ClassVar

from pydantic import SerializeAsAny

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import (
    Count,
    Data,
    Flag,
    Function,
    Kind,
    MaybeCount,
    MaybeReward,
    MaybeTemplate,
    ModelRef,
    NonNegative,
    Positive,
    Reference,
    Reward,
    RewardExpression,
    Template,
    Words,
    observe,
    placement,
    result,
)
from tunelang.dsl.vocabulary.custom import Python
from tunelang.dsl.vocabulary.data import TemplateText

COMPLETION_FIELDS = ("completion", "prompt", "response", "target", "system", "text")
"""Fields of a reward's template besides those of the data."""

_COMPLETION = TemplateText.unvalidated(text="{completion}")
_TARGET = TemplateText.unvalidated(text="{target}")


class RewardRef(RewardExpression):
    """A declared reward, by name."""

    word = ""
    name: str


class RewardConstant(RewardExpression):
    """The same number for every completion."""

    word = ""
    value: float


class RewardOperator(RewardExpression):
    """Arithmetic or a comparison over rewards, element by element."""

    word = ""
    operator: str
    operands: tuple[SerializeAsAny[RewardExpression], ...]


class NumericMatch(RewardExpression):
    """1 if the last number in `text` equals the number in `target`, else 0.

    Thousands separators, currency signs, fractions and percentages are read as numbers.
    """

    word = "numeric_match"
    text: Template = result(
        "Where to find the answer.",
        'numeric_match("{completion}", "{target}")',
        _COMPLETION,
        positional=True,
    )
    target: Template = result(
        "The correct answer.", 'numeric_match("{completion}", "{target}")', _TARGET, positional=True
    )
    tolerance: NonNegative = result("Largest relative difference.", "tolerance = 1e-3", 0.0)


class Exact(RewardExpression):
    """1 if two texts are equal up to white space at their ends, else 0."""

    word = "exact"
    text: Template = result(
        "The answer.", 'exact("{completion}", "{target}")', _COMPLETION, positional=True
    )
    target: Template = result(
        "The correct answer.", 'exact("{completion}", "{target}")', _TARGET, positional=True
    )
    ignore_case: Flag = result("Whether `A` equals `a`.", "ignore_case = true", False)


class Contains(RewardExpression):
    """1 if `text` contains `part`, else 0."""

    word = "contains"
    text: Template = result(
        "Where to look.", 'contains("{completion}", "{target}")', _COMPLETION, positional=True
    )
    part: Template = result(
        "What to look for.", 'contains("{completion}", "{target}")', _TARGET, positional=True
    )
    ignore_case: Flag = result("Whether `A` equals `a`.", "ignore_case = true", False)


class Matches(RewardExpression):
    """1 if all of `text` matches the regular expression, else 0; a dot matches line ends
    too.
    """

    word = "matches"
    text: Template = result(
        "The text.",
        'matches("{completion}", /<think>.*<\\/think>.*/)',
        _COMPLETION,
        positional=True,
    )
    pattern: Annotated[str, types.Pattern()] = result(
        "The expression.", 'matches("{completion}", /<think>.*<\\/think>.*/)', positional=True
    )


class Verified(RewardExpression):
    """The score, from 0 to 1, that the generator of `procedural` data gives to the answer."""

    word = "verified"
    text: Template = result(
        "The answer.",
        'verified(between("<answer>", "</answer>", "{completion}"))',
        _COMPLETION,
        positional=True,
    )


class Length(RewardExpression):
    """The number of tokens of the completion."""

    word = "length"


class Overlong(RewardExpression):
    """A penalty for long completions, in tokens (DAPO, arXiv:2503.14476, equation 13).

    0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`.
    """

    word = "overlong"
    buffer: Annotated[int, types.count("tokens")] = result(
        "Number of tokens over which the penalty grows.", "overlong(512)", positional=True
    )


class BySource(RewardExpression):
    """A different reward for each source of a mixture, by the name of the data."""

    word = "by_source"
    variadic: ClassVar[str] = "sources"
    sources: dict[str, SerializeAsAny[RewardExpression]]


class Criterion(Function):
    """One criterion of a rubric, as text."""

    family = "criterion"
    word = "criterion"
    text: Words = result("What to look for.", 'criterion("Opens with an image")', positional=True)
    weight: Positive = result("Its weight relative to the others.", "weight = 2", 1.0)


class Endpoint(Function):
    """A model behind an OpenAI-compatible chat API."""

    family = "judge"
    word = "endpoint"
    url: Words = result(
        "The base URL.", 'endpoint("http://localhost:8000/v1", model = "judge")', positional=True
    )
    model: Words = result("The model's name there.", 'model = "judge"')
    key: Annotated[str | None, types.Text()] = placement(
        "The environment variable that holds the key.", 'key = "OPENAI_API_KEY"', None
    )
    concurrency: Count = placement("Concurrent requests.", "concurrency = 16", 8)
    retries: Annotated[int, types.Whole(low=0)] = placement(
        "Retries of a failed request.", "retries = 5", 3
    )
    timeout: Annotated[float, types.Duration()] = placement(
        "Time limit of one request.", "timeout = 1m", 60.0
    )


class LocalJudge(Function):
    """A model of the spec as the judge, on all devices of the run, with a copy in each of the
    smallest groups that have room for it. A copy judges 64 completions at once, with at most 256
    tokens of answer.
    """

    family = "judge"
    word = "local"
    model: ModelRef = result(
        "The model, or a stage that yields one.", "local(gemma)", positional=True
    )


class RewardKind(Kind):
    """A reward with settings."""

    on_error: Annotated[float, types.Number()] = result(
        "The reward of a completion that has no score: the judge did not answer, or it is too long"
        " for the model.",
        "on_error = 0.5",
        0.0,
    )


class Rubric(RewardKind):
    """A judge scores each completion against criteria; the reward is their weighted mean, 0 to
    1.
    """

    judge: Annotated[SerializeAsAny[Function], types.Of("judge")] = result(
        "The judge.", 'judge = endpoint("http://localhost:8000/v1", model = "judge")'
    )
    criteria: Annotated[tuple[Criterion, ...], types.ListOf(types.Of("criterion"), low=1)] = result(
        "What the judge looks for.", 'criteria = [criterion("Opens with an image")]'
    )
    instructions: MaybeTemplate = result(
        "Instructions to the judge, in place of the default text; `{criteria}`"
        " and `{completion}` must occur.",
        'instructions = "Judge {completion} by {criteria}."',
        None,
    )


class Learned(RewardKind):
    """The score that a reward model gives to a completion, on the scale of its training."""

    reads = {"from": ("scores",)}

    from_: Annotated[Reference, types.Ref(("stage",))] = result(
        "The `reward_model` stage.", "from = judge", alias="from"
    )


class EvalKind(Kind):
    """A measurement of a model on data that it was not trained on."""

    metrics: ClassVar[dict[str, str]] = {}
    """Metric -> what it is; the first is what the eval's bare name stands for."""

    @property
    def measures(self) -> dict[str, str]:
        """Return the metrics that this eval yields, with their documentation."""
        return self.metrics

    data: Data = result("The examples.", "data = math_test")
    limit: MaybeCount = result("Use only this many examples, the first ones.", "limit = 200", None)


class Generate(EvalKind):
    """Sample completions and score them."""

    metrics: ClassVar[dict[str, str]] = {
        "score": "mean score of all completions",
        "score_low": "lower bound of its 95% confidence interval",
        "score_high": "upper bound",
        "length": "mean number of tokens of a completion",
        "truncated": "share of completions that reached `max_tokens`",
    }
    score: Reward = result("What scores a completion.", "score = correct")
    max_tokens: Annotated[int, types.count("tokens")] = result(
        "The longest completion.", "max_tokens = 512", 256
    )
    temperature: NonNegative = result(
        "Softmax temperature. At 0 the most likely token is taken.", "temperature = 0.7", 0.0
    )
    top_p: Annotated[float | None, types.Share()] = result(
        "Sample only from the most likely tokens that together have this probability.",
        "top_p = 95%",
        None,
    )
    top_k: MaybeCount = result("Sample only from the k most likely tokens.", "top_k = 50", None)
    samples: Count = result("Completions for each prompt.", "samples = 8", 1)
    beams: MaybeCount = result(
        "Search for the most likely completion with this many beams instead of sampling.",
        "beams = 4",
        None,
    )
    also: Annotated[
        tuple[SerializeAsAny[RewardExpression], ...], types.ListOf(types.Of("reward"))
    ] = result(
        "Other declared rewards whose mean is reported, such as a stricter match.",
        "also = [strict]",
        (),
    )
    measured: Annotated[
        tuple[Python, ...],
        types.ListOf(
            types.Code(
                (),
                {
                    "completion": "a list of texts, all of them",
                    "score": "a list of numbers, their scores",
                    "prompt": "`target` and the other roles: lists as long",
                },
                "a number. It runs in a separate process, within its `timeout`.",
                True,
            )
        ),
    ] = result(
        "Custom metrics over all completions, each named after its function.",
        'measured = python("metrics.py:macro_f1")',
        (),
    )
    rank: MaybeReward = result(
        "The reward that selects the best of the `samples`, whose score is `best_of_n`.",
        "rank = helpful",
        None,
    )
    show: Annotated[int, types.Whole(low=0)] = observe(
        "Completions to store for reading.", "show = 10", 4
    )

    @property
    def ks(self) -> tuple[int, ...]:
        """Return the `k` for which pass@k is reported: 1, 2, 4, ... and `samples`."""
        powers = (1 << power for power in range((self.samples - 1).bit_length()))
        return (*powers, self.samples)

    @staticmethod
    def called(reward: RewardExpression) -> str:
        """Return the metric of a further reward."""
        return reward.name if isinstance(reward, RewardRef) else reward.word or "reward"

    @property
    def measures(self) -> dict[str, str]:
        """Return the metrics that this eval yields, with their documentation."""
        measures = dict(self.metrics)
        if self.samples > 1:
            measures |= {
                f"pass_at_{k}": f"chance that one of {k} completions scores 1 (arXiv:2107.03374)"
                for k in self.ks
            }
            measures["majority"] = "share of prompts whose most common answer scores 1"
        if self.rank is not None:
            measures["best_of_n"] = "mean score of the completion that `rank` selects"
        measures |= {self.called(item): "mean of this reward" for item in self.also}
        return measures | {item.name: "the custom function's result" for item in self.measured}


class Perplexity(EvalKind):
    """The loss on text of the data: on the response if there is one, else on every token."""

    metrics: ClassVar[dict[str, str]] = {
        "loss": "mean negative log-likelihood of a token, in nats",
        "perplexity": "exp of the loss",
    }


class Preference(EvalKind):
    """The share of pairs for which a model prefers the chosen answer to the rejected one.

    A language model prefers the more likely answer, a reward model the one with the higher score.
    """

    metrics: ClassVar[dict[str, str]] = {
        "accuracy": "share of pairs whose chosen answer is preferred; ties count half",
        "margin": "mean difference of the two scores",
    }
    per_token: Flag = result(
        "Whether answers are compared by their mean log-probability of a token, or by that of the"
        " whole answer, which favours short ones.",
        "per_token = false",
        True,
    )


REWARDS: dict[str, type[RewardKind]] = {"rubric": Rubric, "learned": Learned}
EVALS: dict[str, type[EvalKind]] = {
    "generate": Generate, "perplexity": Perplexity, "preference": Preference,
}  # fmt: skip
FUNCTIONS: tuple[type[Function], ...] = (
    NumericMatch, Exact, Contains, Matches, Verified, Length, Overlong, BySource, Python,
    Criterion, Endpoint, LocalJudge,
)  # fmt: skip
