"""The `sample` stage: completions of prompts, scored and chosen, written down as rows of data.

Prompts are sampled in chunks, and each chunk is written when it is complete: an interrupted stage
goes on after the last one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from tunelang.compiler.search.plan_layouts import Shapes
from tunelang.dsl.vocabulary.rewards import RewardConstant
from tunelang.dsl.vocabulary.utility_stages import Sample
from tunelang.runtime.data.examples import Example
from tunelang.runtime.errors import Interrupted
from tunelang.runtime.generation.engine_sizes import prompt_room, slot_count
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt, completion_texts
from tunelang.runtime.models.primitives import DTYPES
from tunelang.runtime.rewards.reward_functions import CompiledReward
from tunelang.runtime.rewards.reward_rows import reward_rows
from tunelang.runtime.sharding import Layout
from tunelang.runtime.stages.abstract_programs import (
    AbstractProgram,
    SampleRequest,
    abstract_params,
    sampling_programs,
)
from tunelang.runtime.stages.stage_kinds import (
    LoadedWeights,
    Summary,
    TaskContext,
    TaskKind,
    register,
)
from tunelang.runtime.store.atomic_files import RowWriter, keep_rows, read_rows, replacing
from tunelang.runtime.training.step_config import StepConfig

CHUNK = 1024
"""Completions of a chunk, about."""
TRIES = "tries.jsonl"
FILES = {"completions": "completions.jsonl", "pairs": "pairs.jsonl"}
"""Rows that later stages read: their name -> the file in the stage's folder."""

Row = dict[str, Any]


@register
class SampleKind(TaskKind[Sample]):
    """Samples completions and chooses among them."""

    stages = (Sample,)
    keeps_partial_results = True

    @override
    def run(self, stage: Sample, context: TaskContext) -> Summary:
        """Sample and choose. Raises `Interrupted` between chunks."""
        weights = context.load(stage.from_)
        _sample_chunks(stage, context, weights)
        metrics = _choose(stage, context.folder / TRIES, context.folder)
        return {"model": weights.origin.model, "from": weights.origin.node, "metrics": metrics}

    @override
    def abstract_programs(
        self, stage: Sample, shapes: Shapes, layout: Layout
    ) -> Iterator[AbstractProgram]:
        a, dtype, sampling = shapes.architecture, DTYPES[shapes.dtype], stage.rollout
        params = abstract_params(a, StepConfig(layout=layout, dtype=dtype))
        completions = max(1, CHUNK // stage.samples) * stage.samples
        prompt = max(1, prompt_room(a, sampling))
        request = SampleRequest(completions, prompt, sampling.max_tokens)
        return sampling_programs(a, dtype, params, layout, request, sampling, 0)


def _sample_chunks(stage: Sample, context: TaskContext, weights: LoadedWeights) -> None:
    """Sample and score all prompts, chunk by chunk, into the file of tries."""
    model, sampling = weights.model, stage.rollout
    renderer, seed = model.renderer, context.seed(stage.seed)
    stream, _ = context.resources.prompts(stage.data, model, sampling, seed=0, shuffled=False)
    examples = list(islice(stream.once(), stage.limit))
    prompts = [Prompt(renderer.prompt(example), n) for n, example in enumerate(examples)]
    longest = max(len(prompt.tokens) for prompt in prompts)
    chunk_size = max(1, CHUNK // stage.samples)
    slots = slot_count(min(chunk_size, len(prompts)) * stage.samples)
    sampler = Sampler.open(model, weights.layout, sampling, slots=slots, longest=longest)
    chunks = -(-len(prompts) // chunk_size)
    tries = context.folder / TRIES
    done = _complete_chunks(tries)
    reward_context = context.resources.reward_context(sampling.max_tokens)
    with (
        CompiledReward(stage.score or RewardConstant(value=0.0), reward_context) as score,
        CompiledReward(stage.keep or RewardConstant(value=1.0), reward_context) as keep,
        closing(RowWriter(tries)) as writer,
    ):
        for chunk in range(done, chunks):
            span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
            episodes = sampler.sample(weights.params, prompts[span], group=stage.samples, seed=seed)
            texts = completion_texts(renderer, episodes)
            rows = reward_rows(renderer, examples[span], episodes, texts)
            rewards, is_kept = score.score(rows).values, keep.score(rows).values > 0
            for n, text in enumerate(texts):
                place = span.start + n // stage.samples
                row = {
                    **_fields(examples[place]),
                    "completion": text,
                    "reward": float(rewards[n]),
                    "tokens": int(episodes.lengths[n]),
                    "truncated": bool(episodes.truncated[n]),
                }
                writer.append(
                    {"chunk": chunk, "place": place, "kept": bool(is_kept[n]), "row": row}
                )
            writer.append({"chunk": chunk, "whole": True})
            writer.sync()
            means = {"reward": float(rewards.mean()), "kept": float(is_kept.mean())}
            context.progress(chunk + 1, chunks, means)
            if context.stopping() and chunk + 1 < chunks:
                raise Interrupted


def _fields(example: Example) -> Row:
    """Return the fields of a row that come from the prompt."""
    messages = example.messages
    return {
        **example.fields,
        "prompt": example.prompt,
        "system": example.system,
        "messages": None
        if messages is None
        else [{"role": each.role, "content": each.content} for each in messages],
        "target": example.target,
    }


def _complete_chunks(path: Path) -> int:
    """Return how many chunks are complete, and remove the rows of an incomplete one."""
    complete = sum("whole" in row for row in read_rows(path).rows)
    if path.exists():
        keep_rows(path, lambda row: row["chunk"] < complete)
    return complete


def _choose(stage: Sample, tries: Path, folder: Path) -> dict[str, float]:
    """Write the completions that are kept, and the pairs; returns the stage's metrics."""
    rewards: list[float] = []
    kept = solved = prompts = 0
    with (
        replacing(folder / FILES["completions"]) as completions,
        replacing(folder / FILES["pairs"]) as pairs,
        completions.open("w", encoding="utf-8") as chosen,
        pairs.open("w", encoding="utf-8") as paired,
    ):
        for group in _groups(tries):
            rewards += [each["row"]["reward"] for each in group]
            prompts += 1
            if stage.distinct:
                texts = {each["row"]["completion"]: each for each in reversed(group)}
                group = [each for each in group if texts[each["row"]["completion"]] is each]
            good = [each["row"] for each in group if each["kept"]]
            if stage.most is not None:
                good = sorted(good, key=lambda row: -row["reward"])[: stage.most]
            kept, solved = kept + len(good), solved + bool(good)
            chosen.writelines(_line(row) for row in good)
            pair = _pair([each["row"] for each in group])
            if pair is not None:
                paired.write(_line(pair))
    return {
        "score": float(np.mean(rewards)),
        "kept": kept / len(rewards),
        "solved": solved / prompts,
        "rows": float(kept),
    }


def _groups(tries: Path) -> Iterator[list[Row]]:
    """Yield the completions of each prompt."""
    group: list[Row] = []
    with tries.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if "whole" in row:
                continue
            if group and row["place"] != group[0]["place"]:
                yield group
                group = []
            group.append(row)
    if group:
        yield group


def _pair(rows: Sequence[Row]) -> Row | None:
    """Return the best completion of a prompt against its worst; the first of equal ones."""
    best = max(rows, key=lambda row: row["reward"])
    worst = min(rows, key=lambda row: row["reward"])
    if best["reward"] <= worst["reward"]:
        return None
    own = ("completion", "tokens", "truncated")
    fields = {name: value for name, value in best.items() if name not in own}
    return {
        **fields,
        "chosen": best["completion"],
        "rejected": worst["completion"],
        "chosen_reward": best["reward"],
        "rejected_reward": worst["reward"],
    }


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
