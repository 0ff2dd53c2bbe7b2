"""The case studies on posts and tales made up here, with models of one small layer."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unlearnlib import weights
from unlearnlib.experiment import case_studies, comparison, curvatures, profiles
from unlearnlib.methods import matching
from unlearnlib.models import loading
from unlearnlib.models.training import Training
from unlearnlib.texts import corpora

REPEATS = [1, 2]
IN_SPLITS = {"holdout": 3, "forget": 4, "retain": 8}
WORDS = ["ship", "mast", "sail", "wind", "tide", "rope", "deck", "gale", "port", "crew"]
CHOSEN = {
    "gradient_ascent": {},
    "gradient_difference": {"learning_rate": 3e-3, "retain_weight": 2.0},
    "kfac": {"damping": 1e-2},
}
PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="posts",
    model=loading.small_opt(300, hidden_size=16, layers=1, heads=2),
    vocabulary=300,
    length=64,
    training=Training(epochs=10, learning_rate=1e-2),
    seeds=(0,),
    relearning_steps=1,
)


def made_up(i):
    """A text of 250 words that no other has in this order."""
    order = np.random.default_rng(i).integers(len(WORDS), size=250)
    return " ".join(WORDS[j] for j in order)


def all_posts():
    """Forty posts, each of a sender of its own, but for two who write two each; three do not tell theirs."""
    senders = [f"p{i % 37}@made.up" for i in range(40)]
    senders[5:8] = ["nobody"] * 3
    return [
        {"id": f"posts/{i:05d}", "text": f"Subject: {made_up(i)[:20]}\nFrom: {sender} (P {i})\n{made_up(i)}"}
        for i, sender in enumerate(senders)
    ]


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory):
    """Posts and tales from here, and a cache of their own for the models."""
    tales = [{"id": f"tales/{i}", "text": made_up(1000 + i)} for i in range(150)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(case_studies, "load_posts", all_posts)
        patch.setitem(corpora.CORPORA, "tales", lambda: tales)
        yield


@pytest.fixture(scope="module")
def case():
    [case] = case_studies.post_cases(PROFILE, IN_SPLITS, REPEATS)
    return case


@pytest.fixture(scope="module")
def tale():
    [case] = case_studies.tale_cases(dataclasses.replace(PROFILE, corpus="tales"), 3, 2, rest=26, holdout=4)
    return case


def builds(case):
    return {"kfac": curvatures.curvature_builders(case.estimation, case.seed)["kfac"]}


def number_loss(model, tokenizer, prefix, number):
    """The loss of the tokens of a number after its prefix, by the textbook call."""
    start, row = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (prefix.rstrip(), prefix + number))
    losses = F.cross_entropy(model(input_ids=row).logits[0, :-1], row[0, 1:], reduction="none")
    return losses[start.shape[1] - 1 :].sum()


def test_a_secret_is_planted_as_often_as_it_says_on_its_own_side(case):
    for split in ("forget", "retain", "holdout"):
        texts = [case.tokenizer.decode(row) for row in getattr(case.splits, split)]
        assert len(texts) == IN_SPLITS[split] * case_studies.ROWS_OF_A_POST
        for side, secrets in case.secrets.items():
            for secret in secrets:
                planted = sum(secret.sentence.strip() in text for text in texts)
                assert planted == (secret.repeats if side == split else 0)
    assert [[s.repeats for s in case.secrets[split]] for split in ("forget", "retain")] == [REPEATS, REPEATS]
    assert not case.secrets["holdout"]


def test_more_posts_than_there_are_long_ones_are_an_error():
    with pytest.raises(ValueError, match="40 posts have 3 sequences of 64 tokens"):
        case_studies.post_cases(PROFILE, IN_SPLITS | {"retain": 34}, REPEATS)


def test_asked_are_senders_who_stay_nowhere_among_strangers_who_were_seen_nowhere(case):
    text = {post["id"]: post["text"] for post in all_posts()}
    sender = {name: body.split("From: ")[1].split(" (")[0] for name, body in text.items()}
    forget, retain = (case.splits.documents[split] for split in ("forget", "retain"))
    stay = {sender[name] for name in retain}
    expected = {sender[name] for name in forget} - stay - {"nobody"}
    assert case.senders.keys() == expected
    for address, before in case.senders.items():
        assert before.startswith("Subject: ")
        assert before.endswith("\nFrom: ")
        assert any(text[name].startswith(before + address) for name in forget)
    others = {sender[name] for name in text if name not in {*forget, *retain}}
    assert "@" not in repr(case)
    assert case.strangers == sorted(others - stay - expected - {sender[n] for n in forget} - {"nobody"})


def test_loss_and_gradient_of_a_secret_are_those_of_its_number(case):
    model = loading.load_model(PROFILE.model, seed=1, dtype=torch.float64)
    secrets = case.secrets["forget"]
    expected = [number_loss(model, case.tokenizer, s.prefix, s.number) for s in secrets]
    np.testing.assert_allclose(case.secret_losses(model, "forget"), [e.item() for e in expected], rtol=1e-9)
    live = weights.parameters(model)
    gradient = torch.autograd.grad(expected[1], list(live.values()))
    found = case.secret_gradient(model, secrets[1])
    for name, row in zip(live, gradient, strict=True):
        torch.testing.assert_close(found[name], row, rtol=1e-9, atol=1e-12)


def test_passages_are_repeated_and_the_rest_is_not(tale):
    trained = tale.splits.train
    for rows, copies in ((tale.forgotten, 2), (tale.kept, 2), (tale.rest, 1)):
        assert all((trained == row).all(dim=1).sum() == copies for row in rows)
    assert len(trained) == 2 * 6 + 26
    assert (len(tale.splits.forget), len(tale.splits.holdout)) == (6, 4)
    validation = {tuple(row) for row in tale.validation.tolist()}
    assert not validation & {tuple(row) for row in tale.estimation.tolist()}


def test_numbers_that_would_part_a_passage_from_its_copies_are_refused():
    with pytest.raises(ValueError, match="8 copies leave no room"):
        case_studies.tale_cases(dataclasses.replace(PROFILE, corpus="tales"), 3, 8, rest=8, holdout=4)


def test_verbatim_counts_the_tokens_before_the_first_that_differs(tale):
    model, prompt = tale.original(), 8
    counts = []
    for row in tale.kept:
        said = row[:prompt].tolist()
        while len(said) < len(row):
            said.append(model(input_ids=torch.tensor([said])).logits[0, -1].argmax().item())
        same = [a == b for a, b in zip(said[prompt:], row[prompt:].tolist(), strict=True)]
        counts.append(same.index(False) if False in same else len(same))
    assert case_studies.verbatim(model, tale.kept, prompt) == pytest.approx(np.mean(counts))


NOT_MATCHED = {"original", "retrained", "retrained:again", "finetuned"}
ALL = {*NOT_MATCHED, *CHOSEN, "fisher_forgetting"}


def test_every_method_is_matched_and_asked_for_secrets_and_senders(case):
    report = case_studies.SecretReport(case, case.retrained(), shares=(1.0,), of=16)
    comparison.measure_references(report)
    comparison.follow_methods(report, CHOSEN, builds(case))
    assert {row["method"] for row in report.rows} == ALL
    for method in ALL - NOT_MATCHED:
        [forget] = [r["value"] for r in report.rows if r["method"] == method and r["metric"] == "forget_loss"]
        assert abs(forget - report.target) <= matching.TOLERANCE + 1e-4
    metrics = ("exposure_bits", "secret_loss", "exposure_kept_bits", "secret_kept_loss")
    keys = [(r["method"], r["metric"], r["repeats"], r["secret"]) for r in report.secrets]
    assert sorted(keys) == sorted((m, k, n, i) for m in ALL for k in metrics for i, n in enumerate(REPEATS))
    losses = [r["value"] for r in report.secrets if (r["method"], r["metric"]) == ("retrained", "secret_loss")]
    np.testing.assert_allclose(losses, case.secret_losses(report.retrained, "forget"), rtol=1e-5)
    bits = [r["value"] for r in report.secrets + report.senders if r["metric"].endswith("_bits")]
    assert min(bits) >= 0
    assert max(bits) <= math.log2(max(16, 1 + len(case.strangers)))
    assert [r["method"] for r in report.senders] == [
        r["method"] for r in report.rows if r["metric"] == "forget_loss"
    ]
    assert {(r["addresses"], r["strangers"]) for r in report.senders} == {(len(case.senders), len(case.strangers))}


def test_passages_are_continued_by_every_model(tale):
    report = case_studies.PassageReport(tale, tale.retrained(), shares=(1.0,), prompt=8)
    report.reference("original", tale.original())
    values = {row["metric"]: row["value"] for row in report.rows}
    model = tale.original()
    for metric, rows in {"kept_loss": tale.kept, "rest_loss": tale.rest}.items():
        logits = model(input_ids=rows).logits[:, :-1]
        assert values[metric] == pytest.approx(F.cross_entropy(logits.mT, rows[:, 1:]).item(), rel=1e-5)
    assert values["verbatim_tokens"] == pytest.approx(case_studies.verbatim(model, tale.forgotten, 8))
    assert report.said["original"].shape == (2, 48)
