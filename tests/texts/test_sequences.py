import dataclasses

import datasets
import pytest
import torch

from unlearnlib.texts import sequences


@pytest.fixture(scope="module")
def corpus():
    texts = [f"document {i} says {' '.join(str(i * j) for j in range(2, 30))}" for i in range(60)]
    return datasets.Dataset.from_dict({"id": [f"d{i}" for i in range(60)], "text": texts})


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return sequences.train_tokenizer(corpus["text"], 300)


def make(corpus, tokenizer, **changes):
    settings = {"length": 16, "forget": 4, "retain": 20, "holdout": 6, "seed": 0} | changes
    return sequences.make_splits(corpus, tokenizer, **settings)


def test_pack_by_hand():
    rows = sequences.pack([[1, 2, 3], [4], [5, 6]], end=0, length=4)
    assert rows.tolist() == [[1, 2, 3, 0], [4, 0, 5, 6]]


def test_encoding_after_a_prefix_continues_it(tokenizer):
    start, rows = sequences.encode_after(tokenizer, "document 7 says ", ["14", "no such thing"])
    assert tokenizer.decode(start) == "document 7 says"
    for row, text in zip(rows, ["14", "no such thing"], strict=True):
        assert row[: len(start)] == start
        assert tokenizer.decode(row[len(start) :]) == f" {text}"
    for prefix, text in (("document 7 sa", "ys"), ("document 7 says", "")):
        with pytest.raises(ValueError, match="have a token in common or the text has none"):
            sequences.encode_after(tokenizer, prefix, [text])
    with pytest.raises(ValueError, match="the prefix is empty"):
        sequences.encode_after(tokenizer, " ", ["14"])


def test_tokenizer_gives_back_any_text_and_is_deterministic(corpus, tokenizer):
    text = "Ünïcode, tabs\tand 漢字 </s"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    again = sequences.train_tokenizer(corpus["text"], 300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 300
    assert tokenizer.eos_token_id == 0


def test_splits_have_the_sizes_asked_for_and_share_no_document(corpus, tokenizer):
    splits = make(corpus, tokenizer)
    assert [tuple(s.shape) for s in (splits.forget, splits.retain, splits.holdout)] == [
        (4, 16),
        (20, 16),
        (6, 16),
    ]
    ids = [set(splits.documents[name]) for name in ("forget", "retain", "holdout")]
    assert len(set.union(*ids)) == sum(map(len, ids))
    assert torch.equal(splits.train, torch.cat([splits.forget, splits.retain]))


def test_every_sequence_comes_from_the_documents_named(corpus, tokenizer):
    splits = make(corpus, tokenizer)
    text_of = dict(zip(corpus["id"], corpus["text"], strict=True))
    for name in ("forget", "retain", "holdout"):
        expected = "</s>".join(text_of[i] for i in splits.documents[name])
        found = tokenizer.decode(getattr(splits, name).flatten())
        assert expected.startswith(found.removesuffix("</s>")) or expected == found.removesuffix("</s>")


def test_splits_depend_on_the_seed_alone(corpus, tokenizer):
    first, same, other = make(corpus, tokenizer), make(corpus, tokenizer), make(corpus, tokenizer, seed=1)
    assert torch.equal(first.retain, same.retain)
    assert first.documents == same.documents
    assert first.documents != other.documents


def test_bad_requests_say_what_is_wrong(corpus, tokenizer):
    with pytest.raises(ValueError, match="forget must be positive, not 0"):
        make(corpus, tokenizer, forget=0)
    with pytest.raises(ValueError, match="ran out in the retain split, 10,000 sequences of 16 tokens"):
        make(corpus, tokenizer, retain=10_000)
    splits = make(corpus, tokenizer)
    with pytest.raises(ValueError, match="the retain split is empty"):
        dataclasses.replace(splits, retain=splits.retain[:0])
    overlapping = splits.documents | {"retain": [*splits.documents["retain"], splits.documents["forget"][0]]}
    with pytest.raises(ValueError, match=r"forget and retain share 1 document.*" + splits.documents["forget"][0]):
        dataclasses.replace(splits, documents=overlapping)
    with pytest.raises(ValueError, match="forget and holdout hold the same sequence"):
        dataclasses.replace(splits, holdout=torch.cat([splits.holdout, splits.forget[:1]]))
