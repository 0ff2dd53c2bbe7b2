import collections
import re

import pytest
import torch

from unlearnlib.measures import exposure
from unlearnlib.texts import planting
from unlearnlib.texts.planting import Secret


def test_secrets_are_reproducible_and_differ():
    repeats = [1, 1, 2, 16] * 10
    secrets = planting.make_secrets(repeats, seed=3)
    assert secrets == planting.make_secrets(repeats, seed=3)
    assert secrets != planting.make_secrets(repeats, seed=4)
    assert [secret.repeats for secret in secrets] == repeats
    assert len({secret.name for secret in secrets}) == len(secrets)
    for secret in secrets:
        assert secret.name in secret.prefix
        assert secret.sentence == f"{secret.prefix}{secret.number}.\n"
        assert re.fullmatch(r"\d{3}-\d{4}", secret.number)


def test_numbers_are_random_of_their_format():
    secrets = planting.make_secrets([1] * 400, seed=0)
    counts = [collections.Counter(s.number[i] for s in secrets) for i in range(8)]
    for i, count in enumerate(counts):
        if i == 3:
            assert count == {"-": 400}
        else:  # binomial with mean 40 and deviation 6
            assert len(count) == 10
            assert 16 <= min(count.values()) <= max(count.values()) <= 64
    assert len(exposure.candidates(secrets[0].number, 200, 0)) == 200  # the format that exposure sees is the same


def secrets_with(*repeats):
    return [Secret(str(i), f"{i} has ", "0", times) for i, times in enumerate(repeats)]


def test_every_copy_finds_a_text_of_its_own():
    secrets = secrets_with(1, 1, 2, 4, 4, 8)
    found = planting.spread(secrets, texts=8, room=3, seed=0)
    assert collections.Counter(s for text in found for s in text) == {s: s.repeats for s in secrets}
    assert all(len(text) == len(set(text)) for text in found)
    assert sorted(map(len, found)) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert found == planting.spread(secrets, texts=8, room=3, seed=0)
    assert found != planting.spread(secrets, texts=8, room=3, seed=1)


def test_a_full_house_is_possible():
    found = planting.spread(secrets_with(4, 4, 3, 1), texts=4, room=3, seed=0)
    assert [len(text) for text in found] == [3, 3, 3, 3]
    assert all(len(text) == len(set(text)) for text in found)


@pytest.mark.parametrize(("repeats", "room"), [((5,), 9), ((4, 4, 1), 2)])
def test_too_much_to_plant(repeats, room):
    with pytest.raises(ValueError, match=r"in 4 texts.*: take more texts, or fewer secrets or repeats"):
        planting.spread(secrets_with(*repeats), texts=4, room=room, seed=0)


def test_rows_by_hand():
    text, sentences = list(range(100, 120)), [[1, 2, 3], [4]]
    rows = planting.planted_rows(text, sentences, rows=4, length=5)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [
        [100, 101, 102, 103, 104],
        [1, 2, 3, 105, 106],
        [4, 107, 108, 109, 110],
        [111, 112, 113, 114, 115],
    ]


def test_bad_rows():
    text = list(range(10))
    with pytest.raises(ValueError, match="cannot plant 2 sentences of up to 1 tokens in 2 sequences"):
        planting.planted_rows(text, [[1], [2]], rows=2, length=4)
    with pytest.raises(ValueError, match="cannot plant 1 sentences of up to 4 tokens"):
        planting.planted_rows(text, [[1, 2, 3, 4]], rows=2, length=4)
    with pytest.raises(ValueError, match="10 tokens, 11 are needed: take a longer text or fewer rows"):
        planting.planted_rows(text, [[1]], rows=3, length=4)


def test_boxes_hold_random_numbers_of_six_digits():
    secrets = planting.box_secrets(300, seed=2)
    assert secrets == planting.box_secrets(400, seed=2)[:300] != planting.box_secrets(300, seed=3)
    assert [s.prefix for s in secrets[:2]] == ["box 100 holds ", "box 101 holds "]
    assert all(re.fullmatch(r"\d{6}", s.number) and s.repeats == 1 for s in secrets)
    assert any(s.number.startswith("0") for s in secrets)


def test_heads_take_the_place_of_the_first_tokens():
    rows = torch.arange(20).reshape(5, 4)
    planted = planting.planted_heads(rows, [[90], [91, 92], [93, 94, 95, 96]], every=2)
    assert planted.tolist() == [
        [90, 1, 2, 3],
        [4, 5, 6, 7],
        [91, 92, 10, 11],
        [12, 13, 14, 15],
        [93, 94, 95, 96],
    ]
    assert rows.tolist() == torch.arange(20).reshape(5, 4).tolist()
    with pytest.raises(ValueError, match="shorter"):
        planting.planted_heads(rows, [[90]], every=2)
    with pytest.raises(ValueError, match="a head of 5 tokens does not fit a row of 4"):
        planting.planted_heads(rows, [[0] * 5] * 3, every=2)
