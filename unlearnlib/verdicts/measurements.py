"""What a test of a claim takes from a table of results: numbers side by side, who missed the target, and gaps."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from unlearnlib.verdicts.results import method_label

WITHOUT_KNOBS = ("original", "retrained", "retrained:again", "finetuned", "gradient_ascent")
"""Methods for which nothing is chosen. Fine-tuning is a reference that is not matched."""

SETTINGS_OF = {
    "fisher_forgetting:recursion": "fisher_recursion",
    "fisher_forgetting": "kfac",
    "noise": "kfac",
    "kfac:carried": "kfac",
}
"""Methods that take over the settings chosen for another."""

SAME = 0.01
"""Two forget losses in nats that are no further apart are equal (the tolerance of matched forgetting)."""


def side_by_side(table: pd.DataFrame, metric: str, methods: Sequence[str], over: str = "seed") -> pd.DataFrame:
    """The values of a metric: a column a method, a row for each seed (or model) that all of ``methods`` have.

    Where a metric was measured at several settings, their mean. Raises ValueError for a table that mixes corpora
    or models, lacks the metric of a method, or has a number in it that is not finite.
    """
    for column in {"corpus", "model"} - {over}:
        if table[column].nunique() > 1:
            raise ValueError(f"the results mix several of the column {column!r} ({names_of(table, column)})")
    rows = table[(table["metric"] == metric) & table["method"].isin(methods)]
    for method in methods:
        if not (rows["method"] == method).any():
            raise ValueError(f"the results lack the metric {metric!r} of the method {method!r} ({_place(table)})")
    if not np.isfinite(rows["value"]).all():
        bad = rows.loc[~np.isfinite(rows["value"]), "method"].iloc[0]
        raise ValueError(f"the metric {metric!r} of the method {bad!r} is not a finite number ({_place(table)})")
    wide = rows.pivot_table(index=over, columns="method", values="value").dropna()
    if wide.empty:
        raise ValueError(f"no {over} has the metric {metric!r} of all of {list(methods)} ({_place(table)})")
    return wide


def who_missed(table: pd.DataFrame, methods: Sequence[str], over: str = "seed") -> pd.DataFrame:
    """Who missed the target: a row a seed (or model), a column a method.

    By its metric ``reached``; a method that was not matched has none, and has missed if its forget loss says so.
    """
    columns = {}
    for method in methods:
        if ((table["method"] == method) & (table["metric"] == "reached")).any():
            columns[method] = side_by_side(table, "reached", [method], over)[method] < 1
        else:
            forget = side_by_side(table, "forget_loss", [method, "retrained"], over)
            columns[method] = (forget[method] - forget["retrained"]).abs() > SAME
    return pd.concat(columns, axis=1, join="inner")


def way_made(table: pd.DataFrame, method: str, over: str) -> pd.Series:
    """How much of the way from the original's forget loss to the retrained model's a method has made, by seed."""
    forget = side_by_side(table, "forget_loss", [method, "original", "retrained"], over)
    return (forget[method] - forget["original"]) / (forget["retrained"] - forget["original"])


def misses_in_words(missed: pd.DataFrame) -> str:
    """What :func:`who_missed` found, for a note; nothing if none missed."""
    return "; ".join(
        f"{method_label(name)} missed its target in {n} of {len(missed)}" for name, n in missed.sum().items() if n
    )


def what_is_lacking(
    table: pd.DataFrame, methods: Iterable[str], metrics: Sequence[str], chosen_in: pd.DataFrame | None = None
) -> str:
    """What is missing for a test, in words; nothing if it can be made.

    Rows of a method, or the sign in ``chosen_in`` (the table itself) that its settings were chosen by the rule.
    """
    chosen = table if chosen_in is None else chosen_in
    chosen = set(chosen.loc[chosen["metric"] == "settings_tried", "method"])
    missing = []
    for method in methods:
        measured = set(table.loc[table["method"] == method, "metric"])
        if not measured.issuperset(metrics):
            missing.append(f"{method_label(method)} was not run")
        elif method not in WITHOUT_KNOBS and SETTINGS_OF.get(method, method) not in chosen:
            missing.append(f"{method_label(method)} was not tuned by the rule")
    return "; ".join(missing)


def setting_of(table: pd.DataFrame, name: str) -> pd.Series:
    """The column of a setting. Raises ValueError naming a column that is not there."""
    if name not in table:
        raise ValueError(f"the results lack the column {name!r} ({_place(table)})")
    return table[name]


def names_of(table: pd.DataFrame, column: str) -> str:
    """The different values of a column, in words."""
    return ", ".join(table[column].unique())


def _place(table: pd.DataFrame) -> str:
    return f"corpus {names_of(table, 'corpus')}" if len(table) else "no rows"
