import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from unlearnlib import losses
from unlearnlib.measures import exposure
from unlearnlib.models import loading, training
from unlearnlib.texts import planting, sequences

TEXTS = [
    f"The number of Ann is {n * 7919 % 10_000:04d}-{n * 31 % 100:02d} and that of Bob is {n}." for n in range(300)
]


@pytest.fixture(scope="module")
def tokenizer():
    return sequences.train_tokenizer(TEXTS, 300)


def new_model(tokenizer, seed=0, dtype=torch.float64):
    source = loading.small_opt(len(tokenizer), hidden_size=32, layers=2, heads=2, context=64)
    return loading.load_model(source, seed=seed, dtype=dtype, device="cpu")


def test_candidates_keep_the_format():
    secret = "PIN 73-Ab, é!"
    drawn = exposure.candidates(secret, 500, seed=3)
    assert len(set(drawn)) == 500
    assert secret not in drawn
    for text in drawn:
        assert len(text) == len(secret)
        for a, b in zip(secret, text, strict=True):
            if a in "73":
                assert b in "0123456789"
            elif a in "PINAb":
                assert b.isascii()
                assert b.isalpha()
                assert a.isupper() == b.isupper()
            else:
                assert a == b
    for place in (0, 4, 8):  # every character that may vary takes many values, none far too often
        counts = Counter(text[place] for text in drawn)
        assert len(counts) == (10 if place == 4 else 26)
        assert max(counts.values()) < 3 * 500 / len(counts)


def test_candidates_depend_on_the_seed_alone():
    assert exposure.candidates("0000", 20, seed=1) == exposure.candidates("0000", 20, seed=1)
    assert exposure.candidates("0000", 20, seed=1) != exposure.candidates("0000", 20, seed=2)


def secrets_of_chapters(seed):
    """As chapters 12 and 13 draw them."""
    yield from (secret.number for secret in planting.make_secrets([1, 1], seed))
    yield f"{random.Random(seed).randrange(10**6):06d}"


def test_candidates_are_independent_of_secrets_that_the_same_seed_drew():
    size, seeds, places, agree, lists = 9, 300, [], 0, set()
    for seed in range(seeds):
        for secret in secrets_of_chapters(seed):
            others = exposure.candidates(secret, size, seed)
            lists.add(tuple("".join(filter(str.isdigit, other))[:4] for other in others))
            places.append(sum(other < secret for other in others))
            agree += sum(a == b for a, b in zip(secret, others[0], strict=True) if a.isdigit())
    assert len(lists) == 3 * seeds  # no list serves two secrets
    digits = sum(c.isdigit() for seed in range(seeds) for secret in secrets_of_chapters(seed) for c in secret)
    assert agree / digits == pytest.approx(0.1, abs=0.02)  # five standard deviations
    counts = Counter(places)  # the place of a secret among ten texts is uniform
    assert stats.chisquare([counts[place] for place in range(size + 1)]).pvalue > 1e-3


def test_a_format_can_be_used_up_but_not_exceeded():
    assert sorted(exposure.candidates("a7", 259, seed=0)) == sorted(
        f"{letter}{digit}"
        for letter in "abcdefghijklmnopqrstuvwxyz"
        for digit in range(10)
        if f"{letter}{digit}" != "a7"
    )
    with pytest.raises(
        ValueError, match="cannot draw 260 candidates: the format of 'a7' has 259 texts besides it"
    ):
        exposure.candidates("a7", 260, seed=0)
    with pytest.raises(ValueError, match="the format of '-' has 0 texts"):
        exposure.candidates("-", 1, seed=0)
    with pytest.raises(ValueError, match="cannot draw 0 candidates"):
        exposure.candidates("a7", 0, seed=0)


def slow_loss(model, tokenizer, prefix, text):
    """One text, one token, one softmax at a time."""
    start = tokenizer(prefix.rstrip())["input_ids"]
    tokens = tokenizer(prefix + text)["input_ids"]
    total = 0.0
    for i in range(len(start), len(tokens)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens[:i]]), use_cache=False).logits[0, -1]
        total -= torch.softmax(logits, 0)[tokens[i]].log().item()
    return total


@pytest.mark.parametrize("prefix", ["The number of Ann is ", "The number of Ann is", "</s>", "Ann:\n"])
def test_losses_against_one_token_at_a_time(tokenizer, prefix, monkeypatch):
    model = new_model(tokenizer)
    texts = ["7919-31", "0000-00", "qq, Z 12", "1", "is 12"]
    if not prefix[-1].isspace() and prefix != "</s>":
        texts = [" " + text for text in texts]
    assert len({len(tokenizer(prefix + text)["input_ids"]) for text in texts}) > 2
    expected = [slow_loss(model, tokenizer, prefix, text) for text in texts]
    for most in (1, 64):
        monkeypatch.setattr(losses, "MOST_SEQUENCES", most)
        found = exposure.text_losses(model, tokenizer, prefix, texts)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_model_that_knows_nothing_pays_the_same_for_every_token(tokenizer):
    model = new_model(tokenizer)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    [loss] = exposure.text_losses(model, tokenizer, "Ann", [" 1234-56"])
    tokens = len(tokenizer(" 1234-56")["input_ids"])
    assert loss.item() == pytest.approx(tokens * math.log(len(tokenizer)))


def test_texts_that_cannot_be_told_from_the_prefix_are_refused(tokenizer):
    model = new_model(tokenizer)
    with pytest.raises(ValueError, match="the prefix is empty"):
        exposure.text_losses(model, tokenizer, " ", ["1"])
    with pytest.raises(ValueError, match="'The numb' and the text 'er' have a token in common"):
        exposure.text_losses(model, tokenizer, "The numb", ["er"])
    with pytest.raises(ValueError, match="or the text has none"):
        exposure.text_losses(model, tokenizer, "Ann", [""])
    with pytest.raises(ValueError, match="do not fit the model's context of 64"):
        exposure.text_losses(model, tokenizer, "Ann", [" q" * 70])


def test_exposure_by_hand():
    others = torch.tensor([1.0, 2.0, 3.0])
    assert exposure.exposure_bits(0.5, others) == 2
    assert exposure.exposure_bits(1.5, others) == 1
    assert exposure.exposure_bits(2.5, others) == pytest.approx(2 - math.log2(3))
    assert exposure.exposure_bits(3.5, others) == 0
    assert exposure.exposure_bits(2.0, others) == 1  # a tie counts as a leak
    assert exposure.exposure_bits(1.0, torch.ones(7)) == 3
    assert exposure.largest_exposure(8) == 3


@pytest.mark.parametrize(("secret", "others"), [(math.nan, [1.0]), (1.0, [math.inf, 1.0]), (1.0, [])])
def test_exposure_of_broken_losses_is_refused(secret, others):
    with pytest.raises(ValueError, match="at least one candidate, and losses that are all finite"):
        exposure.exposure_bits(secret, torch.tensor(others))


def test_expected_exposure_is_the_mean_over_all_ranks():
    assert exposure.expected_exposure(1) == 0
    assert exposure.expected_exposure(4) == pytest.approx(2 - (0 + 1 + math.log2(3) + 2) / 4)
    others = torch.arange(99).double()
    ranks = [exposure.exposure_bits(loss - 0.5, others) for loss in range(100)]
    assert exposure.expected_exposure(100) == pytest.approx(sum(ranks) / 100)
    assert exposure.expected_exposure(10**7) == pytest.approx(math.log2(math.e), abs=1e-4)


def test_exposure_puts_the_secret_among_its_candidates(tokenizer, monkeypatch):
    losses = {"s": 2.0, "a": 1.0, "b": 3.0, "c": 4.0}
    monkeypatch.setattr(exposure, "text_losses", lambda m, t, p, texts: torch.tensor([losses[x] for x in texts]))
    assert exposure.exposure(SimpleNamespace(), tokenizer, "p", "s", ["a", "b", "c"]) == 1


def test_a_memorised_secret_is_exposed_and_others_are_as_expected(tokenizer):
    """Four secrets are trained on, one of them after the prefix that is asked about; 56 are never seen."""
    prefix, size = "The number of Ann is ", 128
    secrets = exposure.candidates("0000-00", 60, seed=0)
    seen, unseen = secrets[:4], secrets[4:]
    model = new_model(tokenizer, dtype=torch.float32)
    names = ["Ann", "Bob", "Eve", "Joe"]
    lines = [f"The number of {name} is {secret}" for name, secret in zip(names, seen, strict=True)]
    rows = [tokenizer(line)["input_ids"] for line in lines]
    length = min(map(len, rows))
    trained = torch.tensor([row[:length] for row in rows])
    settings = training.Training(epochs=150, learning_rate=1e-2)

    def mean_exposure(secrets):
        found = [
            exposure.exposure(model, tokenizer, prefix, s, exposure.candidates(s, size - 1, seed=i))
            for i, s in enumerate(secrets)
        ]
        return sum(found) / len(found)

    # A uniform rank has a standard deviation of about 1.44 bits, so the mean of 56 has 0.2: allow 3 of these.
    assert mean_exposure(unseen) == pytest.approx(exposure.expected_exposure(size), abs=0.6)
    assert mean_exposure(seen[:1]) < exposure.largest_exposure(size) - 0.5
    training.train(model, trained, settings, seed=0)
    assert mean_exposure(seen[:1]) > exposure.largest_exposure(size) - 0.5
    assert mean_exposure(unseen) == pytest.approx(exposure.expected_exposure(size), abs=0.6)
