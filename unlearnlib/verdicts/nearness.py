"""Does second order end nearer to the retrained weights than first order? The book's own question."""

import pandas as pd

from unlearnlib.verdicts.rules import below, judge

SECOND = ("fisher_recursion", "kfac")
FIRST = ("gradient_ascent:sgd", "gradient_difference")


def nearer_retrained(table: pd.DataFrame, metric: str = "way_left") -> pd.DataFrame:
    """Tests of that question on a table of the exhibit ``moved_weights``, a row each of :data:`SECOND` and FIRST.

    The effect, once a seed, is the ``metric`` of the second-order method minus that of the first-order one: what
    is left of the squared distance from the original to the mean retrained model, Euclidean (``way_left``) or in
    the norm of the curvature (``way_left_curvature``). Nearer is below zero. The columns are those of
    :func:`unlearnlib.verdicts.claims.all_tests`; all four tests decide.
    """
    rows = table[table["metric"] == metric]
    wide = rows.pivot(index="seed", columns="method", values="value")
    labels = {"claim": f"nearer, {metric}", "exhibit": "moved_weights", "unit": "of the way"}
    labels |= {name: rows[name].iloc[0] for name in ("corpus", "model")}
    return pd.DataFrame(
        judge((wide[method] - wide[against]).dropna(), below(), method=method, against=against, **labels)
        for method in SECOND
        for against in FIRST
    )
