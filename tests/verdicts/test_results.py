import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from unlearnlib.verdicts import results


def table(values, method="m", metric="loss"):
    rows = [
        {"corpus": "c", "model": "x", "method": method, "seed": seed, "metric": metric, "value": value}
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_written_and_read_back_the_same_whatever_the_order(tmp_path):
    frame = table([1 / 3, 2e-7, 12345.678901])
    first = results.write_results(frame, tmp_path, "one").read_bytes()
    again = results.write_results(frame.sample(frac=1, random_state=1), tmp_path, "one").read_bytes()
    assert first == again
    back = results.read_results(tmp_path, "one")
    assert list(back.columns) == results.COLUMNS
    np.testing.assert_allclose(back["value"], [1 / 3, 2e-7, 12345.678901], rtol=1e-8)


def test_columns_of_objects_are_written_to_nine_digits_as_well(tmp_path):
    frame = pd.concat([table([1 / 3]).assign(setting=s) for s in (32, 0.1 + 0.2)]).astype(object)
    lines = results.write_results(frame, tmp_path, "one").read_text().splitlines()
    assert [line.split(",")[-2:] for line in lines[1:]] == [["0.333333333", "0.3"], ["0.333333333", "32"]]


def test_settings_are_kept_as_columns_at_the_end(tmp_path):
    frame = pd.concat([table([1.0, 2.0]).assign(step=s) for s in (0, 1)])
    results.write_results(frame, tmp_path, "one")
    assert list(results.read_results(tmp_path, "one").columns) == [*results.COLUMNS, "step"]


def test_bad_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lack the column\(s\) \['seed'\]"):
        results.write_results(table([1.0]).drop(columns="seed"), tmp_path, "one")
    with pytest.raises(ValueError, match="hold a row twice"):
        results.write_results(pd.concat([table([1.0]), table([2.0])]), tmp_path, "one")
    with pytest.raises(ValueError, match="hold a row twice"):  # nine digits are written, and these agree in them
        close = [table([1.0]).assign(damping=damping) for damping in (0.1, 0.1 + 1e-15)]
        results.write_results(pd.concat(close), tmp_path, "one")
    with pytest.raises(FileNotFoundError, match="run the chapter that makes the exhibit 'one' first"):
        results.read_results(tmp_path, "one")


def test_interval_of_five_against_the_textbook_and_scipys_paired_test():
    values = np.array([0.3, -0.1, 0.4, 0.25, 0.05])
    half = 2.7764451052 * values.std(ddof=1) / math.sqrt(5)  # the 97.5 % point of t with 4 degrees, from a table
    np.testing.assert_allclose(results.interval(values), [values.mean() - half, values.mean() + half])
    test = stats.ttest_rel(values + 7, np.full(5, 7.0)).confidence_interval(0.9)
    np.testing.assert_allclose(results.interval(values, level=0.9), [test.low, test.high])


@pytest.mark.parametrize("n", [3, 5, 9])
def test_interval_covers_the_mean_of_normal_values_as_often_as_it_says(n):
    draws = np.random.default_rng(1).normal(3.0, 2.0, size=(4000, n))
    covered = np.mean([low <= 3.0 <= high for low, high in map(results.interval, draws)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)  # four standard errors of the count


def test_interval_of_too_little_or_of_equal_values():
    for few in ([], [1.0], [1.0, 2.0]):
        assert all(np.isnan(results.interval(few)))
    assert results.interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_differences_are_paired_by_seed():
    noise = [10.0, 20.0, 30.0, 40.0, 50.0]
    frame = pd.concat([table(noise, "a"), table([x + 1 for x in noise], "b").sample(frac=1, random_state=0)])
    paired = results.summarise(frame, against="a").loc[("b", "loss")]
    assert paired["mean"] == pytest.approx(1)
    assert (paired["low"], paired["high"]) == pytest.approx((1, 1))
    plain = results.summarise(frame).loc[("b", "loss")]
    assert plain["mean"] == pytest.approx(31)
    assert plain["high"] - plain["low"] > 10
    assert plain["seeds"] == 5


def test_a_table_for_reading_puts_every_number_in_its_place():
    frame = pd.concat(
        [table([1.0, 2.0, 3.0], "b", "kl"), table([3.0] * 3, "a:x", "loss"), table([5.0] * 3, "b", "loss")]
    )
    metrics = {"loss": "Loss", "kl": "KL"}
    shown = results.format_table(results.summarise(frame), metrics, digits=1)
    assert list(shown.columns) == ["Loss", "KL"]
    assert shown.columns.name == "n = 3"
    assert shown.loc["a (x)"].tolist() == ["3.0 [3.0, 3.0]", "–"]
    half = 4.3026527297 / math.sqrt(3)  # the 97.5 % point of t with 2 degrees, from a table
    assert shown.loc["b"].tolist() == ["5.0 [5.0, 5.0]", f"2.0 [{2 - half:.1f}, {2 + half:.1f}]"]
    assert results.mean_text([1.25]) == "1.25"
    assert results.mean_text([1.25, 1.75]) == "1.50"
    assert results.mean_text([-0.001] * 3) == "0.00 [0.00, 0.00]"


def test_a_table_of_unequal_numbers_of_seeds_counts_them_by_method():
    frame = pd.concat([table([1.0, 2.0, 3.0], "a"), table([1.0], "b"), table([1.0, 1.0], "a", "kl")])
    shown = results.format_table(results.summarise(frame), {"loss": "Loss", "kl": "KL"})
    assert shown.columns.name is None
    assert shown["n"].to_dict() == {"a": "2 or 3", "b": "1"}
    only = results.format_table(results.summarise(frame), {"kl": "KL"})
    assert only.columns.name == "n = 2"
    assert only.loc["b"].tolist() == ["–"]


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (-0.004, 2, False, "0.00"),
        (-0.004, 3, True, "-0.004"),
        (-0.0004, 2, True, "+0.00"),
        (1.26, 1, True, "+1.3"),
    ],
)
def test_no_number_is_minus_zero(value, digits, sign, text):
    assert results.number_text(value, digits, sign) == text


def test_what_is_above_the_retrained_model_is_paired_by_seed_and_corpus():
    def rows(method, values, **columns):
        return table(values, method=method).assign(**columns)

    one = pd.concat([rows("m", [3.0, 5.0]), rows("retrained", [1.0, 2.0])])
    assert results.above_retrained(one, "loss")["m"].to_dict() == {0: 2.0, 1: 3.0}
    named = results.above_retrained(one, "loss", by_corpus=True)["m"].to_dict()
    [corpus] = one["corpus"].unique()
    assert named == {(corpus, 0): 2.0, (corpus, 1): 3.0}
    two = pd.concat([one, one.assign(corpus="other", value=one["value"] * 2)])
    assert results.above_retrained(two, "loss")["m"].to_dict() == named | {("other", 0): 4.0, ("other", 1): 6.0}


def test_methods_have_names_for_people():
    assert results.method_label("gradient_ascent:adam") == "gradient ascent (adam)"
    assert results.method_label("kfac:held") == "K-FAC (held)"
    assert results.method_label("newton_cg:kfac") == "Newton-CG (kfac)"
    assert results.method_label("newton_cg:natural") == "Newton (natural)"
    assert results.method_label("noise:inverse_root") == "noise (inverse root)"


def test_a_rerun_agrees_where_its_mean_lies_in_the_references_interval():
    reference = pd.concat(
        [
            table([1.0, 2.0, 3.0]).assign(size=4.0),
            table([1.0, 2.0, 3.0], method="other").assign(size=float("nan")),
            table([5.0, 6.0], metric="pair").assign(size=4.0),
            table([7.0, 7.0, 7.0], metric="constant").assign(size=4.0),
        ]
    )
    low, high = results.interval([1.0, 2.0, 3.0])
    rerun = reference.copy()
    rerun.loc[rerun["method"] == "other", "value"] += high - 2.0 + 0.01
    found = results.agreement(rerun, reference)
    assert found["agrees"].to_dict() == {
        ("c", "x", "m", "loss", "4.0"): True,
        ("c", "x", "other", "loss", "nan"): False,
        ("c", "x", "m", "constant", "4.0"): True,
    }
    assert found.iloc[0].to_dict() == {"rerun": 2.0, "reference": 2.0, "low": low, "high": high, "agrees": True}
    lacking = results.agreement(rerun[rerun["metric"] != "constant"], reference)
    assert not lacking["agrees"].to_dict()["c", "x", "m", "constant", "4.0"]
    older = results.agreement(rerun.drop(columns="size"), reference)["agrees"].to_dict()
    assert not older["c", "x", "m", "loss", "4.0"]


def test_a_run_of_the_reference_profile_is_checked_and_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "REFERENCE", tmp_path / "reference")
    frame = pd.concat([table([1.0, 2.0, 3.0], metric=f"metric {i}") for i in range(10)])
    for folder in ("reference", "same", "changed"):
        (tmp_path / folder).mkdir()
    results.write_results(frame, tmp_path / "reference", "one")
    results.write_results(frame, tmp_path / "same", "one")
    results.write_results(table([1.0, 2.0]), tmp_path / "reference", "pair")
    results.write_results(table([4.0, 5.0]), tmp_path / "same", "pair")
    said = results.compare_with_reference("cpu", tmp_path / "same", "one", "pair", "new").data
    assert "`one`: 10 of 10 means" in said
    assert "`pair` is of one or two seeds" in said
    assert "`new` has no reference results yet" in said
    frame.loc[frame["metric"].isin(["metric 3", "metric 7"]), "value"] += 5
    results.write_results(frame, tmp_path / "changed", "one")
    said = results.compare_with_reference("cpu", tmp_path / "changed", "one").data
    assert re.search(r"8 of 10 means .* It does not agree; .* c x m metric 3: 7, not in -0\.484 to 4\.48", said)
    assert results.disagreements(tmp_path / "same") == []
    [found] = results.disagreements(tmp_path / "changed")
    assert found in said
    assert "not compared" in results.compare_with_reference("quick", tmp_path / "changed", "one").data


def test_where_only_the_library_is_installed_nothing_is_said_to_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "REFERENCE", tmp_path / "site-packages" / "book" / "results")
    results.write_results(table([1.0, 2.0, 3.0]), tmp_path, "one")
    for ask in (
        lambda: results.read_results(results.REFERENCE, "one"),
        lambda: results.compare_with_reference("cpu", tmp_path, "one"),
        lambda: results.disagreements(tmp_path),
    ):
        with pytest.raises(FileNotFoundError, match="Clone the book's repository"):
            ask()
    assert "not compared" in results.compare_with_reference("quick", tmp_path, "one").data
