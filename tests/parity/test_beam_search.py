"""Beam search against that of `transformers`: tokens and scores."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.parity.test_transformers import made, opened, torch
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.episodes import Prompt

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

MAX_TOKENS, PAD = 10, 1
BEAMS, RETURNED = 5, 4
LENGTHS = (1, 6, 17)
STOPS = [2], list(range(2, 97, 8))


@pytest.mark.parametrize("case", ["llama 3", "gemma 2"])
def test_tokens_and_scores(case: str, tmp_path: Path) -> None:
    tokens, _, theirs = made(case, tmp_path)
    decoder, _, params = opened(tmp_path)
    prompts = [tokens[at % 2, :length].tolist() for at, length in enumerate(LENGTHS)]
    search = make_search(decoder.architecture, prompts=3, beams=BEAMS, capacity=32)
    lengths = set()
    for stops, length_penalty in product(STOPS, (-1.0, 0.0, 1.0, 2.5)):
        found = beam_search(
            search, params, [Prompt(ids, 0) for ids in prompts], max_tokens=MAX_TOKENS,
            stop_ids=stops, pad=PAD, length_penalty=length_penalty, returned=RETURNED,
        )  # fmt: skip
        lengths |= set(found.lengths.tolist())
        for at, ids in enumerate(prompts):
            expected = theirs.generate(
                torch.tensor([ids]), num_beams=BEAMS, num_return_sequences=RETURNED,
                do_sample=False, early_stopping=False, length_penalty=length_penalty,
                max_new_tokens=MAX_TOKENS, eos_token_id=stops, pad_token_id=PAD,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            rows = slice(at * RETURNED, (at + 1) * RETURNED)
            own = expected.sequences.numpy()[:, len(ids) :]
            np.testing.assert_array_equal(found.tokens[rows, : own.shape[1]], own)
            assert found.lengths[rows].max() == own.shape[1]
            np.testing.assert_allclose(found.scores[rows], expected.sequences_scores, rtol=1e-4)
    assert len(lengths) > 3
