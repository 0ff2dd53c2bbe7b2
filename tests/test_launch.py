"""The first cell of every notebook, which fetches what is missing where nothing is installed, as on Colab."""

import builtins
import importlib.util
import sys

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from test_notebooks import CHAPTERS

FIRST = nbformat.read(CHAPTERS[0], as_version=4).cells[0]


class Shell:
    """Notes what a cell would run."""

    def __init__(self):
        self.ran = []

    def system(self, command):
        self.ran.append(command)

    def run_line_magic(self, name, line):
        self.ran.append(f"%{name} {line}")

    def var_expand(self, text):
        return text


def run_first_cell(monkeypatch, installed, address=""):
    shell = Shell()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(builtins, "input", lambda prompt: address)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {"get_ipython": lambda: shell}
    exec(TransformerManager().transform_cell(FIRST.source), namespace)
    return [command.format(**namespace) for command in shell.ran]


def test_every_notebook_begins_with_it_and_pages_do_not_show_it():
    for path in CHAPTERS:
        first = nbformat.read(path, as_version=4).cells[0]
        assert (first.source, first.metadata.tags) == (FIRST.source, ["remove-cell"]), path.name


def test_where_the_library_is_there_nothing_is_done(monkeypatch):
    assert run_first_cell(monkeypatch, installed=True) == []


@pytest.mark.parametrize(
    "address",
    [
        "https://colab.research.google.com/github/somebody/the-book/blob/main/notebooks/02_gradient_ascent.ipynb",
        "https://github.com/somebody/the-book",
    ],
)
def test_elsewhere_the_repository_of_the_page_is_fetched_and_its_packages_installed(monkeypatch, address):
    assert run_first_cell(monkeypatch, installed=False, address=address) == [
        "git clone --quiet --depth 1 https://github.com/somebody/the-book /tmp/the-book",
        "%pip install --quiet --requirement /tmp/the-book/requirements.txt",
        "%cd -q /tmp/the-book/notebooks",
    ]


@pytest.mark.parametrize("address", ["", "https://example.org/book", "https://github.com/somebody"])
def test_an_address_that_names_no_repository_is_refused(monkeypatch, address):
    with pytest.raises(ValueError, match="does not say which repository"):
        run_first_cell(monkeypatch, installed=False, address=address)
