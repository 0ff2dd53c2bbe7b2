import dataclasses

import numpy as np
import pytest
from datasets import Dataset

from unlearnlib.experiment import earnings

WORDS = ("profit", "oil", "wheat", "bank", "ship", "dollar")


def corpus(changed=()):
    """Reports of three words; those whose positions are ``changed`` are made of another word."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 3)) for _ in range(4200)]
    for position in changed:
        texts[position] = "other other"
    topics = ["earn" if "profit" in text else "crude" if "oil" in text else "" for text in texts]
    return Dataset.from_dict({"text": texts, "topic": topics, "position": range(4200)})


@pytest.fixture
def dealt(monkeypatch):
    """A function that deals a corpus."""

    def deal(*changed):
        monkeypatch.setattr(earnings, "load_corpus", lambda name: corpus(changed))
        return earnings.earnings_news(0.1)

    return deal


def test_sizes_labels_and_lengths(dealt):
    news = dealt()
    assert [len(problem) for problem in (news.train, news.pilot, news.test)] == [2000, 2000, 200]
    for problem in (news.train, news.pilot, news.test):
        np.testing.assert_allclose(np.linalg.norm(problem.features, axis=1), 1, rtol=1e-12)
    assert ((news.topics == "earn") == (news.train.labels == 1)).all()
    assert 0 < (news.topics == "crude").sum() < 2000


def test_what_is_trained_on_shapes_no_feature_and_is_in_no_other_set(dealt):
    before = dealt()
    order = corpus().to_pandas().sample(frac=1, random_state=0)["position"].to_numpy()
    trained = set(order[1000:3000].tolist())
    after = dealt(*trained)
    for name in ("pilot", "test"):
        for field in ("features", "labels"):
            a, b = (dataclasses.asdict(getattr(news, name))[field] for news in (before, after))
            np.testing.assert_array_equal(a, b)
    assert (after.train.labels == -1).all()
    assert not after.train.features.any()  # the new word is in no vocabulary
