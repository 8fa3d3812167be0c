"""The arrays of a batch, and the view of one episode."""

import numpy as np
import pytest

from tunelang.runtime.generation.episodes import ASSISTANT, Episodes, Work


@pytest.fixture
def episodes():
    lengths = np.array([3, 1, 0, 2], np.int32)
    mask = np.arange(3) < lengths[:, None]
    return Episodes(
        prompts=((7, 8), (9,)),
        group=2,
        tokens=np.where(mask, np.arange(12).reshape(4, 3), 47).astype(np.int32),
        lengths=lengths,
        log_probs=np.where(mask, -1.0, 0.0).astype(np.float32),
        mask=mask,
        truncated=np.array([True, False, False, True]),
        pad=47,
        work=Work(2, 3, 1),
    )


def test_episodes_of_a_group_share_its_prompt(episodes):
    assert [episode.prompt for episode in episodes] == [(7, 8), (7, 8), (9,), (9,)]
    assert [episode.tokens for episode in episodes] == [[0, 1, 2], [3], [], [9, 10]]
    assert [episode.truncated for episode in episodes] == [True, False, False, True]


def test_turn_has_no_padding(episodes):
    (turn,) = episodes[3].turns
    assert turn.author == ASSISTANT
    assert turn.mask.tolist() == [True, True]
    assert turn.log_probs.tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("row", [4, -1])
def test_row_out_of_range_is_an_error(episodes, row):
    assert len(episodes) == 4
    with pytest.raises(IndexError):
        episodes[row]
