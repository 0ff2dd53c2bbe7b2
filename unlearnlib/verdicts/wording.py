"""The tests of a claim in words and in tables, for people to read.

A *test* is a row of the table that :func:`unlearnlib.verdicts.claims.all_tests` makes; those of one claim belong
together.
"""

import numpy as np
import pandas as pd

from unlearnlib.verdicts import claims
from unlearnlib.verdicts.results import method_label
from unlearnlib.verdicts.rules import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    NOT_RUN,
    REPRODUCED,
    combine,
    conclude,
    effect_text,
    weakest,
)

BY_MODEL = ("C4", "C4 own")
"""The claims whose pairs are models; those of the others are seeds."""


def versus(test: pd.Series) -> str:
    """What is compared in a test."""
    method = method_label(test["method"]).replace("DP-SGD (", "DP-SGD (ε = ")
    return f"{method} − {method_label(test['against'])}"


def shortened(text: str) -> str:
    """Names of methods cut down to what a phone has room for."""
    return text.replace("fisher ", "").replace("gradient difference", "diff.").replace("gradient ", "")


def place(test: pd.Series) -> str:
    """Where a test was made: its corpus, or the model where these are compared."""
    return test["model"] if test["claim"] in BY_MODEL else test["corpus"]


def listed(tests: pd.DataFrame) -> str:
    """Tests with their effects, and what is to be said of them."""
    texts = []
    for _, test in tests.iterrows():
        note = f"; {test['note']}" if test["note"] else ""
        over = "models" if test["claim"] in BY_MODEL else "seeds"
        side = f", on the claim's side on {test['agree']} of {test['pairs']} {over}" if test["pairs"] else ""
        texts.append(f"{place(test)}: {versus(test)} {effect_text(test)}{side}{note}")
    return "; ".join(texts)


def quoted(tests: pd.DataFrame) -> str:
    """The verdict of tests together; of none, that they were not run."""
    return NOT_RUN if tests.empty else combine(tests["verdict"])


def why(tests: pd.DataFrame) -> str:
    """In a sentence, what the verdict on a claim rests on, from its tests."""
    [outcome] = conclude(tests)
    deciding = tests[tests["decides"]]
    if deciding.empty:
        return "No test decides."
    if not deciding["every"].all() and outcome == REPRODUCED:
        clear = deciding[deciding["verdict"] == REPRODUCED]
        clearest = weakest(deciding).to_frame().T
        return f"It is so on {len(clear)} of {len(deciding)} corpora, most clearly {listed(clearest)}."
    missing, undecided, against = (
        deciding[deciding["verdict"] == verdict] for verdict in (NOT_RUN, INCONCLUSIVE, NOT_REPRODUCED)
    )
    number = f"Deciding tests: {len(deciding)}"
    if len(against):
        return f"{number}, of which {len(against)} came out against it ({listed(against)})."
    if len(missing):
        reasons = []
        for exhibit, found in missing.groupby("exhibit", sort=False):
            notes = found["note"].replace("", "no results").str.split("; ").explode().unique()
            reasons.append(f"{exhibit} ({', '.join(notes)})")
        return f"{number}; not run: {len(missing)}, of {'; '.join(reasons)}."
    if len(undecided):
        return f"{number}, of which {len(undecided)} decided nothing ({listed(undecided)})."
    return f"{number}, all on the claim's side; the weakest is {listed(weakest(deciding).to_frame().T)}."


def in_words(tests: pd.DataFrame) -> dict[str, str]:
    """What a page says of a claim, from its tests.

    ``verdict``; ``effect``, the one on which it hangs, after the number of tests that were run if not all were;
    ``why``; ``notes``, a sentence to follow, or nothing; the verdict with K-FAC in place of the paper's estimate
    (``kfac``), and that of gradient difference (``difference``), where the claim asks something of single methods.
    """
    [outcome], test = conclude(tests), weakest(tests)
    effect = effect_text(test)
    if effect != "–":
        effect += f" {test['unit']} ({shortened(versus(test))}, {place(test)})"
    deciding = tests.loc[tests["decides"], "verdict"]
    if NOT_RUN in set(deciding):
        run = f"{(deciding != NOT_RUN).sum()} of {len(deciding)} tests run"
        effect = run if effect == "–" else f"{run}: {effect}"
    where: dict[str, list[str]] = {}
    for _, noted in tests[(tests["note"] != "") & (tests["verdict"] != NOT_RUN)].iterrows():
        where.setdefault(noted["note"], []).append(place(noted))
    notes = [f"{', '.join(dict.fromkeys(places))}: {note}" for note, places in where.items()]
    decides = tests["decides"]
    beside = (tests["method"] == claims.OURS) & tests["against"].isin(tests.loc[decides, "against"])
    return {
        "verdict": outcome,
        "effect": effect,
        "why": why(tests),
        "notes": f" To be noted: {'; '.join(notes)}." if notes else "",
        "kfac": quoted(tests[beside]),
        "difference": quoted(tests[tests["method"] == "gradient_difference"]),
    }


def table(tests: pd.DataFrame) -> pd.DataFrame:
    """The tests of a claim, a row each: the effect with its interval, the pairs on its side, and the verdict.

    A star marks the verdict of a test that does not decide.
    """
    columns = {
        f"mean [95 %] ({tests['unit'].iloc[0]})": [effect_text(test) for _, test in tests.iterrows()],
        "side": [f"{test['agree']}/{test['pairs']}" for _, test in tests.iterrows()],
        "verdict": tests["verdict"] + np.where(tests["decides"], "", " *"),
    }
    named, places = ([name(test) for _, test in tests.iterrows()] for name in (versus, place))
    named = [shortened(one) for one in named]
    if len(set(places)) > 1:
        named = [f"{where}: {what}" for where, what in zip(places, named, strict=True)]
    return pd.DataFrame(columns).set_axis(named)
