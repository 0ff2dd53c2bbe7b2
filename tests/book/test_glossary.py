"""Every term of the glossary is one that the book uses, and is easily found there."""

import re
from pathlib import Path

from helpers import chapter_prose

ROOT = Path(__file__).parents[2]


def terms():
    """The terms as the page has them: the lines of its glossary that are not indented."""
    body = (ROOT / "book" / "glossary.md").read_text(encoding="utf-8").partition(":::{glossary}\n")[2]
    return [line for line in body.partition("\n:::")[0].splitlines() if line and not line.startswith(" ")]


def prose():
    """The words of all chapters and of the page that chooses a method, without code, formulas and emphasis."""
    texts = [(ROOT / "book" / "which_method.md").read_text(encoding="utf-8")]
    texts += map(chapter_prose, sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")))
    return re.sub(r"[\s*]+", " ", "\n".join(texts)).lower()


def test_every_term_is_used_by_a_chapter():
    words = prose()
    assert not [term for term in terms() if not re.search(rf"\b{re.escape(term.lower())}", words)]


def test_terms_are_in_the_order_of_the_alphabet_and_named_once():
    names = [term.lower() for term in terms()]
    assert names == sorted(set(names))
