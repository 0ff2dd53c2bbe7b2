"""One version and one date, in the package, the citation, the changelog and on the pages."""

import datetime
import re
import tomllib
from pathlib import Path

import pybtex.database
import pytest
import yaml

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
RELEASES = re.findall(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
EDITION = {"0.1": "first edition", "0.2": "second edition"}[VERSION.rpartition(".")[0]]

# Of the format's keys, version 1.2.0, those that are used here, and those that it asks for.
ASKED = {"authors", "cff-version", "message", "title"}
KEYS = ASKED | {
    "abstract",
    "date-released",
    "keywords",
    "license",
    "preferred-citation",
    "references",
    "type",
    "version",
}
WORK_ASKED = {"authors", "title", "type"}
WORK_KEYS = WORK_ASKED | {"edition", "identifiers", "journal", "license", "url", "version", "year"}


def test_programs_can_read_the_citation():
    works = [CITATION["preferred-citation"], *CITATION["references"]]
    assert ASKED <= set(CITATION) <= KEYS
    assert all(WORK_ASKED <= set(work) <= WORK_KEYS for work in works)
    for author in [author for work in [CITATION, *works] for author in work["authors"]]:
        assert set(author) in ({"name"}, {"family-names", "given-names"})
    assert (CITATION["cff-version"], CITATION["type"]) == ("1.2.0", "software")
    assert isinstance(CITATION["date-released"], str)  # without quotes YAML makes a date of it, which is refused
    # A list would mean a choice: the code has the one licence, the book the other.
    assert (CITATION["license"], CITATION["preferred-citation"]["license"]) == ("MIT", "CC-BY-4.0")


def test_there_is_one_version_and_one_date():
    latest, released = RELEASES[0]
    assert CITATION["version"] == CITATION["preferred-citation"]["version"] == latest == VERSION
    assert CITATION["date-released"] == released
    assert CITATION["preferred-citation"]["year"] == datetime.date.fromisoformat(released).year


def test_releases_go_back_in_time():
    numbers = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    dates = [datetime.date.fromisoformat(date) for _, date in RELEASES]
    assert len(RELEASES) >= 2
    assert numbers == sorted(set(numbers), reverse=True)
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("page", ["README.md", "book/index.md", "book/corrections.md"])
def test_pages_name_the_edition(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"{EDITION}, {VERSION}" in text


def test_the_book_has_one_title_and_its_authors_one_name():
    book, config = (
        CITATION["preferred-citation"],
        yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8")),
    )
    assert CITATION["title"] == book["title"] == config["title"]
    assert CITATION["authors"] == book["authors"] == [{"name": config["author"]}]
    assert book["edition"] == EDITION


def test_the_paper_is_cited_as_in_the_bibliography():
    [cited] = CITATION["references"]
    paper = pybtex.database.parse_file(str(ROOT / "book" / "references.bib")).entries["gu2024secondorder"]
    assert cited["title"] == re.sub("[{}]", "", paper.fields["title"])
    assert str(cited["year"]) == paper.fields["year"]
    assert [author["family-names"] for author in cited["authors"]] == [
        " ".join(person.last_names) for person in paper.persons["author"]
    ]
    assert cited["url"] == f"https://arxiv.org/abs/{paper.fields['eprint']}"
    assert [each["value"] for each in cited["identifiers"]] == [f"arXiv:{paper.fields['eprint']}"]
