"""Sentences and tables about tests that are made up here."""

import pandas as pd

from unlearnlib.verdicts import rules, wording
from unlearnlib.verdicts.rules import INCONCLUSIVE, NOT_REPRODUCED, NOT_RUN, REPRODUCED

OWN, OURS, ASCENT, DIFFERENCE = "fisher_recursion", "kfac", "gradient_ascent", "gradient_difference"


def row_of(values, **labels):
    labels = {"claim": "C1", "corpus": "tales", "model": "m", "method": OWN, "against": ASCENT} | labels
    return rules.judge(pd.Series(values), rules.below(), **labels)


WIN, DRAW, LOSS = [-0.5, -0.4, -0.6], [-0.5, 0.4, 0.1], [0.5, 0.4, 0.6]


def rows_of(*values, **labels):
    return pd.DataFrame([row_of(each, **labels) for each in values])


def test_a_test_is_named_by_what_it_compares():
    of_private = pd.Series(row_of(WIN, method="dp_sgd:8", against=OURS))
    assert wording.versus(of_private) == "DP-SGD (ε = 8) − K-FAC"
    assert wording.shortened(wording.versus(pd.Series(row_of(WIN, against=DIFFERENCE)))) == "recursion − diff."
    assert wording.place(of_private) == "tales"
    assert wording.place(pd.Series(row_of(WIN, claim="C4"))) == "m"


def test_a_list_tells_effect_and_side_and_note():
    text = wording.listed(rows_of(WIN, note="as it was"))
    assert text.startswith("tales: fisher recursion − gradient ascent -0.50 [")
    assert text.endswith("], on the claim's side on 3 of 3 seeds; as it was")
    assert "2 of 3 models" in wording.listed(rows_of([-0.1, 0.1, -0.1], claim="C4"))


def test_verdicts_of_tests_together_are_quoted():
    assert wording.quoted(rows_of(WIN, WIN)) == REPRODUCED
    assert wording.quoted(rows_of(WIN, DRAW)) == INCONCLUSIVE
    assert wording.quoted(rows_of(WIN).iloc[:0]) == NOT_RUN


def test_a_verdict_rests_on_what_is_against_it_or_missing_or_open_or_weakest():
    against = wording.why(rows_of(WIN, LOSS, DRAW))
    assert against.startswith("Deciding tests: 3, of which 1 came out against it (tales: fisher recursion")
    assert "+0.50" in against
    notes = ("", "NPO was not run", "NPO was not run; K-FAC was not tuned by the rule")
    missing = [rules.not_run("C1", "four_datasets", note=note) for note in notes]
    assert wording.why(pd.DataFrame([row_of(WIN), *missing, row_of(DRAW)])) == (
        "Deciding tests: 5; not run: 3, of "
        "four_datasets (no results, NPO was not run, K-FAC was not tuned by the rule)."
    )
    assert wording.why(pd.DataFrame([row_of(WIN, decides=False)])) == "No test decides."
    assert "of which 1 decided nothing (tales" in wording.why(rows_of(WIN, DRAW))
    weakest = wording.why(rows_of(WIN, [-0.2, -0.25, -0.2]))
    assert weakest.startswith("Deciding tests: 2, all on the claim's side; the weakest is tales")
    assert "-0.22" in weakest
    beside = wording.why(pd.DataFrame([row_of(WIN), row_of(LOSS, decides=False)]))
    assert beside.startswith("Deciding tests: 1, all")


def test_of_a_claim_that_holds_somewhere_the_clearest_place_is_told():
    somewhere = pd.DataFrame(
        [row_of(WIN, corpus="maths") | {"every": False}, row_of(LOSS, corpus="tales") | {"every": False}]
    )
    assert wording.why(somewhere).startswith("It is so on 1 of 2 corpora, most clearly maths: ")


def test_what_a_page_says_of_a_claim():
    tests = pd.DataFrame(
        [
            row_of(WIN),
            row_of(DRAW, against=DIFFERENCE),
            row_of(LOSS, method=OURS, decides=False, note="missed"),
            row_of(LOSS, method=OURS, corpus="maths", decides=False, note="missed"),
            row_of(WIN, method=DIFFERENCE, decides=False),
        ]
    )
    said = wording.in_words(tests)
    assert said["verdict"] == INCONCLUSIVE
    assert said["notes"] == " To be noted: tales, maths: missed."
    assert said["effect"].endswith("] nats (recursion − diff., tales)")
    assert said["kfac"] == NOT_REPRODUCED
    assert said["difference"] == REPRODUCED
    assert said["why"] == wording.why(tests)
    missing = rules.not_run("C1", "four_datasets", method=OWN, against=ASCENT)
    nothing = wording.in_words(pd.DataFrame([missing]))
    assert (nothing["verdict"], nothing["effect"], nothing["kfac"]) == (NOT_RUN, "0 of 1 tests run", NOT_RUN)
    partly = wording.in_words(pd.DataFrame([row_of(WIN), missing]))
    assert partly["verdict"] == NOT_RUN
    assert partly["effect"].startswith("1 of 2 tests run: -")
    assert nothing["notes"] == ""


def test_a_table_marks_what_does_not_decide():
    tests = pd.DataFrame([row_of(WIN), row_of(LOSS, against=DIFFERENCE, decides=False)])
    table = wording.table(tests)
    assert table.index.tolist() == ["recursion − ascent", "recursion − diff."]
    assert table["verdict"].tolist() == [REPRODUCED, f"{NOT_REPRODUCED} *"]
    assert table["side"].tolist() == ["3/3", "0/3"]
    assert table["mean [95 %] (nats)"].iloc[0].startswith("-0.50 [-0.")
    two = wording.table(pd.DataFrame([row_of(WIN), row_of(WIN, corpus="maths", claim="C7")]))
    assert two.index.tolist() == ["tales: recursion − ascent", "maths: recursion − ascent"]
