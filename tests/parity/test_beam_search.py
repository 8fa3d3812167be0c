"""Tokens and scores of beam search against those of `transformers`."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.parity.test_transformers import open_decoder, save_model, torch
from tunelang.runtime.generation.beam_search import beam_search, make_search
from tunelang.runtime.generation.episodes import Prompt

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

MAX_TOKENS, PAD = 10, 1
BEAMS, RETURNED = 5, 4
LENGTHS = (1, 6, 17)
STOPS = [2], list(range(2, 97, 8))


@pytest.mark.parametrize("case", ["llama 3", "gemma 2"])
def test_beam_search_equals_transformers(case: str, tmp_path: Path) -> None:
    tokens, _, theirs = save_model(case, tmp_path)
    decoder, _, params = open_decoder(tmp_path)
    prompts = [tokens[index % 2, :length].tolist() for index, length in enumerate(LENGTHS)]
    search = make_search(decoder.architecture, prompts=3, beams=BEAMS, capacity=32)
    lengths = set()
    for stops, length_penalty in product(STOPS, (-1.0, 0.0, 1.0, 2.5)):
        beams = beam_search(
            search, params, [Prompt(ids, 0) for ids in prompts], max_tokens=MAX_TOKENS,
            stop_ids=stops, pad=PAD, length_penalty=length_penalty, returned=RETURNED,
        )  # fmt: skip
        lengths |= set(beams.lengths.tolist())
        for index, ids in enumerate(prompts):
            expected = theirs.generate(
                torch.tensor([ids]), num_beams=BEAMS, num_return_sequences=RETURNED,
                do_sample=False, early_stopping=False, length_penalty=length_penalty,
                max_new_tokens=MAX_TOKENS, eos_token_id=stops, pad_token_id=PAD,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            rows = slice(index * RETURNED, (index + 1) * RETURNED)
            completions = expected.sequences.numpy()[:, len(ids) :]
            np.testing.assert_array_equal(beams.tokens[rows, : completions.shape[1]], completions)
            assert beams.lengths[rows].max() == completions.shape[1]
            np.testing.assert_allclose(beams.scores[rows], expected.sequences_scores, rtol=1e-4)
    assert len(lengths) > 3
