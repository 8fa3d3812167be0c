"""Samples groups of episodes with the training parameters themselves.

This is the host's half: a queue of episodes, the slots that they are handed to, and the values that
come back. The device's half is `engine.py`.

No episode depends on how many slots there are, which one it ran in, or which episodes ran with
it: its random keys are those of (seed, step, prompt, sample, position), and slots do not see each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np

from tunelang.dsl.vocabulary.training import Sampling
from tunelang.runtime.generation.engine import DecodeRequest, Engine, Slots, make_engine
from tunelang.runtime.generation.engine_sizes import sampling_layout, slot_capacity
from tunelang.runtime.generation.episodes import Episodes, Prompt, Work
from tunelang.runtime.generation.slot_queue import SlotQueue, power_of_two
from tunelang.runtime.generation.stop_strings import StopStrings
from tunelang.runtime.generation.token_sampling import slot_settings
from tunelang.runtime.models.loaded_model import Model
from tunelang.runtime.models.parameters import Params
from tunelang.runtime.sharding import Layout, reshard_for_decoding
from tunelang.runtime.tokenize.tokenizers import Tokenizer

TEXT_STEPS = 16
"""Steps of the decode loop after which the host looks for stop strings."""
_NO_LIMIT = np.iinfo(np.int32).max

shared_engine = cache(make_engine)
"""Make an engine as `make_engine` does, or return that of the same sizes made before."""


@dataclass(frozen=True)
class Sampler:
    """Samples episodes of one model; its parameters are arguments of every call."""

    engine: Engine
    sampling: Sampling
    stop_ids: Sequence[int]
    """Tokens that end an episode and belong to it, as do the strings of `sampling.stop`."""
    pad: int
    tokenizer: Tokenizer | None = None
    """Required where `sampling.stop` has strings."""

    def __post_init__(self) -> None:
        if self.sampling.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer")

    @classmethod
    def open(
        cls, model: Model, layout: Layout, sampling: Sampling, *, slots: int, longest: int
    ) -> Sampler:
        """Make the sampler of a model that is laid out for training or for decoding.

        `slots` episodes run at once, with prompts of at most `longest` tokens.
        """
        engine = shared_engine(
            model.architecture,
            slots=slots,
            capacity=slot_capacity(model.architecture, longest, sampling.max_tokens),
            dtype=model.dtype,
            layout=sampling_layout(model.architecture, model.dtype, layout),
        )
        tokenizer = model.renderer.tokenizer
        return cls(engine, sampling, model.renderer.stops, tokenizer.pad, tokenizer)

    def sample(
        self, params: Params, prompts: Sequence[Prompt], *, group: int, seed: int, step: int = 0
    ) -> Episodes:
        """Sample `group` episodes of each prompt.

        `params` are the decoder's, as they are trained; they are copied to the layout of the
        engine once for all episodes. `seed` (the run's, of which 32 bits count) and `step` (of
        training) decide what is drawn.

        Raises `ValueError` for a prompt that is empty or too long for a slot, and a group below 1.
        """
        self._check(prompts, group)
        engine, sampling = self.engine, self.sampling
        params = reshard_for_decoding(params, engine.layout)
        count = len(prompts) * group
        queue = SlotQueue(engine, params, prompts, group, self.pad)
        strings = None
        if sampling.stop:
            assert self.tokenizer is not None
            strings = StopStrings(self.tokenizer, sampling.stop)
        # Rows to spare, so that a few more or fewer prompts use the same program.
        penalised = sampling.repetition_penalty != 1
        state = engine.empty(power_of_two(count), sampling.max_tokens, penalised)
        stops = np.full(power_of_two(max(4, len(self.stop_ids))), -1, np.int32)
        stops[: len(self.stop_ids)] = self.stop_ids
        settings = slot_settings(sampling, engine.slots)

        active = np.zeros(engine.slots, np.bool_)
        decode_steps = decode_calls = 0
        while queue.waiting or active.any():
            state, active = queue.fill(state, active)
            waiting = len(queue.waiting)
            request = DecodeRequest(
                settings,
                stops,
                np.uint32(seed % 2**32),
                np.int32(step),
                until_free=np.int32(min(engine.refill_at, waiting) if waiting else engine.slots),
                max_steps=np.int32(TEXT_STEPS if strings else _NO_LIMIT),
            )
            state, steps = engine.decode(params, state, active, request)
            still_active = np.asarray(state.active)
            if strings:
                still_active = still_active & ~strings.ended(state, active, queue.episode_of_slot)
            active = still_active
            decode_steps, decode_calls = decode_steps + int(steps), decode_calls + 1
        work = Work(queue.prefilled, decode_steps, decode_calls)
        return self._episodes(state, prompts, group, strings.ends if strings else {}, work)

    def _check(self, prompts: Sequence[Prompt], group: int) -> None:
        if group < 1:
            raise ValueError(f"{group} completions of each prompt")
        for prompt in prompts:
            if not prompt.tokens:
                raise ValueError(f"prompt {prompt.index} is empty")
            if len(prompt.tokens) + self.sampling.max_tokens > self.engine.capacity:
                raise ValueError(
                    f"prompt {prompt.index} of {len(prompt.tokens)} tokens and a completion of"
                    f" {self.sampling.max_tokens} for a slot of {self.engine.capacity}"
                )

    def _episodes(
        self, state: Slots, prompts: Sequence[Prompt], group: int, ends: dict[int, int], work: Work
    ) -> Episodes:
        """Fetch the completions, and cut each off behind its stop string."""
        count = len(prompts) * group
        completions = jax.device_get(state.completions)
        lengths, stopped = completions.lengths[:count].copy(), completions.stopped[:count].copy()
        for episode, end in ends.items():
            lengths[episode], stopped[episode] = end, True
        mask = np.arange(completions.tokens.shape[1]) < lengths[:, None]
        return Episodes(
            prompts=tuple(tuple(prompt.tokens) for prompt in prompts),
            group=group,
            tokens=np.where(mask, completions.tokens[:count], np.int32(self.pad)),
            lengths=lengths,
            log_probs=np.where(mask, completions.log_probs[:count], np.float32(0)),
            mask=mask,
            truncated=~stopped,
            pad=self.pad,
            work=work,
        )
