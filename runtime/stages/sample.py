"""The `sample` stage: completions of prompts, scored and chosen, written down as rows of data.

Prompts are gone through in chunks, and each chunk is written when it is whole: an interrupted stage
goes on behind the last one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunelang.dsl.vocabulary.rewards import RewardConstant
from tunelang.dsl.vocabulary.utility_stages import Sample
from tunelang.runtime.data.examples import Example
from tunelang.runtime.errors import Interrupted
from tunelang.runtime.generation.engine_sizes import slot_count
from tunelang.runtime.generation.episode_sampler import Sampler
from tunelang.runtime.generation.episodes import Prompt, completion_texts
from tunelang.runtime.loading.resources import Resources
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.rewards.reward_functions import Reward
from tunelang.runtime.rewards.reward_rows import reward_rows
from tunelang.runtime.sharding import Layout
from tunelang.runtime.store.atomic_files import RowWriter, keep_rows, read_rows, written_whole

CHUNK = 1024
"""Completions that are sampled, scored and written together, about."""
TRIES = "tries.jsonl"
FILES = {"completions": "completions.jsonl", "pairs": "pairs.jsonl"}
"""What later stages read -> its file in the folder of the stage."""

Row = dict[str, Any]


def sample(
    resources: Resources,
    stage: Sample,
    model: Model,
    params: Any,
    layout: Layout,
    seed: int,
    folder: Path,
    progress: Callable[[int, int, Mapping[str, float]], None],
    stopping: Callable[[], bool],
) -> dict[str, float]:
    """Sample and choose; returns the stage's metrics. Raises `Interrupted` between chunks."""
    renderer, sampling = model.renderer, stage.rollout
    stream, _ = resources.prompts(stage.data, model, sampling, seed=0, shuffled=False)
    examples = list(islice(stream.once(), stage.limit))
    prompts = [Prompt(renderer.prompt(e), at) for at, e in enumerate(examples)]
    each = max(1, CHUNK // stage.samples)
    slots = slot_count(min(each, len(prompts)) * stage.samples)
    longest = max(len(prompt.tokens) for prompt in prompts)
    sampler = Sampler.open(model, layout, sampling, slots=slots, longest=longest)
    tries = folder / TRIES
    chunks = -(-len(prompts) // each)
    done = _whole_chunks(tries)
    around = resources.surroundings(sampling.max_tokens)
    with (
        Reward(stage.score or RewardConstant(value=0.0), around) as score,
        Reward(stage.keep or RewardConstant(value=1.0), around) as keep,
    ):
        writer = RowWriter(tries)
        try:
            for chunk in range(done, chunks):
                own = slice(chunk * each, (chunk + 1) * each)
                episodes = sampler.sample(params, prompts[own], group=stage.samples, seed=seed)
                texts = completion_texts(renderer, episodes)
                rows = reward_rows(renderer, examples[own], episodes, texts)
                scores, kept = score.score(rows).values, keep.score(rows).values > 0
                for at, text in enumerate(texts):
                    place = own.start + at // stage.samples
                    row = {
                        **_fields(examples[place]),
                        "completion": text,
                        "reward": float(scores[at]),
                        "tokens": int(episodes.lengths[at]),
                        "truncated": bool(episodes.truncated[at]),
                    }
                    what = {"chunk": chunk, "place": place, "kept": bool(kept[at])}
                    writer.append({**what, "row": row})
                writer.append({"chunk": chunk, "whole": True})
                writer.sync()
                progress(
                    chunk + 1, chunks, {"reward": float(scores.mean()), "kept": float(kept.mean())}
                )
                if stopping() and chunk + 1 < chunks:
                    raise Interrupted
        finally:
            writer.close()
    return _choose(stage, tries, folder)


def _fields(example: Example) -> Row:
    """Return what a row holds of the prompt."""
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


def _whole_chunks(path: Path) -> int:
    """Return how many chunks are written, and remove what is there of another."""
    whole = sum("whole" in row for row in read_rows(path).rows)
    if path.exists():
        keep_rows(path, lambda row: row["chunk"] < whole)
    return whole


def _choose(stage: Sample, tries: Path, folder: Path) -> dict[str, float]:
    """Write the completions that are kept, and the pairs; returns the stage's metrics."""
    rewards: list[float] = []
    kept = solved = prompts = 0
    with (
        written_whole(folder / FILES["completions"]) as completions,
        written_whole(folder / FILES["pairs"]) as pairs,
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
    """Give the completions of each prompt."""
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
