"""The first cell of every notebook, which fetches what is missing where nothing is installed, as on Colab."""

import builtins
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from test_notebooks import CHAPTERS

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
FIRST = nbformat.read(CHAPTERS[0], as_version=4).cells[0]


def run_first_cell(monkeypatch, tmp_path, installed, address=""):
    """What it runs, with the folder that it clones into made by hand."""
    ran = []

    def run(command, check):
        assert check
        ran.append([str(word).replace(str(tmp_path), "TMP") for word in command])
        if "clone" in command:
            (Path(command[-1]) / "notebooks").mkdir(parents=True)
            shutil.copy(PYPROJECT, command[-1])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(builtins, "input", lambda prompt: address)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    exec(FIRST.source, {})
    return ran


def test_every_notebook_begins_with_it_and_pages_do_not_show_it():
    for path in CHAPTERS:
        first = nbformat.read(path, as_version=4).cells[0]
        assert (first.source, first.metadata.tags) == (FIRST.source, ["remove-cell"]), path.name


def test_where_the_library_is_there_nothing_is_done(monkeypatch, tmp_path):
    assert run_first_cell(monkeypatch, tmp_path, installed=True) == []


@pytest.mark.parametrize(
    "address",
    [
        "https://colab.research.google.com/github/somebody/the-book/blob/main/notebooks/02_gradient_ascent.ipynb",
        " https://github.com/somebody/the-book?tab=readme-ov-file#readme\n",
        "github.com/somebody/the-book/tree/main/notebooks",
    ],
)
def test_elsewhere_the_repository_of_the_page_is_fetched_and_its_packages_installed(
    monkeypatch, tmp_path, address
):
    clone, install = run_first_cell(monkeypatch, tmp_path, installed=False, address=address)
    assert clone == ["git", "clone", "--quiet", "--depth", "1", "https://github.com/somebody/the-book", "TMP/book"]
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    assert install[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
    assert install[5:] == [*project["dependencies"], *project["optional-dependencies"]["notebooks"]]
    assert not [package for package in install[5:] if "==" in package]  # what is there stays, if it will do
    assert Path.cwd() == tmp_path / "book" / "notebooks"
    assert sys.path[0] == str(tmp_path / "book")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "https://github.com/somebody",
        "https://somebody.github.io/the-book/notebooks/02_gradient_ascent.html",
        "https://gist.github.com/somebody/1234",
        "https://example.org/github.com/somebody/the-book",
    ],
)
def test_an_address_that_names_no_repository_is_refused(monkeypatch, tmp_path, address):
    with pytest.raises(ValueError, match="is no address on GitHub"):
        run_first_cell(monkeypatch, tmp_path, installed=False, address=address)
