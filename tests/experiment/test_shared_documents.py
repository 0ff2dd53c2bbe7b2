import dataclasses

import datasets
import numpy as np
import pytest

from unlearnlib.experiment import case, profiles
from unlearnlib.texts.sequences import make_splits


@pytest.fixture
def small(monkeypatch):
    """A profile on forty short documents made up here."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 300, size=12)) for _ in range(40)]
    corpus = datasets.Dataset.from_dict({"id": [f"d{i}" for i in range(40)], "text": texts})
    monkeypatch.setattr(case, "load_corpus", lambda name: corpus)
    settings = profiles.get_profile("quick")
    return dataclasses.replace(settings, seeds=(0, 1, 2), vocabulary=300, length=8, forget=4, retain=20, holdout=8)


def test_what_two_seeds_train_on_is_compared_by_documents(small):
    corpus = case.load_corpus("made up")
    tokenizer = case.make_tokenizer(small, corpus)
    sets = []
    for seed in small.seeds:
        made = make_splits(corpus, tokenizer, length=8, forget=4, retain=20, holdout=8, seed=seed)
        sets.append(np.isin(corpus["id"], made.documents["forget"] + made.documents["retain"]).astype(float))
    trained_on = np.array(sets)
    shares = (trained_on @ trained_on.T) / trained_on.sum(axis=1, keepdims=True)  # the diagonal is 1
    expected = (shares.sum() - 3) / 6
    assert 0.1 < expected < 0.9
    assert case.shared_documents(small) == pytest.approx(expected, abs=1e-12)
    assert case.shared_documents(dataclasses.replace(small, seeds=(1, 1))) == 1.0


def test_one_seed_shares_nothing(small):
    with pytest.raises(ValueError, match="two seeds or more"):
        case.shared_documents(dataclasses.replace(small, seeds=(3,)))
