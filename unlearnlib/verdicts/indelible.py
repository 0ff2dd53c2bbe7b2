"""Is complete removal harder for real memories than for planted ones? The rule of the chapter on both."""

import pandas as pd

from unlearnlib.verdicts.rules import NOT_REPRODUCED, REPRODUCED, above, judge

PAPERS_OWN = "fisher_recursion"


def harder_to_remove(table: pd.DataFrame) -> pd.DataFrame:
    """The tests of that question on a table of the exhibit ``indelible_memories``: a row a corpus and method.

    The effect, once a seed, is the share of real spans that are not removed minus that of planted ones, of those
    that are known and were seen once (``not_removed``). The paper's Fisher Removal decides, on every corpus; the
    other methods are shown beside it. A method that missed matched forgetting concludes nothing. The columns are
    those of :func:`unlearnlib.verdicts.claims.all_tests`.
    """
    reached = table[table["metric"] == "reached"]
    methods = sorted(reached["method"].unique(), key=lambda method: method != PAPERS_OWN)
    shares = table[table["metric"] == "not_removed"]
    wide = shares.pivot(index=["corpus", "seed"], columns=["method", "kind"], values="value")
    wide = wide.reindex(columns=pd.MultiIndex.from_product([methods, ("real", "planted")]))
    of = wide.index.get_level_values("corpus")
    rows = []
    for corpus, of_corpus in reached.groupby("corpus", sort=False):
        labels = {"claim": "harder to remove", "exhibit": "indelible_memories", "unit": "share", "corpus": corpus}
        labels |= {"model": of_corpus["model"].iloc[0], "against": "planted"}
        for method in methods:
            matched = (of_corpus.loc[of_corpus["method"] == method, "value"] == 1).all()
            labels["note"] = "" if matched else "missed matched forgetting"
            labels |= {"allowed": (REPRODUCED, NOT_REPRODUCED) if matched else (), "method": method}
            effect = (wide[method, "real"] - wide[method, "planted"])[of == corpus].dropna()
            rows.append(judge(effect, above(), decides=method == PAPERS_OWN, **labels))
    return pd.DataFrame(rows)
