import datasets
import pytest
import torch

from unlearnlib.experiment import profiles, request_sets
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts import sequences

NUMBER, SIZES = 160, (1, 3)
CORPUS = datasets.Dataset.from_dict(
    {
        "id": [f"d{i:03d}" for i in range(NUMBER)],
        "text": [f"document {i} tells of the {i * i}th wonder and of {i % 7} others" for i in range(NUMBER)],
    }
)
ON_TOPIC = [i % 4 == 0 for i in range(NUMBER)]
PROFILE = profiles.Profile(
    name="quick",
    corpus="reuters",
    model=loading.small_opt(300, hidden_size=16, layers=1, heads=2, context=16),
    vocabulary=300,
    length=16,
    forget=1,
    retain=20,
    holdout=8,
    training=Training(epochs=1),
    seeds=(0,),
)


@pytest.fixture(scope="module")
def tokenizer():
    return sequences.train_tokenizer(CORPUS["text"], 300)


def make(tokenizer, seed=0, sizes=SIZES, on_topic=ON_TOPIC, **changes):
    profile = profiles.dataclasses.replace(PROFILE, **changes)
    return request_sets.make_requests(profile, tokenizer, CORPUS, sizes, on_topic, seed)


def rows(tensor):
    return sorted(map(tuple, tensor.tolist()))


def named(text_ids):
    """Numbers of documents by their ids."""
    return {int(name[1:]) for name in text_ids}


def test_there_is_a_group_of_every_size_and_kind(tokenizer):
    requests = make(tokenizer)
    assert sorted((r.kind, r.size) for r in requests) == [
        ("clustered", 1),
        ("clustered", 3),
        ("random", 1),
        ("random", 3),
    ]
    for request in requests:
        assert request.splits.forget.shape == (request.size, 16)
        assert request.splits.holdout.shape == (8, 16)
        assert request.related.shape == (2, 16)


def test_a_request_takes_its_group_out_of_one_training_set(tokenizer):
    requests = make(tokenizer)
    for request in requests:
        assert rows(request.trained_on) == rows(request.splits.train)
        assert len(request.trained_on) == 2 * sum(SIZES) + 20
    forgotten = [row for request in requests for row in rows(request.splits.forget)]
    assert len(set(forgotten)) == len(forgotten) == 2 * sum(SIZES)
    # What comes last, and validation with it, no request ever names.
    assert not set(forgotten) & set(rows(requests[0].trained_on[-20:]))
    for request in requests:
        assert torch.equal(request.splits.retain[-20:], requests[0].trained_on[-20:])


def test_all_requests_are_to_one_original_and_each_has_its_own_retrained_model(tokenizer):
    requests = make(tokenizer)
    runs = [request.runs() for request in requests]
    assert len({found["original"].folder for found in runs}) == 1
    assert len({found["retrained"].folder for found in runs}) == len(requests)
    for request, found in zip(requests, runs, strict=True):
        assert torch.equal(found["retrained"].sequences, request.splits.retain)
        assert torch.equal(found["original"].sequences, request.trained_on)
        assert torch.equal(found["retrained_again"].sequences, request.splits.retain)


def test_clustered_requests_and_what_is_related_are_of_the_topic(tokenizer):
    requests = make(tokenizer)
    on_topic = {i for i in range(NUMBER) if ON_TOPIC[i]}
    used = []
    for request in requests:
        documents = named(request.splits.documents["forget"])
        used += documents
        if request.kind == "clustered":
            assert documents <= on_topic
        text = tokenizer.decode(request.related[0])
        assert int(text.split("document ")[1].split()[0]) in on_topic
    assert len(used) == len(set(used))
    assert any(
        not named(request.splits.documents["forget"]) <= on_topic
        for request in requests
        if request.kind == "random"
    )
    related = set(rows(requests[0].related))
    assert not related & set(rows(requests[0].trained_on))
    assert not related & set(rows(requests[0].splits.holdout))


def test_without_a_topic_there_are_random_requests_only(tokenizer):
    requests = make(tokenizer, on_topic=None)
    assert [(r.kind, r.size) for r in requests] == [("random", 1), ("random", 3)]
    assert requests[0].related.shape == (0, 16)


def test_the_deal_depends_on_the_seed_alone(tokenizer):
    first, again, other = (make(tokenizer, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.splits.forget, b.splits.forget) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.splits.forget, b.splits.forget) for a, b in zip(first, other, strict=True))


def test_impossible_requests_are_errors(tokenizer):
    with pytest.raises(ValueError, match=r"must be positive and differ, unlike \[1, 1\]"):
        make(tokenizer, sizes=(1, 1))
    with pytest.raises(ValueError, match=r"must be positive and differ, unlike \[0, 3\]"):
        make(tokenizer, sizes=(0, 3))
    with pytest.raises(ValueError, match="ran out in the clustered request of 100"):
        make(tokenizer, sizes=(100,))
    with pytest.raises(ValueError, match="ran out in the rest of the training set, 2,000 sequences of 16"):
        make(tokenizer, retain=2000)
