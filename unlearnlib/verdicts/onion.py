"""The rules of the onion effect: does a new layer become vulnerable, and do methods peel as retraining does?"""

import pandas as pd

from unlearnlib.verdicts.rules import NOT_REPRODUCED, REPRODUCED, Rule, above, judge, not_run

PAPERS_OWN, OURS = "fisher_recursion", "kfac"
MARGIN = 0.1
"""A rank correlation that is lower than another by less than this still counts as as high."""

EFFECT, OWN = "onion", "onion own"


def onion_tests(table: pd.DataFrame | None, margin: float = MARGIN) -> pd.DataFrame:
    """The tests of the onion effect and of the book's own question, from the table of the exhibit ``onion``.

    The effect: of the sequences that no layer takes, the attack finds more after the targeted layer was removed by
    retraining (a) than in the original, and (b) than after as many were removed at random. Both must hold.

    The question of the book: Fisher Removal by the paper's recursion peels as retraining does. Over the sequences
    that stay, its changes of the score (c) go with those by retraining without the targeted layer more than with
    those by retraining without others, and (d) no less than those of one other retraining, by less than
    ``margin``. K-FAC and the first-order methods are shown beside it. A method that missed matched forgetting
    concludes nothing.
    """
    labels = {"exhibit": "onion"}
    if table is None:
        return pd.DataFrame(
            [
                not_run(EFFECT, method="retrained", against=against, **labels)
                for against in ("original", "random layer")
            ]
            + [
                not_run(OWN, method=PAPERS_OWN, against=against, **labels)
                for against in ("other layer", "retrained")
            ]
        )
    labels |= {name: ", ".join(sorted(table[name].unique())) for name in ("corpus", "model")}
    wide = table.pivot_table(index="seed", columns=["method", "layer", "metric"], values="value", sort=False)
    found = {layer: wide["retrained", layer, "found_staying"] for layer in ("targeted", "random")}
    shown = {"original": wide["original", "none", "found_staying"], "random layer": found["random"]}
    rows = [
        judge(
            found["targeted"] - other,
            above(),
            claim=EFFECT,
            method="retrained",
            against=against,
            unit="share",
            **labels,
        )
        for against, other in shown.items()
    ]
    as_high = Rule((-margin, float("inf")), (-float("inf"), -margin))
    of_methods = table.loc[table["metric"] == "reached", "method"].unique()
    for method in sorted(of_methods, key=lambda name: (name != PAPERS_OWN, name != OURS)):
        own, crossed, retrained = (
            wide[name, "targeted", metric]
            for name, metric in (
                (method, "fidelity"),
                (method, "fidelity_crossed"),
                ("retrained", "fidelity"),
            )
        )
        reached = (wide[method, "targeted", "reached"] == 1).all()
        allowed = (REPRODUCED, NOT_REPRODUCED) if reached else ()
        labels |= {"decides": method == PAPERS_OWN, "unit": "rank correlation", "allowed": allowed}
        labels["note"] = "" if reached else "missed matched forgetting"
        for against, other, rule in (("other layer", crossed, above()), ("retrained", retrained, as_high)):
            rows.append(judge(own - other, rule, claim=OWN, method=method, against=against, **labels))
    return pd.DataFrame(rows)
