"""Options of `tune generate`, and the completions that they ask for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import typer

from tunelang.dsl.messages import run_failures
from tunelang.dsl.program import Program
from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.commands.generate import best_of, open_ranked
from tunelang.runtime.commands.terminal import refuse
from tunelang.runtime.store.run_store import Store


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `tune generate`."""

    temperature: float | None
    """None is 0, or 1 with `best_of`."""
    max_tokens: int
    top_k: int | None
    top_p: float | None
    samples: int
    beams: int | None
    length_penalty: float | None
    best_of: int | None
    by: str | None
    seed: int
    raw: bool

    def check(self, program: Program) -> None:
        """End the command if options contradict each other or name no reward."""
        sampled = self.temperature, self.top_k, self.top_p
        rules = (
            ("--beams", self.beams and self.best_of, "not with --best-of"),
            (
                "--beams",
                self.beams and any(sampled),
                "does not sample: leave out --temperature, --top-k and --top-p",
            ),
            (
                "--length-penalty",
                self.length_penalty is not None and not self.beams,
                "only with --beams",
            ),
            (
                "--best-of",
                self.best_of and self.temperature == 0,
                "at temperature 0 all completions are the same",
            ),
            ("--by", self.by and not self.best_of, "only with --best-of"),
            (
                "--samples",
                self.samples > (self.beams or self.best_of or self.samples),
                "more than there are to choose from",
            ),
        )
        for option, wrong, why in rules:
            if wrong:
                raise typer.BadParameter(why, param_hint=option)
        rewards = [declared.name for declared in program.of("reward")]
        if self.by is not None and self.by not in rewards:
            refuse(run_failures.unknown_reward(self.by, rewards))

    @property
    def sampling(self) -> Sampling:
        """Return the options of sampling as a value of the vocabulary."""
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.best_of else 0.0
        return Sampling.unvalidated(
            max_tokens=self.max_tokens,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


def completions(
    program: Program, store: Store, stage: str, prompts: Sequence[str], options: GenerateOptions
) -> Iterator[str]:
    """Yield completions of prompts by the model of a stage; without prompts, of the lines of
    standard input. Raises what `open_ranked` raises.
    """
    generator, reward = open_ranked(program, store, stage, options.by, options.max_tokens)
    prompts = prompts or [line.rstrip("\n") for line in sys.stdin]
    if options.beams:
        penalty = 1.0 if options.length_penalty is None else options.length_penalty
        yield from generator.search(
            prompts, options.max_tokens, options.raw,
            beams=options.beams, length_penalty=penalty, returned=options.samples,
        )  # fmt: skip
    elif not options.best_of:
        yield from generator.complete(
            prompts, options.sampling, options.samples, options.seed, options.raw
        )
    else:
        texts = best_of(
            generator, prompts, options.sampling, options.best_of, options.seed, options.raw,
            returned=options.samples, reward=reward,
        )  # fmt: skip
        if reward is None:
            yield from texts
        else:
            with reward:
                yield from texts
