"""The PDF of a book of three pages, made from its sources as the whole book is."""

import re
import shutil
import tomllib
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pypdf import PdfReader

from unlearnlib.book import build, printing
from unlearnlib.book.pages import BuildError, render
from unlearnlib.book.printing import print_pages, sheets

ROOT = Path(__file__).parents[2]
TOC = """
format: jb-book
root: book/index
parts:
  - caption: "Part I: The part"
    numbered: true
    chapters:
      - file: book/one
      - file: book/two
  - caption: Reference
    chapters:
      - file: book/references
"""
FILLER = "\n\n".join(["Nothing of note is said here. " * 12] * 14)
INDEX = """
# Where it starts

To {ref}`the sum <section-sum>`, to {eq}`eq-sum`, to the {term}`term`, to {numref}`fig-picture`, to
{cite:t}`gu2024secondorder`, to [another place](https://example.org/place) and to a [file](references.bib).
"""
ONE = f"""
# The first

{FILLER}

(section-sum)=
## A sum of $a$

```{{math}}
:label: eq-sum
\\sum_{{a=1}}^{{9}} a = 45 \\text{{, the sum}}
```

## The same title

[Here](#the-same-title) in the first.

```{{exercise}}
:label: ex-one
How much is it?
```

```{{solution}} ex-one
:class: dropdown
It is forty-five, as hidden.
```
"""
TWO = f"""
# The second

{FILLER}

## The same title

[Here](#the-same-title) in the second.

```{{figure}} _static/frontier.svg
:name: fig-picture
:alt: A picture.

The picture of the second.
```

```{{glossary}}
term
  What is explained.
```

| {"|".join(f"Columnname{i}" for i in range(24))} |
|{"---|" * 24}
| {"|".join(f"value{i}" for i in range(24))} |
"""


def aside(function, *arguments, **options):
    """Call ``function`` in another thread: in this one the tests' browser has its loop of events."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function, *arguments, **options).result()


@pytest.fixture(scope="module")
def book(tmp_path_factory, needs_chromium):
    """The folder of the small book, rendered."""
    root = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    for name in ("_config.yml", "book/references.bib", "book/references.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "_toc.yml").write_text(TOC)
    for name, text in {"index": INDEX, "one": ONE, "two": TWO}.items():
        (root / "book" / f"{name}.md").write_text(text)
    render(root, "quick", {})
    return root


@pytest.fixture(scope="module")
def pdf(book):
    return PdfReader(aside(print_pages, book, "quick"))


@pytest.fixture(scope="module")
def texts(pdf):
    """The words on each sheet, without ligatures."""
    return [" ".join(unicodedata.normalize("NFKC", page.extract_text()).split()) for page in pdf.pages]


def test_the_outline_has_parts_chapters_and_sections_where_they_are(pdf, texts):
    def listed(items, level=0):
        for item in items:
            if isinstance(item, list):
                yield from listed(item, level + 1)
            else:
                yield level, item.title, pdf.get_destination_page_number(item)

    found = list(listed(pdf.outline))
    assert [(level, title) for level, title, _ in found] == [
        (0, "Where it starts"),
        (0, "Part I: The part"),
        (1, "1. The first"),
        (2, "1.1. A sum of a"),
        (2, "1.2. The same title"),
        (1, "2. The second"),
        (2, "2.1. The same title"),
        (0, "Reference"),
        (1, "References"),
    ]
    assert all(title in texts[page] for _, title, page in found if "sum" not in title)
    pages = [page for _, _, page in found]
    assert pages == sorted(pages)
    assert pages[3] > pages[2]  # there are whole sheets between


def test_the_cover_says_which_version_this_is_and_from_which_profile(texts):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"Version {project['version']}, computed at profile quick." in texts[0]


def test_links_lead_to_the_sheets_that_have_what_they_name(pdf, texts):
    linked = set()
    for page in pdf.pages:
        for link in page.get("/Annots", []):
            target = link.get_object().get("/Dest")
            linked |= {str(target).removeprefix("/")} if target else set()
    said = {
        "book/one:section-sum": "A sum of",
        "book/one:equation-eq-sum": "(1.1)",
        "book/one:the-same-title": "in the first",
        "book/one:ex-one": "How much is it?",
        "book/two:the-same-title": "in the second",
        "book/two:fig-picture": "The picture of the second",
        "book/two:term-term": "What is explained",
    }
    found = sheets(pdf)
    assert linked >= said.keys()
    assert linked <= found.keys()
    assert [name for name, text in said.items() if text not in texts[found[name] - 1]] == []
    cited = [name for name in linked if name.startswith("book/references:")]
    assert ["second-order information matters" in texts[found[name] - 1].lower() for name in cited] == [True]


def test_outside_links_are_web_addresses(pdf):
    links = [
        link.get_object().get("/A", {}).get("/URI") for page in pdf.pages[:-1] for link in page.get("/Annots", [])
    ]
    found = {link for link in links if link}
    assert "https://example.org/place" in found
    assert all(link.startswith("http") for link in found)


def test_contents_and_sheets_have_the_same_numbers(pdf, texts):
    found = sheets(pdf)
    assert re.search(rf"1\. The first {found['book/one']} .*2\. The second {found['book/two']} ", texts[1])
    assert found["book/two"] > found["book/one"] + 1
    for number, text in enumerate(texts[1:], start=2):
        assert re.search(rf"\b{number}\b", text)


def test_formulas_figures_and_solutions_are_there(pdf, texts):
    whole = " ".join(texts)
    assert "a = 45, the sum" in whole  # not as in its source
    assert "It is forty-five, as hidden." in whole
    (page,) = (page for page, text in zip(pdf.pages, texts, strict=True) if "The picture of the second" in text)
    assert (
        page.get_contents().get_data().count(b" c\n") > 100
    )  # the curves of its letters, over the words of the page


def test_a_wide_table_is_whole(pdf, texts):
    (page,) = (page for page, text in zip(pdf.pages, texts, strict=True) if "Columnname0" in text)
    ends = []
    page.extract_text(visitor_text=lambda text, page, line, *_: ends.append((text, line[4] * page[0] + page[4])))
    right = next(x for text, x in ends if "value23" in text)
    assert right < float(page.mediabox.right) - 40


def test_what_is_not_whole_is_not_printed_and_leaves_the_old_one(book, pdf, tmp_path):
    site = book / "_build" / "quick" / "site" / "_build" / "html" / "book" / "one.html"
    before, old = site.read_text(), (book / "_build" / "quick" / "book.pdf").read_bytes()
    bad = r'<span class="math">\(\frac{a\)</span><img src="http://example.org/abroad.png"><img src="no.png">'
    try:
        site.write_text(before.replace("</article>", f"{bad}</article>"))
        with pytest.raises(BuildError) as error:
            aside(print_pages, book, "quick")
    finally:
        site.write_text(before)
    for words in ("cannot be set: .*frac", "not there: http://example.org/abroad.png", "shown: .*/no.png"):
        assert re.search(words, str(error.value))
    assert (book / "_build" / "quick" / "book.pdf").read_bytes() == old
    assert not list((book / "_build" / "quick").glob(".book.pdf*"))
    assert not list(site.parents[1].glob("on-paper*"))


def test_without_chromium_nothing_is_begun(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(printing, "CHROMIUM", str(tmp_path / "chromium"))
    monkeypatch.setattr(build, "run_notebooks", lambda *_: begun.append(1))
    with pytest.raises(BuildError, match="apt install chromium"):
        aside(build.make_book, tmp_path, "quick", pdf=True)
    assert not begun


def test_a_browser_that_hangs_is_given_up(book, pdf, monkeypatch):
    monkeypatch.setattr(printing, "MINUTES", 0)
    with pytest.raises(BuildError, match="not printed the book in 0 minutes"):
        aside(print_pages, book, "quick")


def test_an_old_chromium_is_refused(needs_chromium, monkeypatch):
    monkeypatch.setattr(printing, "OLDEST", 9999)
    with pytest.raises(BuildError, match=r"9999 or later, and this one has the version \d+"):
        aside(printing.require_chromium)
