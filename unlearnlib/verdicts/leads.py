"""Which of two families of methods is better at matched forgetting, by which measures, and may it be chance?"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from unlearnlib.verdicts.results import above_retrained, interval

# Damage on holdout has a sign: the less, the better. The others are distances, whichever side they are on.
MEASURES = {
    "holdout loss": "holdout_loss",
    "retain loss": "retain_loss",
    "AUC": "membership_auc_calibrated",
    "relearned": "relearned_net_nats",
}


class Lead(NamedTuple):
    """How far the second family is ahead of the first on a measure.

    ``bests`` are the names of the two families' best methods over all seeds, ``values`` the lead on each seed, and
    ``chance`` what a second retrained model does, on average over the seeds.
    """

    bests: tuple[str, str]
    values: pd.Series
    chance: float

    @property
    def winner(self) -> str:
        """``first``, ``second`` or ``neither``.

        A lead counts if its mean is larger than chance and its 95 % interval leaves out zero. There is no interval
        of fewer than three seeds (:func:`unlearnlib.verdicts.interval`), so that no lead counts there.
        """
        low, high = interval(self.values)
        mean = self.values.mean()
        if abs(mean) > self.chance and (low > 0 or high < 0):
            return "second" if mean > 0 else "first"
        return "neither"


def distances(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """How far each model is from the retrained model of its seed, by measure: a row a seed, a column a method.

    Holdout loss, in nats, has a sign; retain loss and what relearning brings back, in nats, and the AUC of the
    calibrated attack have none.
    """
    found = {measure: above_retrained(table, metric) for measure, metric in MEASURES.items()}
    return {measure: rows if measure == "holdout loss" else rows.abs() for measure, rows in found.items()}


def lead(rows: pd.DataFrame, first: Sequence[str], second: Sequence[str]) -> Lead:
    """The lead of the best of the ``second`` methods over the best of the ``first``, in ``rows`` of a measure.

    For each seed both are named by the means over the *other* seeds, so that a method does not owe its lead to the
    luck on the seed where it is measured; with a single seed, by that one. In ``rows``, as :func:`distances` makes
    them, less is better, and the column ``retrained:again`` is the second retrained model's.
    """
    values = {}
    for seed in rows.index:
        others = rows.drop(seed) if len(rows) > 1 else rows
        one, two = (others[list(names)].mean().idxmin() for names in (first, second))
        values[seed] = rows.loc[seed, one] - rows.loc[seed, two]
    bests = tuple(rows[list(names)].mean().idxmin() for names in (first, second))
    return Lead(bests, pd.Series(values), rows["retrained:again"].abs().mean())
