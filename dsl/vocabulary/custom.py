"""Custom Python functions."""

from typing import Annotated

from tunelang.dsl.vocabulary import types
from tunelang.dsl.vocabulary.base import RewardExpression, placement, result

COMPLETION_TOKENS = "completion_tokens"
"""The parameter of a reward that takes the texts of a completion's tokens."""


class Python(RewardExpression):
    """A custom Python function: `python("rewards/mine.py:score")`.

    As a reward it is called once for each completion, in a separate process, with the fields that
    its parameters name (`completion`, `prompt`, `target`, or any field of the data) and returns a
    number; or a list of numbers, one for each of `completion_tokens`, the texts of its tokens. The
    reward is then their sum, and PPO credits each token with its own. It may also be a loss,
    an advantage, a schedule or a metric: `tune explain` of the attribute lists its parameters.
    """

    word = "python"
    reference: Annotated[str, types.Path("python")] = result(
        "The file, relative to the spec, and the function.",
        'python("rewards/mine.py:score")',
        positional=True,
    )
    timeout: Annotated[float, types.Duration()] = placement(
        "Time limit of one call; rewards and metrics only.", "timeout = 5s", 10.0
    )
    on_error: Annotated[float, types.Number()] = result(
        "The reward of a completion for which the function raises, times out or returns no number;"
        " rewards only.",
        "on_error = -1",
        0.0,
    )

    @property
    def name(self) -> str:
        """Return the name of the function."""
        return self.reference.rpartition(":")[2]
