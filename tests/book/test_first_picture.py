"""The picture of the first page is drawn from the table that is committed."""

import pytest

from unlearnlib.book import first_picture
from unlearnlib.verdicts.results import REFERENCE, read_results


def test_picture_is_of_the_committed_table():
    drawn_from = f"<dc:description>{first_picture.fingerprint()}</dc:description>"
    assert drawn_from in first_picture.PICTURE.read_text(encoding="utf-8"), (
        "book/results/newton_frontier.csv has changed: python -m unlearnlib.book.first_picture draws it anew"
    )


def test_same_table_gives_same_bytes(tmp_path):
    first, second = (first_picture.draw(tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert first == second
    assert first_picture.fingerprint().encode() in first


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("gradient_ascent", 0.31),
        ("gradient_difference", 0.01),
        ("newton_cg:hessian", 0.02),
        ("newton_cg", -0.03),
    ],
)
def test_alternative_text_of_the_first_page_has_the_tables_numbers(method, says):
    table = read_results(REFERENCE, first_picture.EXHIBIT)
    matched = table[(table["method"] == method) & (table["metric"] == "holdout_excess") & (table["share"] == 1)]
    assert round(matched["value"].mean(), 2) == says
    assert f"{abs(says):.2f}" in (REFERENCE.parent / "index.md").read_text(encoding="utf-8")
