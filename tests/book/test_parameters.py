"""The parameter cells of the notebooks, and the table that is made of them."""

import papermill
import pytest
import test_notebooks
from test_notebooks import CHAPTERS, make_root

from unlearnlib.book.notebooks import listed_notebooks, plan
from unlearnlib.book.pages import _stage
from unlearnlib.book.parameters import parameters_table, spans


def test_every_parameter_has_a_comment_and_the_same_one_in_every_chapter():
    said = {}
    for path in CHAPTERS:
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            assert parameter["help"], f"{name} of {path.name}"
            said.setdefault((name, parameter["default"]), set()).add(parameter["help"])
    assert {name: comments for name, comments in said.items() if len(comments) > 1} == {}


def test_every_chapter_has_its_parameters_in_one_order():
    names = [list(papermill.inspect_notebook(str(path))) for path in CHAPTERS]
    assert {each[0] for each in names} == {"profile"}
    assert {each[-1] for each in names} == {"results"}
    common = ["profile", "corpus", "corpora", "model", "last_blocks", "seeds", "retain", "results"]
    for each in names[:-2]:  # an own model, and the claims, have others
        assert each == [name for name in common if name in each]


def test_the_table_says_what_the_cells_say(tmp_path, monkeypatch):
    monkeypatch.setattr(test_notebooks, "PARAMETERS", 'profile = "quick"  # how large\nresults = "results"')
    root = make_root(tmp_path, a=["1"], b=["1"])
    other = (root / "notebooks" / "b.ipynb").read_text()
    (root / "notebooks" / "b.ipynb").write_text(other.replace("# how large", "# a | b\\nlength = 64  # tokens"))
    assert parameters_table(listed_notebooks(root)).splitlines() == [
        "| Parameter and default | What it is | Chapters |",
        "|---|---|---|",
        '| `profile = "quick"` | how large | 1 |',
        '| `results = "results"` |  | all |',
        '| `profile = "quick"` | a \\| b | 2 |',
        "| `length = 64` | tokens | 2 |",
    ]


def test_pages_are_staged_with_the_table(tmp_path):
    root = make_root(tmp_path, a=["1"])
    staged = _stage(root, root / "_build" / "quick", plan(root, "quick"), {"a": "not run"})
    assert (staged / "book" / "parameters.txt").read_text() == parameters_table(listed_notebooks(root))


@pytest.mark.parametrize(
    ("numbers", "text"), [([4], "4"), ([1, 2], "1–2"), ([1, 2, 3, 5, 7, 8], "1–3, 5, 7–8"), ([], "")]
)
def test_numbers_in_a_row_are_drawn_together(numbers, text):
    assert spans(numbers) == text
