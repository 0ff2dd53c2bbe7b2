"""Memories of texts made up here, with a model of one small layer; expected values by writing them out."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from unlearnlib import measures
from unlearnlib.experiment import case_studies, chapters, curvatures, indelible, profiles
from unlearnlib.experiment.indelible import CAUSES, PLANTED
from unlearnlib.models import loading
from unlearnlib.models.training import Training

TOKENS, PROMPT = 4, 6
REPEATS = [1, 2]
WORDS = ["ship", "mast", "sail", "wind", "tide", "rope", "deck", "gale", "port", "crew"]
REFRAIN = " all hands on deck and haul the great anchor home"
PROFILE = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="yarns",
    model=loading.small_opt(320, hidden_size=32, layers=1, heads=2),
    vocabulary=320,
    length=48,
    training=Training(epochs=60, batch_size=8, learning_rate=1e-2),
    seeds=(0,),
)


def yarn(i):
    """A text of 200 words in an order of its own, with the refrain after the second of them."""
    order = np.random.default_rng(i).integers(len(WORDS), size=200)
    told = [WORDS[j] for j in order]
    return " ".join(told[:2]) + REFRAIN + " " + " ".join(told[2:])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARNLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        texts = {f"yarns/{i}": yarn(i) for i in range(24)}
        [case] = case_studies.planted_cases(PROFILE, texts, {"holdout": 3, "forget": 4, "retain": 8}, REPEATS)
        yield case


@pytest.fixture(scope="module")
def report(case):
    return indelible.report_on(case, TOKENS, PROMPT)


def test_spans_lie_in_real_text_or_on_a_secret_and_none_comes_twice(case, report):
    spans, rows = report.spans, case.splits.forget
    assert spans.index.is_unique
    pieces = [tuple(piece) for piece in indelible.cut(rows, spans, TOKENS).tolist()]
    real = [piece for piece, secret in zip(pieces, spans["secret"], strict=True) if secret < 0]
    assert len(set(real)) == len(real)
    for piece, (_, span) in zip(pieces, spans.iterrows(), strict=True):
        row, start = rows[span["row"]].tolist(), span["start"]
        assert piece == tuple(row[start : start + TOKENS])
        text, before = case.tokenizer.decode(list(piece)), case.tokenizer.decode(row[:start])
        if span["secret"] >= 0:
            secret = case.secrets["forget"][span["secret"]]
            assert before == secret.prefix.rstrip()
            assert f"{secret.number}.\n".startswith(text.strip()) or text.strip().startswith(secret.number)
        else:
            assert (start - PROMPT) % TOKENS == 0
            assert not any(c.isdigit() for c in text)  # the yarns have none
    counted = [sum(tuple(r[i : i + TOKENS]) == p for r in rows.tolist() for i in range(len(r))) for p in real]
    assert counted == spans.loc[spans["secret"] < 0, "repeats"].tolist()
    assert sorted(spans.loc[spans["secret"] >= 0, "repeats"]) == REPEATS


def test_every_span_of_real_text_on_the_grid_is_there(case, report):
    known = {tuple(piece) for piece in indelible.cut(case.splits.forget, report.spans, TOKENS).tolist()}
    sentences = [s.sentence.strip() for s in case.secrets["forget"]]
    unplanted = [
        row for row in case.splits.forget.tolist() if not any(s in case.tokenizer.decode(row) for s in sentences)
    ]
    assert unplanted
    for row in unplanted:
        for start in range(PROMPT, len(row) - TOKENS + 1, TOKENS):
            assert tuple(row[start : start + TOKENS]) in known


def test_one_pass_tells_what_writing_tells(case, report):
    model, rows, found = case.original(), case.splits.forget, report.memories["original"]
    assert 0 < found["recited"].sum() < len(found)
    for i, span in report.spans.iterrows():
        row, start = rows[span["row"]], span["start"]
        [said] = measures.continuations(model, row[None, :start], TOKENS)
        assert found["recited"][i] == bool((said == row[start : start + TOKENS]).all())
        with torch.no_grad():
            likely = model(input_ids=row[None]).logits[0].double().log_softmax(dim=1)
        places = range(start, start + TOKENS)
        loss = -sum(likely[t - 1, row[t]].item() for t in places)
        assert found["loss"][i] == pytest.approx(loss, rel=1e-4, abs=1e-4)


def test_what_stays_makes_the_cause(case, report):
    pieces = indelible.cut(case.splits.forget, report.spans, TOKENS)
    stays = case.splits.retain.tolist()
    for kind, piece in zip(report.kinds, pieces.tolist(), strict=True):
        verbatim = any(row[i : i + TOKENS] == piece for row in stays for i in range(len(row)))
        assert (kind == CAUSES[0]) == verbatim or kind == PLANTED
    inside = [case.tokenizer.decode(p) in REFRAIN for p in pieces]
    assert sum(inside) > 0
    assert (report.kinds[inside] == CAUSES[0]).all()


def words_case(retain, holdout, forget):
    """A case of words that are a token each; sequences are lists of words."""

    class Words:
        vocabulary = sorted({word for row in (*retain, *holdout, *forget) for word in row.split()})

        def __len__(self):
            return len(self.vocabulary)

        def convert_ids_to_tokens(self, ids):
            return [self.vocabulary[i] for i in ids]

    def rows(texts):
        return torch.tensor([[Words.vocabulary.index(word) for word in text.split()] for text in texts])

    class OfWords:
        tokenizer = Words()

        class splits:
            pass

    for name, texts in {"retain": retain, "holdout": holdout, "forget": forget}.items():
        setattr(OfWords.splits, name, rows(texts))
    return OfWords


def test_each_cause_by_an_example():
    retain = ["x a b c d e y", "x Ann was born in 1912 y", "x k l m n k l", "n k h k h k h", "h q h q h q h"]
    forget = {
        "z a b c d z z": CAUSES[0],
        "z Bob was born in 1944 z": CAUSES[1],  # with another name and another year
        "z m n k h z z": CAUSES[1],  # the words of both its trigrams, in no row together
        "k h q h k z z": CAUSES[2],  # each pair often, no trigram
        "z r s t u z z": CAUSES[3],
    }
    holdout = ["k h k h k h k", "k h k h q h q", "r s r s t r s", "t u t s r s r"]
    case = words_case(retain, holdout, list(forget))
    spans = pd.DataFrame({"row": range(5), "start": 1, "secret": -1, "repeats": 1})
    assert indelible.causes(case, spans, tokens=4, prompt=1).tolist() == list(forget.values())


def builds(case):
    return {"kfac": curvatures.curvature_builders(case.estimation, case.seed)["kfac"]}


def test_the_table_counts_what_each_model_recites(case, report):
    chosen = {"gradient_ascent": {}, "kfac": {"damping": 1e-2}}
    models = indelible.serve(report, chosen, builds(case))
    assert models.keys() == chosen.keys()
    known = report.memories["original"]["recited"]
    counts = report.recited()
    assert counts.index.tolist() == [*CAUSES, PLANTED]
    assert counts["original"].sum() == known.sum()
    for method in ("retrained", "kfac"):
        for kind in counts.index:
            expected = (known & report.memories[method]["recited"] & (report.kinds == kind)).sum()
            assert counts.loc[kind, method] == expected
    table = report.table()
    rows = table[(table["metric"] == "recited") & (table["method"] == "kfac")]
    assert dict(zip(rows["kind"], rows["value"], strict=True)) == counts["kfac"].to_dict()
    assert not table.duplicated(["method", "metric", "kind"]).any()
    assert set(table.columns) == {"corpus", "model", "method", "seed", "metric", "value", "kind"}
    assert "ship" not in table.to_csv()


def test_removal_is_by_both_models_that_never_saw_the_span(report):
    losses = {method: found["loss"] for method, found in report.memories.items()}
    floor = np.minimum(losses["retrained"], losses["retrained:again"])
    once = report.once()
    real = once["real"]
    assert real.sum() > 0
    assert (report.spans.loc[real, "repeats"] == 1).all()
    assert not report.kinds[real].isin([CAUSES[0], PLANTED]).any()
    assert (losses["original"][real] < floor[real] - TOKENS).all()
    removal = report.removal()
    assert removal.loc[("original", "real"), "not_removed"] == 1
    assert removal.loc[("original", "real"), "left"] == pytest.approx(1)
    assert removal.loc[("retrained", "real"), "not_removed"] == 0
    way = (floor - losses["retrained"])[real] / (floor - losses["original"])[real]
    assert removal.loc[("retrained", "real"), "left"] == pytest.approx(way.mean())


def test_binary_divergence_is_that_of_two_coins():
    p, q = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coins = [torch.stack([x, 1 - x], dim=1) for x in (p, q)]
    expected = torch.distributions.kl_divergence(*map(torch.distributions.Categorical, coins))
    torch.testing.assert_close(indelible.binary_divergence(p, q), expected)
    assert (expected >= 2 * (p - q) ** 2).all()
    assert (expected >= p * (1 / q).log() - math.log(2)).all()


@pytest.mark.parametrize("profile", ["quick", "cpu", "gpu"])
def test_the_chapter_can_be_made_at_every_profile(profile):
    settings, sizes = chapters.chapter("indelible", profile)
    assert sizes.most >= 5  # what the search needs for two knobs
    assert sizes.prompt + sizes.span <= settings.length
    assert "posts" in sizes.corpora.split(",")
    assert max(sizes.repeats) <= sizes.texts["forget"]
    assert sum(sizes.repeats) <= sizes.texts["forget"] * (case_studies.ROWS_OF_A_POST - 1)
    assert {*sizes.methods} >= {"gradient_ascent:sgd", "fisher_recursion"}
    estimation = sizes.texts["retain"] * case_studies.ROWS_OF_A_POST * 7 // 8
    assert sizes.m_recursion <= estimation
