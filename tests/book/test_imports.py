"""Which modules a notebook depends on, and that it is run again for these alone."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_notebooks import make_root

from unlearnlib.book.imports import imported_files
from unlearnlib.book.notebooks import listed_notebooks, plan

ROOT = Path(__file__).parents[2]
LIBRARY = {
    "unlearnlib/__init__.py": "",
    "unlearnlib/ground.py": "",
    "unlearnlib/alone.py": "",
    "unlearnlib/room/__init__.py": "from unlearnlib.room.face import public",
    "unlearnlib/room/face.py": "public = 1",
    "unlearnlib/room/inner.py": "from unlearnlib import ground",
    "unlearnlib/verdicts/__init__.py": "REFERENCE = 'book/results'",
    "unlearnlib/reader.py": "from unlearnlib import verdicts\nknown = verdicts.REFERENCE",
}
FACE = ["unlearnlib", "unlearnlib.room", "unlearnlib.room.face"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with a library of the same name, which is the one that ``import`` finds."""
    make_root(
        tmp_path,
        face=["from unlearnlib.room import public"],
        inner=["import unlearnlib.room.inner"],
        reader=["from unlearnlib import reader"],
        compares=["from unlearnlib import verdicts\nverdicts.REFERENCE_PROFILE"],
        path=["folder = '../book/results'"],
    )
    for name, code in LIBRARY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.delitem(sys.modules, "unlearnlib")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def rerun(root, changed, profile="quick"):
    """The notebooks that a comment in the file ``changed`` makes run again."""
    before = {job.name: job.key for job in plan(root, profile)}
    (root / changed).parent.mkdir(parents=True, exist_ok=True)
    with open(root / changed, "a") as file:
        file.write("\n# a comment\n")
    return {job.name for job in plan(root, profile) if job.key != before[job.name]}


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import numpy, unlearnlib_else", []),
        ("import unlearnlib", ["unlearnlib"]),
        ("from unlearnlib import room", FACE),
        ("from unlearnlib.room import public", FACE),
        ("from unlearnlib.room.face import public as p", FACE),
        (
            "def late():\n    import unlearnlib.room.inner as i",
            [*FACE, "unlearnlib.room.inner", "unlearnlib.ground"],
        ),
        ("%matplotlib inline\n!ls\nfrom unlearnlib import alone", ["unlearnlib", "unlearnlib.alone"]),
        ("%%time\nfrom unlearnlib import alone", ["unlearnlib", "unlearnlib.alone"]),
        ("%time from unlearnlib import alone", ["unlearnlib", "unlearnlib.alone"]),
        ("from unlearnlib import alone\n)", []),
    ],
)
def test_importing_a_module_imports_its_rooms_and_all_that_these_import(root, code, modules):
    files = imported_files(
        new_notebook(cells=[new_markdown_cell("import unlearnlib.ground"), new_code_cell(code)])
    )
    assert sorted(files) == sorted(modules)
    for module, path in files.items():
        assert path.relative_to(root).as_posix() in (
            f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")
        )
        assert path.is_file()


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ("unlearnlib/__init__.py", {"face", "inner", "reader", "compares"}),
        ("unlearnlib/room/face.py", {"face", "inner"}),
        ("unlearnlib/ground.py", {"inner"}),
        ("unlearnlib/alone.py", set()),
        ("book/results/table.csv", {"reader", "path"}),
        ("book/index.md", set()),
        ("requirements.txt", {"face", "inner", "reader", "compares", "path"}),
    ],
)
def test_a_notebook_runs_again_for_what_it_depends_on_and_nothing_else(root, changed, names):
    assert rerun(root, changed) == names


def test_at_the_profile_of_the_reference_every_chapter_depends_on_it(root):
    assert rerun(root, "book/results/table.csv", "cpu") == {"face", "inner", "reader", "compares", "path"}


def test_the_chapters_depend_on_what_they_use():
    files = {path.name[:2]: imported_files(nbformat.read(path, as_version=4)) for path in listed_notebooks(ROOT)}
    assert all(modules["unlearnlib"] == ROOT / "unlearnlib" / "__init__.py" for modules in files.values())
    assert "unlearnlib.verdicts.claims" in files["23"]
    assert "unlearnlib.verdicts.claims" not in files["02"]
    assert "unlearnlib.own.fulfilment" in files["22"]
    assert all("unlearnlib.book.build" not in modules for modules in files.values())
    weights = {chapter for chapter, modules in files.items() if "unlearnlib.weights" in modules}
    assert weights == files.keys()
