import itertools
import math
from collections import Counter

import pytest
import torch

from unlearnlib.texts.bigrams import Bigrams

SEEN = torch.tensor([[1, 2, 3, 2], [1, 2, 2, 0]])


def by_hand(a, b, vocabulary=5):
    """Witten and Bell's formula with dictionaries."""
    rows = SEEN.tolist()
    pairs = Counter(pair for row in rows for pair in itertools.pairwise(row))
    tokens = Counter(token for row in rows for token in row)
    frequency = (tokens[b] + 1) / (SEEN.numel() + vocabulary)
    followers = sum(first == a for first, _ in pairs)
    seen = sum(number for (first, _), number in pairs.items() if first == a)
    return (pairs[a, b] + followers * frequency) / (seen + followers) if seen else frequency


def test_losses_are_those_of_the_formula_by_hand():
    rows = torch.tensor([[1, 2, 2, 3], [2, 0, 4, 4], [4, 1, 3, 1]])
    expected = [-sum(math.log(by_hand(a, b)) for a, b in itertools.pairwise(row)) / 3 for row in rows.tolist()]
    assert Bigrams(SEEN, 5).losses(rows).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("last", range(5))
def test_what_may_follow_a_token_has_probability_one(last):
    rows = torch.tensor([[last, token] for token in range(5)])
    assert Bigrams(SEEN, 5).losses(rows).neg().exp().sum().item() == pytest.approx(1)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="nothing to count"):
        Bigrams(torch.empty(0, 4, dtype=torch.int64), 5)
