"""A verdict on each claim of the paper, computed from tables of results by fixed rules.

Each claim has a function that takes its exhibits' tables, as ``read_results`` returns them
(or None, where an exhibit has not been run), and makes a row a test. An *effect* is always "method minus against".

C1 to C7 are what the paper's abstract or a summary of the paper says, against the paper's own opponents. Where the
book asks for more than that, or sets opponents of its own, the question is a claim of its own, "C1 own" and so on,
with a verdict of its own. A method with knobs takes part only if the one rule of :mod:`unlearnlib.methods.tuning`
has chosen them, which its rows ``settings_tried`` tell; else its tests are not run.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from unlearnlib.verdicts.measurements import (
    WITHOUT_KNOBS,
    misses_in_words,
    names_of,
    setting_of,
    side_by_side,
    way_made,
    what_is_lacking,
    who_missed,
)
from unlearnlib.verdicts.results import read_results
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
PAPERS_FORGETTING, OUR_FORGETTING = "fisher_forgetting:recursion", "fisher_forgetting"  # over these two
PAPERS_ASCENT = "gradient_ascent:sgd"
PAPERS_OPPONENTS = (PAPERS_ASCENT, "finetuned")
OUR_OPPONENTS = (
    "gradient_ascent",
    "gradient_ascent:adam",
    "gradient_ascent:kl",
    "gradient_ascent:repaired",
    "gradient_difference",
    "npo",
    "npo:retain",
    "simnpo:retain",
    "rmu",
)
"""The book's first-order methods that forget. Those that an exhibit has, with chosen settings, take part."""

NEEDED = ("gradient_difference", "npo:retain")
"""The opponents of the book's own without which its questions are not answered."""

CORPORA = ("reuters", "tales", "socialiqa", "maths")


def all_tests(folder: str | Path) -> pd.DataFrame:
    """Every test of the seven claims and of the book's own questions, from the tables of results in ``folder``.

    Returns the columns ``claim, exhibit, corpus, model, method, against``; the effect's ``mean`` with its paired
    interval ``low, high`` in ``unit`` over ``pairs`` seeds (or models), and on how many of these it lies where the
    claim holds (``agree``); the ``verdict``; whether the claim rests on this test (``decides``), and whether it
    needs all of those or one (``every``); the rule (``holds_from, holds_to``); and a ``note``.
    Raises ValueError for a table that mixes models, lacks a setting, or has a number that is not finite.
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
        c8(four),
    ]
    return pd.concat(claims, ignore_index=True)


def c1(table: pd.DataFrame | None, corpora: Sequence[str] = CORPORA, limit: float = 0.0) -> pd.DataFrame:
    """C1: at equal forgetting second order has a lower holdout loss than the paper's opponents, on every corpus.

    By ``limit`` nats or more, if it is negative. The opponents are ascent batch by batch, and fine-tuning if it
    forgets (:func:`at_equal_forgetting`). "C1 own" has every other first-order method of the book.
    """
    return pd.DataFrame(_second_against_first("C1", "four_datasets", table, corpora, limit))


def c2(secrets: pd.DataFrame | None, passages: pd.DataFrame | None) -> pd.DataFrame:
    """C2: the same on the two cases of memorisation. Secrets have the whole set's metrics at ``repeats`` 0."""
    if secrets is not None:
        secrets = secrets[setting_of(secrets, "repeats") == 0]
    rows = []
    for exhibit, table in (("case_secrets", secrets), ("case_passages", passages)):
        corpora = ["–"] if table is None else table["corpus"].unique()
        rows += _second_against_first("C2", exhibit, table, corpora)
    return pd.DataFrame(rows).sort_values("claim", kind="stable", ignore_index=True)


def c3(table: pd.DataFrame | None) -> pd.DataFrame:
    """C3: the tests of C1, and C3 own those of C1 own, on the corpora on which no setting was chosen."""
    return pd.DataFrame(_second_against_first("C3", "four_datasets", table, untouched(table)))


def untouched(table: pd.DataFrame | None) -> list[str]:
    """The corpora on which no setting was chosen; where nothing tells, all but the first."""
    if table is None or not (table["metric"] == "settings_tried").any():
        return list(CORPORA[1:])
    chosen_on = set(table.loc[table["metric"] == "settings_tried", "corpus"])
    return [corpus for corpus in CORPORA if corpus not in chosen_on]


def c4(architectures: pd.DataFrame | None, real_model: pd.DataFrame | None = None) -> pd.DataFrame:
    """C4: K-FAC costs less holdout loss than ascent in one step, over the models and in each.

    The pairs are models, not seeds. An interval below zero is not enough: the effect has to be in every model.
    Beside it are the settings carried from another model (``kfac:carried``) and a pretrained model. "C4 own" has
    gradient difference in the place of ascent.
    """
    rows = []
    for claim, against in (("C4", "gradient_ascent"), ("C4 own", "gradient_difference")):
        if architectures is None:
            rows.append(not_run(claim, "architectures", method=OURS, against=against))
        else:
            found = {"all models": architectures} | dict(list(architectures.groupby("architecture")))
            tests = [(OURS, name) for name in found] + [("kfac:carried", "all models")]
            for method, name in tests:
                if method != OURS and not (architectures["method"] == method).any():
                    continue
                labels = {"exhibit": "architectures", "corpus": names_of(found[name], "corpus"), "model": name}
                labels |= {"decides": (method, name) == (OURS, "all models")}
                rows.append(_matched(claim, found[name], method, against, over="model", **labels))
        labels = {"exhibit": "real_model", "decides": False}
        if real_model is None:
            rows.append(not_run(claim, method=OURS, against=against, **labels))
        else:
            labels |= {name: names_of(real_model, name) for name in ("corpus", "model")}
            rows.append(_matched(claim, real_model, OURS, against, **labels))
    return pd.DataFrame(rows)


def c5(table: pd.DataFrame | None, fraction: float = 1.0) -> pd.DataFrame:
    """C5: Fisher Forgetting keeps utility: after the last request its holdout loss is low enough.

    That is (a) below that of Fisher Removal with the same curvature, and (b) above the retrained model's by less
    than a ``fraction`` of what the paper's ascent, batch by batch, is above it. No source gives a fraction:
    :func:`c5_curve` shows them all. "C5 own" asks whether it is also below gradient difference. Both questions are
    about the paper's recursion. Beside it are the same over K-FAC, noise alone, and in C5 own Fisher Removal.
    Who stopped short of a target is judged as :func:`after_all_requests` says.
    """
    removals = {PAPERS_FORGETTING: PAPERS_OWN, OUR_FORGETTING: OURS, "noise": OURS}
    tests = [
        ("C5", method, against, part)
        for method, removal in removals.items()
        for against, part in ((removal, 1.0), (PAPERS_ASCENT, fraction))
    ]
    methods = (PAPERS_FORGETTING, OUR_FORGETTING, PAPERS_OWN, OURS)
    tests += [("C5 own", method, "gradient_difference", 1.0) for method in methods]
    labels = {"exhibit": "repeated_requests"}
    if table is not None:
        labels |= {"corpus": names_of(table, "corpus"), "model": names_of(table, "model")}
    rows = []
    for claim, method, against, part in tests:
        of_test = {"claim": claim, "method": method, "decides": method == PAPERS_FORGETTING}
        of_test |= {"against": against if part == 1 else f"{part:g} {against}"} | labels
        lacking = "" if table is None else _not_followed(table, method, against)
        if table is None or lacking:
            rows.append(not_run(note=lacking, **of_test))
        else:
            effect, allowed, note = after_all_requests(table, method, against, part)
            rows.append(judge(effect, below(), allowed, note=note, **of_test))
    return pd.DataFrame(rows)


def c5_curve(
    table: pd.DataFrame,
    fractions: Iterable[float],
    against: str = PAPERS_ASCENT,
    method: str = PAPERS_FORGETTING,
) -> pd.DataFrame:
    """Condition (b) of C5 by fraction: ``method``'s excess at the last request less a fraction of an opponent's.

    Columns ``mean, low, high`` in nats and ``verdict``, indexed by ``fraction``. Empty if either was not run, or
    not with settings chosen by the rule.
    """
    rows = {}
    if not _not_followed(table, method, against):
        for fraction in fractions:
            effect, allowed, _ = after_all_requests(table, method, against, fraction)
            rows[fraction] = judge(effect, below(), allowed)
    columns = ["mean", "low", "high", "verdict"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("fraction")


def after_all_requests(
    table: pd.DataFrame, method: str, against: str, part: float = 1.0
) -> tuple[pd.Series, list[str], str]:
    """By seed, ``method``'s holdout loss above the retrained model's less ``part`` of that of ``against``.

    After the last request. Then which verdicts may follow, and a note. A set counts as served if its loss was
    brought to its target, or was above it already. Where ``method`` stopped short in any request nothing is
    concluded. Where ``against`` did, it had not yet done all its harm: that ``method`` does less still counts,
    that it does more does not.
    """
    request = setting_of(table, "request")
    loss = side_by_side(table[request == request.max()], "holdout_loss", [method, against, "retrained"])
    excess = loss.sub(loss["retrained"], axis=0)
    short = side_by_side(table, "served", [method, against]) < 1
    allowed = [REPRODUCED, NOT_REPRODUCED]
    if short[method].any():
        allowed = []
    elif short[against].any():
        allowed = [REPRODUCED]
    return excess[method] - part * excess[against], allowed, misses_in_words(short)


def _not_followed(table: pd.DataFrame, method: str, against: str) -> str:
    """What :func:`after_all_requests` lacks, in words; nothing if it has all."""
    lacking = what_is_lacking(table, (method, against), ("holdout_loss", "served"))
    return lacking or what_is_lacking(table, ("retrained",), ("holdout_loss",))


def c6(table: pd.DataFrame | None, bits: float = 1.0) -> pd.DataFrame:
    """C6: after Fisher Removal the secrets' mean exposure is lower than before, and lower than after ascent.

    The mean is over the planted secrets, the rows with ``repeats`` above 0; ascent is the paper's, batch by batch.
    The book's own opponents are shown beside it. "C6 own" asks whether the exposure is within ``bits`` of the
    retrained model's, and shows the first-order methods beside it.
    """
    labels = {"exhibit": "case_secrets", "unit": "bits"}
    if table is None:
        against = {"C6": ("original", PAPERS_ASCENT), "C6 own": ("retrained",)}
        return pd.DataFrame(
            [
                not_run(claim, method=PAPERS_OWN, against=one, **labels)
                for claim in against
                for one in against[claim]
            ]
        )
    repeats = setting_of(table, "repeats")
    secrets, whole = table[repeats > 0], table[repeats == 0]
    labels |= {"corpus": names_of(table, "corpus"), "model": names_of(table, "model")}
    first_order = (PAPERS_ASCENT, *_our_opponents(secrets, table))

    def test(claim: str, method: str, against: str, rule: Rule, decides: bool) -> dict:
        """A method that stopped short, or went too far, is more or less exposed for it: then nothing follows."""
        decides &= method == PAPERS_OWN
        lacking = what_is_lacking(secrets, (method, against), ("exposure_bits",), table)
        if lacking:
            return not_run(claim, decides=decides, method=method, against=against, note=lacking, **labels)
        exposure = side_by_side(secrets, "exposure_bits", [method, against])
        off = who_missed(whole, [name for name in (method, against) if name not in WITHOUT_KNOBS[:3]])
        return judge(
            exposure[method] - exposure[against],
            rule,
            allowed=() if off.any(axis=None) else (REPRODUCED, NOT_REPRODUCED),
            decides=decides,
            claim=claim,
            method=method,
            against=against,
            note=misses_in_words(off),
            **labels,
        )

    near = Rule((-bits, bits), (bits, math.inf))
    rows = [
        test("C6", method, against, below(), decides=against in ("original", PAPERS_ASCENT))
        for method in (PAPERS_OWN, OURS)
        for against in ("original", *first_order)
    ]
    rows += [test("C6 own", method, "retrained", near, True) for method in (PAPERS_OWN, OURS, *first_order)]
    return pd.DataFrame(rows)


def c7(table: pd.DataFrame | None) -> pd.DataFrame:
    """C7: on some corpus, private training that leaves nothing to unlearn costs more than unlearning with K-FAC.

    Nothing to unlearn is left if what is memorised of the forget set is at most a fifth of the original's, in the
    mean over the seeds. Every such ``epsilon`` of the table must cost more; if there is none, the claim holds on
    that corpus as well. Infinite ``epsilon``, no privacy, does not count. The weakest test of a corpus stands for
    all of it. "C7 own" asks whether it is so on every corpus, and has a row for each ``epsilon``. The settings of
    private training must have been chosen, as those of unlearning, on sequences that it was not trained on.
    Where unlearning stopped short of its target it has not paid its price, and nothing is concluded; where it went
    too far it has paid too much: that private training costs more still counts, that it costs less does not.
    """
    labels = {"exhibit": "dp_sgd", "against": OURS}
    if table is None:
        return pd.DataFrame([not_run(claim, method="dp_sgd", **labels) for claim in ("C7", "C7 own")])
    finite = np.isfinite(setting_of(table, "epsilon"))
    private = table.loc[finite, ["method", "epsilon"]].drop_duplicates().sort_values("epsilon")["method"].tolist()
    if not private:
        raise ValueError("the table has no method with a finite epsilon: C7 needs the rows of DP-SGD")
    lacking = what_is_lacking(table, (OURS, *private), ("price_nats",))
    if lacking:
        rows = [not_run(claim, method="dp_sgd", note=lacking, **labels) for claim in ("C7", "C7 own")]
        return pd.DataFrame(rows)
    somewhere, everywhere = [], []
    for corpus, found in table.groupby("corpus", sort=False):
        memorised = side_by_side(found, "memorised_nats", ["original", *private])
        price = side_by_side(found, "price_nats", [OURS, *private])
        here = labels | {"claim": "C7 own", "corpus": corpus, "model": names_of(found, "model")}
        free = [method for method in private if memorised[method].mean() <= memorised["original"].mean() / 5]
        off = who_missed(found, [OURS])
        forget = side_by_side(found, "forget_loss", [OURS, "retrained"])[off[OURS]]
        allowed, note = [REPRODUCED, NOT_REPRODUCED], misses_in_words(off)
        if off.any(axis=None):
            allowed = [REPRODUCED] if (forget[OURS] > forget["retrained"]).all() else []
        rows = [
            judge(price[method] - price[OURS], above(), allowed, method=method, note=note, **here)
            for method in free
        ]
        if not free:
            outcome = REPRODUCED if len(memorised) > 2 and REPRODUCED in allowed else INCONCLUSIVE
            row = judge(pd.Series(dtype=float), above(), method="dp_sgd", **here)
            row |= {"pairs": len(memorised), "verdict": outcome}
            rows.append(row | {"note": "; ".join(filter(None, ("no ε leaves nothing to unlearn", note)))})
        everywhere += rows
        tests = pd.DataFrame(rows)
        somewhere.append(
            weakest(tests).to_dict() | {"verdict": combine(tests["verdict"]), "claim": "C7", "every": False}
        )
    return pd.DataFrame(somewhere + everywhere)


def c8(table: pd.DataFrame | None, corpora: Sequence[str] = CORPORA, margin: float = 0.05) -> pd.DataFrame:
    """C8 own: at equal forgetting the calibrated attack finds no more than in a second retrained model.

    On every corpus. The effect is the attack's AUC above the retrained model's, less that of the second retrained
    model, which is what chance makes of it. It must lie within ``margin`` of zero; above the margin the texts are
    only hidden, and below it they would be conspicuous by their absence, from which nothing is concluded. Tuned
    first-order methods are shown beside it. A method that missed the target concludes nothing.
    """
    claim, again, metric, rows = "C8 own", "retrained:again", "membership_auc_calibrated", []
    near = Rule((-margin, margin), (margin, math.inf))
    for corpus in corpora:
        found = None if table is None else table[table["corpus"] == corpus]
        labels = {"exhibit": "four_datasets", "corpus": corpus, "against": again, "unit": "AUC"}
        if found is None or found.empty:
            rows.append(not_run(claim, method=PAPERS_OWN, **labels))
            continue
        labels["model"] = names_of(found, "model")
        for method in (PAPERS_OWN, OURS, PAPERS_ASCENT, *NEEDED):
            decides = method == PAPERS_OWN
            lacking = what_is_lacking(found, (method, again), (metric,), table)
            if lacking:
                rows.append(not_run(claim, decides=decides, method=method, note=lacking, **labels))
                continue
            auc, off = side_by_side(found, metric, [method, again]), who_missed(found, [method])
            rows.append(
                judge(
                    auc[method] - auc[again],
                    near,
                    allowed=() if off.any(axis=None) else (REPRODUCED, NOT_REPRODUCED),
                    decides=decides,
                    claim=claim,
                    method=method,
                    note=misses_in_words(off),
                    **labels,
                )
            )
    return pd.DataFrame(rows)


def _second_against_first(
    claim: str, exhibit: str, table: pd.DataFrame | None, corpora: Sequence[str], limit: float = 0.0
) -> list[dict]:
    """The tests of a claim against the paper's opponents, then those of its own question."""
    rows = []
    for name in (claim, f"{claim} own"):
        own = name != claim
        for corpus in corpora:
            found = None if table is None else table[table["corpus"] == corpus]
            if found is None or found.empty:
                against = "first order" if own else PAPERS_ASCENT
                rows.append(not_run(name, exhibit, corpus=corpus, method=PAPERS_OWN, against=against))
                continue
            for method in (PAPERS_OWN, OURS):
                for against in _our_opponents(found, table) if own else PAPERS_OPPONENTS:
                    labels = {"exhibit": exhibit, "corpus": corpus, "model": names_of(found, "model")}
                    labels |= {"decides": method == PAPERS_OWN, "limit": limit, "chosen_in": table}
                    rows.append(_matched(name, found, method, against, **labels))
        if not corpora:
            rows.append(not_run(name, exhibit, method=PAPERS_OWN, note="settings were chosen on every corpus"))
    return rows


def _matched(
    claim: str,
    table: pd.DataFrame,
    method: str,
    against: str,
    limit: float = 0.0,
    over: str = "seed",
    chosen_in: pd.DataFrame | None = None,
    **labels: object,
) -> dict:
    """The row of :func:`at_equal_forgetting`, or that the test was not run and what it lacks."""
    lacking = what_is_lacking(table, (method, against), ("holdout_loss",), chosen_in)
    if lacking:
        return not_run(claim, method=method, against=against, note=lacking, **labels)
    return at_equal_forgetting(claim, table, method, against, limit, over, **labels)


def at_equal_forgetting(
    claim: str,
    table: pd.DataFrame,
    method: str,
    against: str,
    limit: float = 0.0,
    over: str = "seed",
    decides: bool = True,
    **labels: object,
) -> dict:
    """The test that ``method`` has a lower holdout loss than ``against``, both brought to the target forget loss.

    Where ``method`` missed its target nothing is concluded. Where ``against`` did, it is taken where it ended. If
    it had forgotten too little there, it had not yet done all its harm: that ``method`` does less still counts,
    that it does more does not. If it had forgotten too much, neither counts. An opponent that never got half of
    the way from the original's forget loss to the target does not forget: it is shown, and no claim rests on it.
    Over models, the effect must be in each of them.
    """
    pair = [method, against]
    loss = side_by_side(table, "holdout_loss", pair, over)
    effect = loss[method] - loss[against]
    missed = who_missed(table, pair, over)
    allowed, note = [REPRODUCED, NOT_REPRODUCED], misses_in_words(missed)
    if missed[method].any():
        allowed = []
    elif missed[against].any():
        forget = side_by_side(table, "forget_loss", [against, "retrained"], over)[missed[against]]
        allowed = [REPRODUCED] if (forget[against] < forget["retrained"]).all() else []
    if over == "model" and (effect >= limit).any():
        allowed = [outcome for outcome in allowed if outcome != REPRODUCED]
    if missed[against].all() and way_made(table, against, over).max() < 0.5:
        decides, note = False, f"{note}, never by half of the way: it does not forget"
    labels |= {"claim": claim, "method": method, "against": against, "unit": "nats", "note": note}
    return judge(effect, below(limit), allowed, decides=decides, **labels)


def _our_opponents(table: pd.DataFrame, chosen_in: pd.DataFrame) -> list[str]:
    """The book's own opponents of which there are results to go by, and those that are needed."""
    present = set(table["method"])
    return [
        one
        for one in OUR_OPPONENTS
        if one in NEEDED or (one in present and not what_is_lacking(table, [one], (), chosen_in))
    ]
