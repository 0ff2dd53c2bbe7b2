"""A verdict on each claim of the paper, computed from tables of results by rules that were fixed in advance.

Each claim has a function that takes its exhibits' tables, as :func:`unlearnlib.results.read_results` returns them
(or None, where an exhibit has not been run), and makes a row a test. An *effect* is always "method minus against".
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from unlearnlib.results import method_label, read_results
from unlearnlib.verdicts import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Rule, above, below, judge, not_run

PAPERS_OWN, OURS = "fisher_recursion", "kfac"  # the first decides a claim, the second is shown beside it
FIRST_ORDER = ("gradient_ascent", "gradient_difference", "npo")
CORPORA = ("reuters", "tales", "socialiqa", "maths")
TUNED_ON = "reuters"


def all_tests(folder: str | Path) -> pd.DataFrame:
    """Every test of the seven claims, from the tables of results in ``folder``.

    Returns the columns ``claim, exhibit, corpus, model, method, against``; the effect's ``mean`` with its paired
    bootstrap interval ``low, high`` in ``unit`` over ``pairs`` seeds (or models), and on how many of these it lies
    where the claim holds (``agree``); Student's interval ``t_low, t_high``; the verdict by either (``verdict``,
    ``t_verdict``); whether the claim rests on this test (``decides``); the rule (``holds_from, holds_to``); and a
    ``note``.
    Raises ValueError naming a method, metric or setting that a table lacks.
    """

    def read(exhibit: str) -> pd.DataFrame | None:
        try:
            return read_results(folder, exhibit)
        except FileNotFoundError:
            return None

    four, secrets = read("four_datasets"), read("case_secrets")
    claims = [
        c1(four),
        c2(secrets, read("case_passages")),
        c3(four),
        c4(read("architectures"), read("real_model")),
        c5(read("repeated_requests")),
        c6(secrets),
        c7(read("dp_sgd")),
    ]
    return pd.concat(claims, ignore_index=True)


def c1(table: pd.DataFrame | None, corpora: Sequence[str] = CORPORA, limit: float = 0.0) -> pd.DataFrame:
    """C1: at equal forgetting second order has a lower holdout loss than each first-order method, on every corpus.

    By ``limit`` nats or more, if it is negative.
    """
    return pd.DataFrame(_second_against_first("C1", "four_datasets", table, corpora, limit))


def c2(secrets: pd.DataFrame | None, passages: pd.DataFrame | None) -> pd.DataFrame:
    """C2: the same on the two cases of memorisation. Secrets have the whole set's metrics at ``repeats`` 0."""
    if secrets is not None:
        secrets = secrets[_setting(secrets, "repeats") == 0]
    rows = []
    for exhibit, table in (("case_secrets", secrets), ("case_passages", passages)):
        corpora = ["–"] if table is None else table["corpus"].unique()
        rows += _second_against_first("C2", exhibit, table, corpora)
    return pd.DataFrame(rows)


def c3(table: pd.DataFrame | None) -> pd.DataFrame:
    """C3: the tests of C1 on the corpora on which no setting was chosen."""
    untouched = [corpus for corpus in CORPORA if corpus != TUNED_ON]
    return pd.DataFrame(_second_against_first("C3", "four_datasets", table, untouched))


def c4(architectures: pd.DataFrame | None, real_model: pd.DataFrame | None = None) -> pd.DataFrame:
    """C4: K-FAC costs less holdout loss than ascent, over the models and in each; beside it, a pretrained model.

    The pairs are models, not seeds. An interval below zero is not enough: the effect has to be in every model.
    """
    methods = {"method": OURS, "against": "gradient_ascent"}
    if architectures is None:
        rows = [not_run("C4", "architectures", **methods)]
    else:
        rows = []
        groups = {"all models": architectures} | dict(list(architectures.groupby("architecture")))
        for name, found in groups.items():
            labels = {"exhibit": "architectures", "corpus": _names(found, "corpus"), "model": name}
            decides = name == "all models"
            rows.append(at_equal_forgetting("C4", found, **methods, over="model", decides=decides, **labels))
    if real_model is None:
        rows.append(not_run("C4", "real_model", decides=False, **methods))
    else:
        labels = {"exhibit": "real_model", "corpus": _names(real_model, "corpus")}
        labels |= {"model": _names(real_model, "model"), "decides": False}
        rows.append(at_equal_forgetting("C4", real_model, **methods, **labels))
    return pd.DataFrame(rows)


def c5(table: pd.DataFrame | None) -> pd.DataFrame:
    """C5: Fisher Forgetting keeps utility: after the last request its holdout loss is low enough.

    That is (a) below that of Fisher Removal with K-FAC, and (b) above the retrained model's by less than a quarter
    of what ascent is above it. Noise alone is shown beside it.
    """
    if table is None:
        return pd.DataFrame([not_run("C5", "repeated_requests", method="fisher_forgetting")])
    readings = ("fisher_forgetting", "fisher_forgetting:noise")
    request = _setting(table, "request")
    last = table[request == request.max()]
    loss = _wide(last, "holdout_loss", [*readings, OURS, "gradient_ascent", "retrained"])
    excess = loss.sub(loss["retrained"], axis=0)
    labels = {"claim": "C5", "exhibit": "repeated_requests", "unit": "nats"}
    labels |= {"corpus": _names(table, "corpus"), "model": _names(table, "model")}
    rows = []
    for reading in readings:
        for against, limit in ((OURS, excess[OURS]), ("¼ gradient_ascent", excess["gradient_ascent"] / 4)):
            effect = excess[reading] - limit
            decides = reading == readings[0]
            rows.append(judge(effect, below(), decides=decides, method=reading, against=against, **labels))
    return pd.DataFrame(rows)


def c6(table: pd.DataFrame | None, bits: float = 1.0) -> pd.DataFrame:
    """C6: the secrets' mean exposure after Fisher Removal is within ``bits`` of the retrained model's.

    The mean is over the planted secrets, the rows with ``repeats`` above 0.
    """
    if table is None:
        return pd.DataFrame([not_run("C6", "case_secrets", method=PAPERS_OWN, against="retrained", unit="bits")])
    repeats = _setting(table, "repeats")
    methods = [PAPERS_OWN, OURS]
    exposure = _wide(table[repeats > 0], "exposure_bits", ["original", "retrained", *methods])
    missed = _wide(table[repeats == 0], "reached", methods) < 1
    before = (exposure["original"] - exposure["retrained"]).mean()
    rows = []
    for method in methods:
        effect = exposure[method] - exposure["retrained"]
        row = judge(
            effect,
            Rule((-bits, bits), (bits, math.inf)),
            allowed=() if missed[method].any() else (REPRODUCED, NOT_REPRODUCED),
            decides=method == PAPERS_OWN,
            claim="C6",
            exhibit="case_secrets",
            corpus=_names(table, "corpus"),
            model=_names(table, "model"),
            method=method,
            against="retrained",
            unit="bits",
            note=f"before: {before:+.1f} bits{_misses(missed[[method]])}",
        )
        rows.append(row)
    return pd.DataFrame(rows)


def c7(table: pd.DataFrame | None) -> pd.DataFrame:
    """C7: private training that leaves nothing to unlearn has a higher price than unlearning with K-FAC.

    Nothing to unlearn is left if what is memorised of the forget set is at most a fifth of the original's, in the
    mean over the seeds. Every such ``epsilon`` of the table must cost more, on every corpus; if there is none
    the claim holds there as well. Infinite ``epsilon``, no privacy, does not count.
    """
    if table is None:
        return pd.DataFrame([not_run("C7", "dp_sgd", method="dp_sgd", against=OURS)])
    finite = np.isfinite(_setting(table, "epsilon"))
    private = table.loc[finite, ["method", "epsilon"]].drop_duplicates().sort_values("epsilon")["method"].tolist()
    if not private:
        raise ValueError("the table has no method with a finite epsilon: C7 needs the rows of DP-SGD")
    rows = []
    for corpus, found in table.groupby("corpus", sort=False):
        memorised = _wide(found, "memorised_nats", ["original", *private])
        price = _wide(found, "price_nats", [OURS, *private])
        labels = {"claim": "C7", "exhibit": "dp_sgd", "corpus": corpus, "model": _names(found, "model")}
        labels |= {"against": OURS, "unit": "nats"}
        free = [method for method in private if memorised[method].mean() <= memorised["original"].mean() / 5]
        for method in free:
            rows.append(judge(price[method] - price[OURS], above(), method=method, **labels))
        if not free:
            outcome = REPRODUCED if len(memorised) > 1 else INCONCLUSIVE
            row = judge(pd.Series(dtype=float), above(), method="dp_sgd", **labels)
            row |= {"pairs": len(memorised), "verdict": outcome, "t_verdict": outcome}
            rows.append(row | {"note": "no ε leaves nothing to unlearn"})
    return pd.DataFrame(rows)


def _second_against_first(
    claim: str, exhibit: str, table: pd.DataFrame | None, corpora: Sequence[str], limit: float = 0.0
) -> list[dict]:
    rows = []
    for corpus in corpora:
        found = None if table is None else table[table["corpus"] == corpus]
        if found is None or found.empty:
            rows.append(not_run(claim, exhibit, corpus=corpus, method=PAPERS_OWN, against="first order"))
            continue
        for method in (PAPERS_OWN, OURS):
            for against in FIRST_ORDER:
                labels = {"exhibit": exhibit, "corpus": corpus, "model": _names(found, "model")}
                labels |= {"decides": method == PAPERS_OWN}
                rows.append(at_equal_forgetting(claim, found, method, against, limit, **labels))
    return rows


def at_equal_forgetting(
    claim: str,
    table: pd.DataFrame,
    method: str,
    against: str,
    limit: float = 0.0,
    over: str = "seed",
    **labels: object,
) -> dict:
    """The test that ``method`` has a lower holdout loss than ``against``, both brought to the target forget loss.

    Where ``method`` missed its target nothing is concluded. Where ``against`` did, it is taken where it ended. If
    it had forgotten too little there, it had not yet done all its harm: that ``method`` does less still counts,
    that it does more does not. If it had forgotten too much, neither counts. Over models, the effect must be in
    each of them.
    """
    pair = [method, against]
    loss = _wide(table, "holdout_loss", pair, over)
    effect = loss[method] - loss[against]
    missed = _wide(table, "reached", pair, over) < 1
    allowed = [REPRODUCED, NOT_REPRODUCED]
    if missed[method].any():
        allowed = []
    elif missed[against].any():
        forget = _wide(table, "forget_loss", [against, "retrained"], over)[missed[against]]
        allowed = [REPRODUCED] if (forget[against] < forget["retrained"]).all() else []
    if over == "model" and (effect >= limit).any():
        allowed = [outcome for outcome in allowed if outcome != REPRODUCED]
    return judge(
        effect,
        below(limit),
        allowed,
        claim=claim,
        method=method,
        against=against,
        unit="nats",
        note=_misses(missed).removeprefix("; "),
        **labels,
    )


def _wide(table: pd.DataFrame, metric: str, methods: Sequence[str], over: str = "seed") -> pd.DataFrame:
    """The values of a metric: a column a method, a row for each seed (or model) that all of ``methods`` have.

    Where a metric was measured at several settings, their mean.
    """
    for column in {"corpus", "model"} - {over}:
        if table[column].nunique() > 1:
            raise ValueError(f"the results mix several of the column {column!r} ({_names(table, column)})")
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


def _setting(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table:
        raise ValueError(f"the results lack the column {name!r} ({_place(table)})")
    return table[name]


def _names(table: pd.DataFrame, column: str) -> str:
    return ", ".join(table[column].unique())


def _place(table: pd.DataFrame) -> str:
    return f"corpus {_names(table, 'corpus')}" if len(table) else "no rows"


def _misses(missed: pd.DataFrame) -> str:
    found = [
        f"{method_label(name)} missed its target in {n} of {len(missed)}" for name, n in missed.sum().items() if n
    ]
    return "".join(f"; {text}" for text in found)
