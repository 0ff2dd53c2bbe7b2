"""Results as tidy tables, one row a measurement, and what may be concluded from them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from unlearnlib import cache

COLUMNS = ["exhibit", "corpus", "model", "method", "seed", "metric", "value"]


def write_results(table: pd.DataFrame, folder: str | Path, exhibit: str) -> Path:
    """Write ``table`` as ``folder/exhibit.csv``, atomically, sorted, to nine significant digits.

    ``table`` has every column of ``COLUMNS`` but ``exhibit``, and may have more (settings).
    Raises ValueError naming what is missing, or a row measured twice.
    """
    missing = set(COLUMNS[1:]) - set(table.columns)
    if missing:
        raise ValueError(f"the results of {exhibit} lack the column(s) {sorted(missing)}")
    table = table.assign(exhibit=exhibit)
    settings = [column for column in table.columns if column not in COLUMNS]
    keys = [*COLUMNS[:-1], *settings]
    twice = table.duplicated(keys)
    if twice.any():
        raise ValueError(f"the results of {exhibit} hold a row twice: {table.loc[twice, keys].iloc[0].to_dict()}")
    table = table[[*COLUMNS, *settings]].sort_values(keys, kind="stable")
    path = Path(folder) / f"{exhibit}.csv"
    with cache.atomic_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")
    return path


def read_results(folder: str | Path, exhibit: str) -> pd.DataFrame:
    """Read ``folder/exhibit.csv`` back. Raises FileNotFoundError if the exhibit has not been run."""
    path = Path(folder) / f"{exhibit}.csv"
    if not path.exists():
        raise FileNotFoundError(f"no results {path}: run the chapter that makes the exhibit {exhibit!r} first")
    return pd.read_csv(path, dtype={"corpus": str, "model": str, "method": str, "metric": str})


def bootstrap_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron & Tibshirani 1993), from 10,000 resamples.

    Give paired differences to get a paired interval. The same values always give the same interval. With fewer
    than two values nothing is known of their spread: both ends are NaN.
    """
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    seed = int.from_bytes(hashlib.sha256(values.tobytes()).digest()[:4], "big")
    interval = stats.bootstrap(
        (values,), np.mean, confidence_level=level, method="percentile", n_resamples=10_000, rng=seed
    ).confidence_interval
    return float(interval.low), float(interval.high)


def summarise(table: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Mean, 95 % interval and number of seeds of every method and metric.

    With ``against`` a method's name, of the differences to that method, paired by seed. Returns columns
    ``mean, low, high, seeds`` indexed by method and metric, methods and metrics in order of first appearance.
    """
    wide = table.pivot_table(index="seed", columns=["method", "metric"], values="value", sort=False)
    summary = {}
    for method, metric in wide.columns:
        values = wide[method, metric]
        if against is not None:
            values = values - wide[against, metric]
        values = values.dropna()
        low, high = bootstrap_interval(values)
        summary[method, metric] = {"mean": values.mean(), "low": low, "high": high, "seeds": len(values)}
    frame = pd.DataFrame.from_dict(summary, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["method", "metric"])
    return frame


def format_table(summary: pd.DataFrame, metrics: dict[str, str], digits: int = 2) -> pd.DataFrame:
    """Lay a ``summarise`` table out for reading: a row a method, a column a metric, "mean [low, high]" in each cell.

    ``metrics`` maps each metric to its column heading. A cell that was not measured shows a dash.
    """

    def cell(row: pd.Series) -> str:
        interval = "" if np.isnan(row["low"]) else f" [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
        return f"{row['mean']:.{digits}f}{interval}"

    cells = summary[summary.index.isin(metrics, level="metric")].apply(cell, axis=1)
    wide = cells.unstack("metric", sort=False).reindex(columns=list(metrics)).fillna("–")
    wide.index = pd.Index([method_label(method) for method in wide.index], name="method")
    wide.columns = [metrics[metric] for metric in wide.columns]
    return wide


def method_label(method: str) -> str:
    """A method's name for people: ``gradient_ascent:adam`` becomes ``gradient ascent (adam)``."""
    name, _, variant = method.partition(":")
    return name.replace("_", " ") + (f" ({variant})" if variant else "")


def agreement(table: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Compare the means of a rerun with the intervals of the reference results.

    Returns the reference's summary with the rerun's mean in ``rerun`` and whether it lies in the reference's 95 %
    interval, widened by its rounding, in ``agrees``; only methods and metrics that both have.
    """
    both = summarise(reference).join(summarise(table)["mean"].rename("rerun"), how="inner")
    rounding = 1e-8 * both["mean"].abs()
    agrees = (both["rerun"] >= both["low"] - rounding) & (both["rerun"] <= both["high"] + rounding)
    return both.assign(agrees=agrees)
