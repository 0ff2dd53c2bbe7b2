"""The bibliography against what cites it, the page on data against the downloads, the maps against the library."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pybtex.database
import pytest

from unlearnlib.book.imports import imported_files
from unlearnlib.book.notebooks import listed_notebooks
from unlearnlib.experiment import profiles
from unlearnlib.texts import corpora, wheels

ROOT = Path(__file__).parents[2]
PROSE = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book").glob("*.md"))}
for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    PROSE[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
ENTRIES = re.findall(
    r"^@\w+\{([^,]+),", (ROOT / "book" / "references.bib").read_text(encoding="utf-8"), re.MULTILINE
)
PINNED = [wheel for wheel in vars(wheels).values() if isinstance(wheel, wheels.Wheel)]


def cited():
    lists = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", "\n".join(PROSE.values()))
    return {key.strip() for keys in lists for key in keys.split(",")}


def row_of(name):
    """The line of the tables on data that begins with a name."""
    [line] = [line for line in PROSE["data.md"].splitlines() if line.startswith(f"| `{name}` |")]
    return line


def test_every_entry_is_cited_and_every_citation_has_an_entry():
    assert len(ENTRIES) == len(set(ENTRIES))
    assert sorted(set(ENTRIES) - cited()) == []
    assert sorted(cited() - set(ENTRIES)) == []


def test_the_bibliography_can_be_read():
    parsed = pybtex.database.parse_file(str(ROOT / "book" / "references.bib"))
    assert {key.casefold() for key in parsed.entries} == {key.casefold() for key in ENTRIES}


def test_no_work_has_two_entries():
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    titles = re.findall(r"^  title = (.+),$", re.sub(r"[{}]", "", text).casefold(), re.MULTILINE)
    assert len(titles) == len(ENTRIES)
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_every_corpus_has_its_licence_on_the_page_on_data(name):
    line = row_of(name)
    licence = corpora.ABOUT[name].licence.casefold()
    assert licence in line.casefold().replace("[", "").replace("]", "")
    if name in corpora.HUB:
        assert f"`{corpora.HUB[name][0]}`" in line
    if name != "tales":  # nobody is named as their translator
        assert "{cite:p}`" in line


def test_every_package_and_model_is_on_the_page_on_data():
    assert len(PINNED) >= 5
    for wheel in PINNED:
        assert f"{wheel.project} {wheel.version}" in PROSE["data.md"]
    for sources in profiles.HUB_ARCHITECTURES.values():
        assert sources[0].partition("@")[0] in PROSE["data.md"]


def test_what_a_licence_asks_for_is_said():
    attribution = PROSE["data.md"].partition("**Social IQa.**")[2].partition("\n\n")[0]
    for needed in (
        "Maarten Sap",
        "allenai.org/data/socialiqa",
        "creativecommons.org/licenses/by/4.0",
        "We have put",
    ):
        assert needed in attribution
    assert "*for research purposes only*" in PROSE["data.md"]
    assert "Reuters-21578, Distribution 1.0" in row_of("reuters")


MAPS = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), "running.md": PROSE["running.md"]}


@pytest.mark.parametrize("page", MAPS)
def test_the_map_leads_from_every_chapter_to_modules_that_it_imports(page):
    rows = re.findall(r"^\| (?:\{doc\}`../notebooks/|`)(\d\d_\w+)` \| (.*) \|$", MAPS[page], re.MULTILINE)
    chapters = listed_notebooks(ROOT)
    assert [name for name, _ in rows] == [path.stem for path in chapters]
    for path, (name, modules) in zip(chapters, rows, strict=True):
        imported = set(imported_files(nbformat.read(path, as_version=4)).values())
        for module in re.findall(r"`([^`]+)`", modules):
            place = ROOT / "unlearnlib" / module
            assert (place / "__init__.py" if module.endswith("/") else place) in imported, f"{name}: {module}"


@pytest.mark.parametrize("page", MAPS)
def test_the_rooms_are_those_of_the_library(page):
    [table] = re.findall(r"^\| Room of `unlearnlib` .*\n\|---\|---\|\n((?:\|.*\n)+)", MAPS[page], re.MULTILINE)
    rooms = {room for line in table.splitlines() for room in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert rooms == {path.stem for path in (ROOT / "unlearnlib").iterdir() if not path.name.startswith("__")}


@pytest.mark.parametrize("chapter", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_chapter_imports_at_most_eight_names_of_the_library_and_no_private_one(chapter):
    cells = json.loads(chapter.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for source in code for node in ast.walk(ast.parse(source))]
    lines = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("unlearnlib")]
    names = [name.name for line in lines for name in line.names]
    assert 1 <= len(names) <= 8
    used = {name.asname or name.name for line in lines for name in line.names}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    reached = [node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id in used]
    assert reached
    assert not [name for name in [*names, *reached] if name.startswith("_")]
