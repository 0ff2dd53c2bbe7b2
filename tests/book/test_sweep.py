"""Sweeps over a pretended chapter, which writes a small table, and over values that no chapter takes."""

import re

import pandas as pd
import pytest
import test_notebooks
from test_notebooks import ROOT, make_root

from unlearnlib.book import sweep
from unlearnlib.book.notebooks import is_done
from unlearnlib.texts import corpora

PARAMETERS = 'profile = "quick"\ncorpus = None\nmodel = None\nseeds = None\nlevel = 1.0\nresults = "results"'
CHAPTER = """
from pathlib import Path
if corpus == "tales":
    raise ArithmeticError("too hot")
assert corpus == "reuters" or Path(corpus).read_text()
name = Path(corpus).stem
head = "exhibit,corpus,model,method,seed,metric,value"
rows = [f"{name},tiny,kfac,{seed},holdout_loss,{len(name) + seed + level}" for seed in range(seeds)]
for exhibit in ("first", "pretended"):
    Path(results, f"{exhibit}.csv").write_text("\\n".join([head, *(f"{exhibit},{row}" for row in rows)]))
"""
NAME = "01_pretended"


@pytest.fixture
def book(tmp_path, monkeypatch):
    for name in ("CORPORA", "ABOUT", "OWN_CORPORA"):
        monkeypatch.setattr(corpora, name, dict(getattr(corpora, name)))
    monkeypatch.setattr(sweep, "CORPORA", corpora.CORPORA)
    monkeypatch.setattr(test_notebooks, "PARAMETERS", PARAMETERS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("one\n\ntwo\n")
    return make_root(tmp_path, **{NAME: [CHAPTER]})


def test_combinations_run_once_and_their_results_are_laid_side_by_side(book, capsys):
    words = ["corpus=reuters,mine.txt", "seeds=2", "level=1e-05"]
    assert sweep.main([NAME, *words]) == 0
    printed = capsys.readouterr().out
    assert "2 to run" in printed
    assert "pretended (of first, pretended), means over seeds" in printed
    assert "_build/sweeps/01_pretended/quick/corpus=reuters,mine_seeds=2_level=1e-05.csv" in printed
    table = pd.read_csv(book / printed.split()[-1])
    assert len(table) == 2 * 2 * 2  # exhibits, corpora, seeds
    assert set(table["swept_corpus"]) == set(table["corpus"]) == {"reuters", "mine"}
    assert set(table["swept_seeds"]) == {2}
    shown = sweep.side_by_side(table[table["exhibit"] == "pretended"])
    assert shown.columns.names == ["corpus", "seeds", "level"]
    assert shown.loc["holdout_loss", "kfac"].tolist() == pytest.approx([7.50001, 4.50001])

    assert sweep.main([NAME, *words, "--exhibit", "first"]) == 0
    printed = capsys.readouterr().out
    assert "0 to run" in printed
    assert "first (of first, pretended)" in printed
    (book / "mine.txt").write_text("one\n\nthree\n")
    jobs = [job for job, _ in sweep.plan_sweep(book, "quick", NAME, sweep.parse_grid(words))]
    assert [is_done(job) for job in jobs] == [True, False]
    assert sweep.main([NAME, *words, "--exhibit", "second"]) == 1
    assert "01_pretended has no exhibit second: choose from first, pretended" in capsys.readouterr().err


def test_a_combination_that_fails_is_named_and_its_results_are_left_out(book, capsys):
    assert sweep.main([NAME, "corpus=tales,reuters", "seeds=1"]) == 1
    printed = capsys.readouterr()
    assert "error: 01_pretended corpus=tales seeds=1: cell 2 (from pathlib import Path) Arith" in printed.err
    assert set(pd.read_csv(book / printed.out.split()[-1])["swept_corpus"]) == {"reuters"}


@pytest.mark.parametrize(
    ("chapter", "words", "message"),
    [
        ("02_pretended", "seeds=1", "no notebook 02_pretended: choose from 01_pretended"),
        (NAME, "corpse=reuters", r"cannot sweep over corpse: .* Choose from corpus, level, model, seeds"),
        (NAME, "profile=quick,cpu", "cannot sweep over profile: it is an option"),
        (NAME, "results=here", "cannot sweep over results: every combination has a folder of its own"),
        (NAME, "corpus=tales,tails", "unknown corpus 'tails': choose one of tales"),
        (NAME, "corpus=nowhere.txt", r"there is no file nowhere\.txt"),
        (NAME, "seeds=1,0", "seeds is a positive number, or None, and not 0"),
        (NAME, "seeds=few", "seeds is a positive number, or None, and not 'few'"),
        (NAME, "seeds", "'seeds' is no parameter with values: write it as in corpus=reuters"),
        (NAME, "seeds=1,,2", "'seeds=1,,2' is no parameter with values"),
        (NAME, "seeds=1 seeds=2", "the parameter seeds is there twice"),
        (NAME, "seeds=1,1", "two values of seeds go by one name"),
        (NAME, "model=./nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(book, monkeypatch, capsys, chapter, words, message):
    monkeypatch.setattr(sweep, "run_jobs", lambda *_: pytest.fail("it ran"))
    assert sweep.main([chapter, *words.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error)


def test_a_chapter_that_takes_no_other_model_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="'dp_sgd' takes no other model: it trains privately"):
        sweep.plan_sweep(ROOT, "quick", "13_dp_sgd", {"model": ["some/model"]})


def test_settings_and_corpora_within_a_run_have_rows_of_their_own():
    rows = [
        {
            "corpus": corpus,
            "model": "tiny",
            "method": "kfac",
            "seed": 0,
            "metric": "loss",
            "value": value,
            "share": share,
        }
        for corpus, value, share in (("reuters", 1.0, 0.5), ("reuters", 2.0, 1.0), ("socialiqa", 3.0, None))
    ]
    table = pd.DataFrame(rows).assign(exhibit="a", swept_seeds="1")
    assert sweep.side_by_side(table)["1"].to_dict() == {
        ("loss", "kfac", 0.5, "reuters"): 1.0,
        ("loss", "kfac", 1.0, "reuters"): 2.0,
        ("loss", "kfac", "", "socialiqa"): 3.0,
    }
