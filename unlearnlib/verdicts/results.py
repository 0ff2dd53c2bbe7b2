"""Results as tidy tables, one row a measurement, and what may be concluded from them."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown
from pandas.api.typing import SeriesGroupBy
from scipy import stats

from unlearnlib import cache

COLUMNS = ["exhibit", "corpus", "model", "method", "seed", "metric", "value"]

REFERENCE = Path(__file__).resolve().parents[2] / "book" / "results"
"""The committed results, one file an exhibit, of a run of the profile :data:`REFERENCE_PROFILE`."""

REFERENCE_PROFILE = "cpu"


def write_results(table: pd.DataFrame, folder: str | Path, exhibit: str) -> Path:
    """Write ``table`` as ``folder/exhibit.csv``, atomically, sorted, to nine significant digits.

    ``table`` has every column of ``COLUMNS`` but ``exhibit``, and may have more (settings).
    Raises ValueError naming what is missing, or a row measured twice (also if two settings differ only beyond the
    digits that are written).
    """
    missing = set(COLUMNS[1:]) - set(table.columns)
    if missing:
        raise ValueError(f"the results of {exhibit} lack the column(s) {sorted(missing)}")
    table = table.assign(exhibit=exhibit).infer_objects()  # in a column of objects pandas writes every digit
    settings = [column for column in table.columns if column not in COLUMNS]
    keys = [*COLUMNS[:-1], *settings]
    written = table[keys].map(lambda value: f"{value:.9g}" if isinstance(value, float) else value)
    twice = written.duplicated()
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
    if Path(folder) == REFERENCE:
        _check_reference()
    if not path.exists():
        raise FileNotFoundError(f"no results {path}: run the chapter that makes the exhibit {exhibit!r} first")
    return pd.read_csv(path, dtype={"corpus": str, "model": str, "method": str, "metric": str})


def _check_reference() -> None:
    """Raise FileNotFoundError in a copy of the library that was installed without the book beside it."""
    if not REFERENCE.is_dir():
        raise FileNotFoundError(
            f"the reference results are not here, at {REFERENCE}: they come with the book, not with the installed "
            "package. Clone the book's repository and use the library from there (pip install --editable)"
        )


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean (Student 1908), exact for independent normal values.

    Give paired differences to get a paired interval. With fewer than three values both ends are NaN: of two, the
    interval is so wide, 12.7 standard errors to either side, that it says nothing.
    """
    values = np.asarray(list(values), dtype=float)
    if len(values) < 3:
        return math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def summarise(table: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """Mean, 95 % interval and number of seeds of every method and metric.

    With ``against`` a method's name, of the differences to that method, paired by seed, for the metrics that
    method has. Returns columns
    ``mean, low, high, seeds`` indexed by method and metric, methods and metrics in order of first appearance.
    """
    wide = table.pivot_table(index="seed", columns=["method", "metric"], values="value", sort=False)
    summary = {}
    for method, metric in wide.columns:
        values = wide[method, metric]
        if against is not None:
            if (against, metric) not in wide:
                continue
            values = values - wide[against, metric]
        values = values.dropna()
        low, high = interval(values)
        summary[method, metric] = {"mean": values.mean(), "low": low, "high": high, "seeds": len(values)}
    frame = pd.DataFrame.from_dict(summary, orient="index")
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["method", "metric"])
    return frame


def above_retrained(table: pd.DataFrame, metric: str, by_corpus: bool | None = None) -> pd.DataFrame:
    """A metric minus that of the retrained model, paired: a row a seed, a column a method.

    The rows are of corpus and seed where ``by_corpus`` says so, or if it says nothing where ``table`` has several
    corpora. Methods are in order of first appearance.
    """
    if by_corpus is None:
        by_corpus = table["corpus"].nunique() > 1
    rows = table[table["metric"] == metric]
    index = ["corpus", "seed"] if by_corpus else "seed"
    values = rows.pivot_table(index=index, columns="method", values="value", sort=False)
    return values.sub(values["retrained"], axis=0)


def agreement(rerun: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Does a rerun of an exhibit agree with its reference? A row for each mean over the seeds of the reference.

    Returns columns ``rerun`` and ``reference`` (the means), ``low`` and ``high`` (the 95 % interval of the
    reference, :func:`interval`) and ``agrees``: the rerun's mean lies in the interval, give or take one
    millionth for rounding. What the reference has of one or two seeds has no interval and is left out; what the
    rerun lacks, rows or columns, does not agree. Indexed by all columns but seed and value.
    """
    settings = [column for column in reference.columns if column not in ("exhibit", "seed", "value")]

    def grouped(table: pd.DataFrame) -> SeriesGroupBy:
        # As text, in which a setting that is missing equals another that is missing.
        return table["value"].groupby([table[column].map(str) for column in settings], sort=False)

    again, rows = grouped(rerun.reindex(columns=reference.columns)).mean(), []
    for key, values in grouped(reference):
        if len(values) > 2:
            low, high = interval(values)
            slack = 1e-6 * max(abs(low), abs(high))
            mean = again.get(key, float("nan"))
            rows.append([*key, mean, values.mean(), low, high, low - slack <= mean <= high + slack])
    frame = pd.DataFrame(rows, columns=[*settings, "rerun", "reference", "low", "high", "agrees"])
    return frame.set_index(settings).astype({"agrees": bool})


def compare_with_reference(profile: str, folder: str | Path, *exhibits: str) -> Markdown:
    """Check the results in ``folder`` against the committed ones, and say the outcome in a sentence an exhibit.

    Another profile than the reference's has other sizes and is not compared.
    """
    if profile != REFERENCE_PROFILE:
        return Markdown(
            f"*The reference results in `book/results` are those of the profile `{REFERENCE_PROFILE}`. "
            f"This run is of the profile `{profile}` and is not compared with them.*"
        )
    sentences = [_comparison(folder, exhibit)[0] for exhibit in exhibits]
    return Markdown(f"*Compared with the reference results in `book/results`. {' '.join(sentences)}*")


def disagreements(folder: str | Path) -> list[str]:
    """A sentence for each exhibit in ``folder`` of which less than nine tenths of the means agree.

    See :func:`agreement`. Exhibits that have not been run are passed over.
    """
    _check_reference()
    exhibits = [path.stem for path in sorted(REFERENCE.glob("*.csv")) if (Path(folder) / path.name).exists()]
    compared = [_comparison(folder, exhibit) for exhibit in exhibits]
    return [sentence for sentence, agrees in compared if not agrees]


def _comparison(folder: str | Path, exhibit: str) -> tuple[str, bool]:
    """What there is to say of an exhibit beside its reference, and whether that is good."""
    _check_reference()
    if not (REFERENCE / f"{exhibit}.csv").exists():
        return f"`{exhibit}` has no reference results yet.", True
    found = agreement(read_results(folder, exhibit), read_results(REFERENCE, exhibit))
    if found.empty:
        return f"`{exhibit}` is of one or two seeds, which have no interval to compare with.", True
    agreeing = (
        f"`{exhibit}`: {found['agrees'].sum()} of {len(found)} means lie in the 95 % intervals of the reference."
    )
    if found["agrees"].mean() >= 0.9:
        return agreeing, True
    first = found[~found["agrees"]].iloc[0]
    worst = (
        f"{' '.join(map(str, first.name))}: {first['rerun']:.3g}, not in {first['low']:.3g} to {first['high']:.3g}"
    )
    return f"{agreeing} It does not agree; the first that lies outside is {worst}.", False


def mean_text(values: Iterable[float], digits: int = 2) -> str:
    """Write a mean and its 95 % interval, as in ``4.56 [4.51, 4.60]``; of one or two values, the mean alone."""
    values = np.asarray(list(values), dtype=float)
    return _text(values.mean(), *interval(values), digits)


def format_table(summary: pd.DataFrame, metrics: dict[str, str], digits: int = 2) -> pd.DataFrame:
    """Lay a ``summarise`` table out for reading: a row a method, a column a metric, "mean [low, high]" inside.

    ``metrics`` maps each metric to its column heading. A cell that was not measured shows a dash. Over how many
    seeds the means are is in the corner of the table, or where cells differ in a last column ``n``.
    """
    methods = list(dict.fromkeys(summary.index.get_level_values("method")))
    wide = pd.DataFrame("–", index=methods, columns=list(metrics))
    shown = summary[summary.index.get_level_values(1).isin(metrics)]
    for (method, metric), row in shown.iterrows():
        wide.loc[method, metric] = _text(row["mean"], row["low"], row["high"], digits)
    wide = wide.rename(columns=metrics)
    counts = shown["seeds"].groupby(level="method", sort=False).unique()
    if len(set().union(*counts)) == 1:
        wide.columns.name = f"n = {shown['seeds'].iloc[0]:.0f}"
    else:
        wide["n"] = [" or ".join(f"{n:.0f}" for n in sorted(counts.get(method, []))) for method in methods]
    wide.index = pd.Index(map(method_label, methods))
    return wide


def number_text(value: float, digits: int = 2, sign: bool = False) -> str:
    """Write a number to so many digits, with a plus if it is to have a ``sign``; what rounds to -0.00 is 0.00."""
    return f"{round(float(value), digits) + 0.0:{'+' * sign}.{digits}f}"


def _text(mean: float, low: float, high: float, digits: int) -> str:
    mean, low, high = (number_text(value, digits) for value in (mean, low, high))
    return mean if low == "nan" else f"{mean} [{low}, {high}]"


def method_label(method: str) -> str:
    """A method's name for people: ``gradient_ascent:adam`` becomes ``gradient ascent (adam)``."""
    if method == "newton_cg:natural":  # solved in a space that conjugate gradients would search in, not by them
        return "Newton (natural)"
    name, _, variant = method.partition(":")
    return ACRONYMS.get(name, name.replace("_", " ")) + (f" ({variant.replace('_', ' ')})" if variant else "")


ACRONYMS = {
    "kfac": "K-FAC",
    "ekfac": "EK-FAC",
    "newton_cg": "Newton-CG",
    "newton_descent": "Newton by descent",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "rmu": "RMU",
    "soul": "SOUL",
    "dp_sgd": "DP-SGD",
}
