"""Words beside numbers: what a sentence says of them has to be checked by the run that computed them."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted(ROOT.glob("notebooks/*.ipynb"))
GLUED = re.compile(r"{glue:\w+}`[^`]*`")
NOT_PROSE = re.compile(r"^(```+|~~~+|:::+).*$|^:\w+:.*$|\$\$.*?\$\$", re.M | re.S)
MARKUP = re.compile(r"{[\w:.-]+}(?=`)|[*`_\[\]]|<[\w-]+>|\([^()\s]*\.(?:md|ipynb)[^()\s]*\)")
VAGUE = re.compile(
    r"\b(about|similar(ly)?|near(ly)?|almost|hardly|barely|roughly|(?<!the )(?<!at )most(ly)?|comparable"
    r"|practically|no such|much the same|as good as|close to)\b",
    re.I,
)


def plain(text: str) -> str:
    """The text without its markup, in lower case, each glued number as a dot in a ring."""
    return " ".join(MARKUP.sub("", GLUED.sub("⊙", text)).lower().split())


def sentences(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#]|\d+\. )", NOT_PROSE.sub("\n\n", text)):
        yield from re.split(r"(?<=[.!?;])\s+(?=\S)", plain(paragraph))


def checked(code: str) -> Iterator[str]:
    """What a cell tells ``book.expect`` that the text says."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "expect":
            yield from (plain(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant))


def unchecked(markdown: list[str], code: list[str]) -> list[str]:
    """Sentences that hold a number and a vague word which is in no clause that the code checks."""
    says = [clause for cell in code for clause in checked(cell)]
    found = []
    for sentence in (each for text in markdown for each in sentences(text) if "⊙" in each):
        rest = sentence
        for clause in says:
            rest = rest.replace(clause, "")
        if VAGUE.search(rest):
            found.append(sentence)
    return found


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_vague_word_beside_a_number_is_checked(path):
    cells = nbformat.read(path, as_version=4).cells
    markdown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    captions = [cell.metadata.get("mystnb", {}).get("figure", {}).get("caption", "") for cell in cells]
    found = unchecked(markdown + captions, [cell.source for cell in cells if cell.cell_type == "code"])
    assert found == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("book/*.md")), ids=lambda path: path.stem)
def test_pages_without_code_use_no_vague_word_beside_a_number(path):
    assert not unchecked([path.read_text(encoding="utf-8")], [])


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("", True),
        ('book.expect(profile, "K-FAC takes less", a < b)', True),
        ('book.expect(profile, "nearly as many as the recursion", a < b)', False),
        ('print("nearly as many as the recursion")', True),
    ],
)
def test_the_check_can_fail(code, is_found):
    text = "It works. **K-FAC** takes {glue:text}`kfac:.2f`,\nnearly as *many* as the recursion. Most do."
    assert bool(unchecked([text], [code])) == is_found
