"""Every symbol of every chapter is explained on the page of notation, in a row that covers the chapter."""

import re
from pathlib import Path

import pytest
from helpers import chapter_prose

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|\S")
MATHS = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$]+?)\$(?!\d)", re.DOTALL)
GREEK = re.compile(
    r"\\((var)?epsilon|(var)?phi|alpha|beta|[Gg]amma|[Dd]elta|zeta|eta|[Tt]heta|iota|kappa|[Ll]ambda|mu|nu|[Xx]i|[Pp]i|rho"
    r"|[Ss]igma|tau|[Uu]psilon|Phi|chi|[Pp]si|[Oo]mega|ell)"
)
DECORATION = re.compile(r"\\((wide)?(hat|tilde)|bar|overline|dot|mathcal|mathbb|mathbf|boldsymbol)")
WORD = re.compile(r"\\(text|mathrm|operatorname|mathit|tag|label|begin|end)")


def argument(tokens, i):
    """The tokens of the argument that begins at ``i``, and where it ends."""
    if tokens[i] == "*":
        return argument(tokens, i + 1)
    if tokens[i] != "{":
        return tokens[i : i + 1], i + 1
    depth = 0
    for j in range(i, len(tokens)):
        depth += (tokens[j] == "{") - (tokens[j] == "}")
        if depth == 0:
            return tokens[i + 1 : j], j + 1
    raise ValueError(f"a brace is not closed in {''.join(tokens)}")


def letter(token):
    return bool(GREEK.fullmatch(token)) or (token.isascii() and token.isalpha())


def symbols(tokens):
    """The letters of a formula, each with its accent or its script, without words, signs and indices' places."""
    found, i = set(), 0
    while i < len(tokens):
        token = tokens[i]
        if WORD.fullmatch(token):
            _, i = argument(tokens, i + 1)
        elif DECORATION.fullmatch(token):
            inner, i = argument(tokens, i + 1)
            letters = [one for one in inner if letter(one)]
            found |= {f"{token} {letters[0]}"} if len(letters) == 1 else symbols(inner)
        else:
            found |= {token} if letter(token) else set()
            i += 1
    return found


def symbols_in(markdown):
    """The symbols in all formulas of a text, code left out."""
    prose = re.sub(r"`[^`\n]*`", " ", markdown)
    return {symbol for inline in MATHS.findall(prose) for symbol in symbols(TOKEN.findall(inline[0] or inline[1]))}


def label_of(path):
    return re.search(r"^\((chapter-[\w-]+)\)=$", chapter_prose(path), re.MULTILINE)[1]


def rows_of_the_page():
    """Of each row of the tables of symbols: its symbols, and the chapters that it names by label; none is all."""
    page = (ROOT / "book" / "notation.md").read_text(encoding="utf-8")
    tables = page.partition("(symbols)=")[2].partition("\n## Splits")[0]
    for line in tables.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)][1:-1]
        if len(cells) == 3 and "$" in cells[0]:
            yield symbols_in(cells[0]), re.findall(r"\{ref\}`(\d+) <([\w-]+)>`", cells[2]), cells


def test_letters_are_told_from_words_and_decorations_from_letters():
    assert symbols_in(r"$\hat L_j = \mathcal N(\mu, \sigma^2)$ and `$q$`") == {
        r"\hat L",
        "j",
        r"\mathcal N",
        r"\mu",
        r"\sigma",
    }
    assert symbols_in(r"$$\operatorname*{arg\,min}_w \text{loss of } w$$") == {"w"}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_symbol_of_a_chapter_is_explained(path):
    explained = set()
    for found, chapters, cells in rows_of_the_page():
        if cells[2] == "all" or label_of(path) in {label for _, label in chapters}:
            explained |= found
    missing = sorted(symbols_in(chapter_prose(path)) - explained)
    assert not missing


def test_chapters_are_named_by_their_numbers_and_use_what_the_page_says_they_use():
    chapters = {label_of(path): (path.stem[:2], symbols_in(chapter_prose(path))) for path in CHAPTERS}
    for found, named, cells in rows_of_the_page():
        assert cells[2] == "all" or named, cells
        for number, label in named:
            stem, used = chapters[label]
            assert int(number) == int(stem), cells
            assert found & used, (cells, label)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_list_of_a_chapter_has_the_rows_that_name_it(path):
    page, label = (ROOT / "book" / "notation.md").read_text(encoding="utf-8"), label_of(path)
    target = f"(symbols-in-{label.removeprefix('chapter-')})="
    head = f"{target}\n#### Chapter {int(path.stem[:2])}\n\n{{ref}}`{label}`\n\n"
    shown = page.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    rows = [cells for _, chapters, cells in rows_of_the_page() if label in {named for _, named in chapters}]
    assert shown == [f"| {symbol} | {meaning} |" for symbol, meaning, _ in rows]
