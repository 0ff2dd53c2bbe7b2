"""The picture of the first page is drawn from the table that is committed."""

from unlearnlib.book import first_picture


def test_picture_is_of_the_committed_table():
    drawn_from = f"<dc:description>{first_picture.fingerprint()}</dc:description>"
    assert drawn_from in first_picture.PICTURE.read_text(encoding="utf-8"), (
        "book/results/newton_frontier.csv has changed: python -m unlearnlib.book.first_picture draws it anew"
    )


def test_same_table_gives_same_bytes(tmp_path):
    first, second = (first_picture.draw(tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert first == second
    assert first_picture.fingerprint().encode() in first
