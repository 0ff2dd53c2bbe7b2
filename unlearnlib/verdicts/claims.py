"""A verdict on each claim of the paper, computed from tables of results by fixed rules.

Each claim has a function that takes its exhibits' tables, as ``read_results`` returns them
(or None, where an exhibit has not been run), and makes a row a test. An *effect* is always "method minus against".

C1 to C7 are what the paper's abstract or a summary of the paper says. Where the book asks for more than that, the
question is a claim of its own, "C6 own" and "C7 own", with a verdict of its own.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from unlearnlib.verdicts.results import method_label, read_results
from unlearnlib.verdicts.rules import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    Rule,
    above,
    below,
    combine,
    judge,
    not_run,
    weakest,
)

PAPERS_OWN, OURS = "fisher_recursion", "kfac"  # the first decides a claim, the second is shown beside it
FIRST_ORDER = ("gradient_ascent", "gradient_difference", "npo")
PAPERS_OPPONENT = "gradient_ascent"  # in the paper batch by batch, here in one step; the other two are the book's
CORPORA = ("reuters", "tales", "socialiqa", "maths")
TUNED_ON = "reuters"


def all_tests(folder: str | Path) -> pd.DataFrame:
    """Every test of the seven claims and of the book's own questions, from the tables of results in ``folder``.

    Returns the columns ``claim, exhibit, corpus, model, method, against``; the effect's ``mean`` with its paired
    interval ``low, high`` in ``unit`` over ``pairs`` seeds (or models), and on how many of these it lies where the
    claim holds (``agree``); the ``verdict``; whether the claim rests on this test (``decides``), and whether it needs all of those or one
    (``every``); the rule (``holds_from, holds_to``); and a ``note``.
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


def c5(table: pd.DataFrame | None, fraction: float = 0.25) -> pd.DataFrame:
    """C5: Fisher Forgetting keeps utility: after the last request its holdout loss is low enough.

    That is (a) below that of Fisher Removal with K-FAC, and (b) above the retrained model's by less than a
    ``fraction`` of what ascent is above it. The fraction is the book's own. Shown beside it are noise alone, and
    both algorithms against gradient difference. All are over K-FAC, and not over the paper's recursion.
    """
    if table is None:
        return pd.DataFrame([not_run("C5", "repeated_requests", method="fisher_forgetting")])
    readings = ("fisher_forgetting", "noise")
    first_order = ("gradient_ascent", "gradient_difference")
    request = _setting(table, "request")
    last = table[request == request.max()]
    loss = _wide(last, "holdout_loss", [*readings, OURS, *first_order, "retrained"])
    excess = loss.sub(loss["retrained"], axis=0)
    labels = {"claim": "C5", "exhibit": "repeated_requests", "unit": "nats"}
    labels |= {"corpus": _names(table, "corpus"), "model": _names(table, "model")}
    share = "¼" if fraction == 0.25 else f"{fraction:g}"
    rows = []
    for reading in readings:
        limits = {OURS: excess[OURS], f"{share} gradient_ascent": excess["gradient_ascent"] * fraction}
        for against, limit in limits.items():
            effect = excess[reading] - limit
            decides = reading == readings[0]
            rows.append(judge(effect, below(), decides=decides, method=reading, against=against, **labels))
    for method in (readings[0], OURS):
        effect = excess[method] - excess["gradient_difference"]
        rows.append(judge(effect, below(), decides=False, method=method, against="gradient_difference", **labels))
    return pd.DataFrame(rows)


def c6(table: pd.DataFrame | None, bits: float = 1.0) -> pd.DataFrame:
    """C6: after Fisher Removal the secrets' mean exposure is lower than before, and lower than after ascent.

    The mean is over the planted secrets, the rows with ``repeats`` above 0. The book's own opponents are shown
    beside it. "C6 own" asks whether the exposure is within ``bits`` of the retrained model's, and shows the
    first-order methods beside it.
    """
    if table is None:
        missing = [not_run("C6", "case_secrets", method=PAPERS_OWN, against=PAPERS_OPPONENT, unit="bits")]
        missing.append(not_run("C6 own", "case_secrets", method=PAPERS_OWN, against="retrained", unit="bits"))
        return pd.DataFrame(missing)
    repeats = _setting(table, "repeats")
    methods = [PAPERS_OWN, OURS, *FIRST_ORDER]
    exposure = _wide(table[repeats > 0], "exposure_bits", ["original", "retrained", *methods])
    missed = _wide(table[repeats == 0], "reached", methods) < 1
    labels = {"exhibit": "case_secrets", "unit": "bits"}
    labels |= {"corpus": _names(table, "corpus"), "model": _names(table, "model")}
    before = f"before unlearning the excess was {(exposure['original'] - exposure['retrained']).mean():+.1f} bits"

    def test(claim: str, method: str, against: str, rule: Rule, decides: bool, note: str = "") -> dict:
        """A method that stopped short, or went too far, is more or less exposed for it: then nothing follows."""
        off = missed[[name for name in (method, against) if name in missed]]
        return judge(
            exposure[method] - exposure[against],
            rule,
            allowed=() if off.any(axis=None) else (REPRODUCED, NOT_REPRODUCED),
            decides=decides and method == PAPERS_OWN,
            claim=claim,
            method=method,
            against=against,
            note=(note + _misses(off)).removeprefix("; "),
            **labels,
        )

    near = Rule((-bits, bits), (bits, math.inf))
    rows = [
        test("C6", method, against, below(), decides=against in ("original", PAPERS_OPPONENT))
        for method in (PAPERS_OWN, OURS)
        for against in ("original", *FIRST_ORDER)
    ]
    rows += [test("C6 own", method, "retrained", near, decides=True, note=before) for method in methods]
    return pd.DataFrame(rows)


def c7(table: pd.DataFrame | None) -> pd.DataFrame:
    """C7: on some corpus, private training that leaves nothing to unlearn costs more than unlearning with K-FAC.

    Nothing to unlearn is left if what is memorised of the forget set is at most a fifth of the original's, in the
    mean over the seeds. Every such ``epsilon`` of the table must cost more; if there is none, the claim holds on
    that corpus as well. Infinite ``epsilon``, no privacy, does not count. The weakest test of a corpus stands for
    all of it. "C7 own" asks whether it is so on every corpus, and has a row for each ``epsilon``.
    """
    if table is None:
        labels = {"method": "dp_sgd", "against": OURS}
        return pd.DataFrame([not_run(claim, "dp_sgd", **labels) for claim in ("C7", "C7 own")])
    finite = np.isfinite(_setting(table, "epsilon"))
    private = table.loc[finite, ["method", "epsilon"]].drop_duplicates().sort_values("epsilon")["method"].tolist()
    if not private:
        raise ValueError("the table has no method with a finite epsilon: C7 needs the rows of DP-SGD")
    somewhere, everywhere = [], []
    for corpus, found in table.groupby("corpus", sort=False):
        memorised = _wide(found, "memorised_nats", ["original", *private])
        price = _wide(found, "price_nats", [OURS, *private])
        labels = {"claim": "C7 own", "exhibit": "dp_sgd", "corpus": corpus, "model": _names(found, "model")}
        labels |= {"against": OURS, "unit": "nats"}
        free = [method for method in private if memorised[method].mean() <= memorised["original"].mean() / 5]
        rows = [judge(price[method] - price[OURS], above(), method=method, **labels) for method in free]
        if not free:
            outcome = REPRODUCED if len(memorised) > 1 else INCONCLUSIVE
            row = judge(pd.Series(dtype=float), above(), method="dp_sgd", **labels)
            row |= {"pairs": len(memorised), "verdict": outcome}
            rows.append(row | {"note": "no ε leaves nothing to unlearn"})
        everywhere += rows
        tests = pd.DataFrame(rows)
        here = {"verdict": combine(tests["verdict"]), "claim": "C7", "every": False}
        somewhere.append(weakest(tests).to_dict() | here)
    return pd.DataFrame(somewhere + everywhere)


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
