"""The book at profile ``gpu`` on the CPU, without a network: small counterparts of the hub's models and data sets.

Whatever is not a size is as ``make book PROFILE=gpu`` has it: the runner, the notebooks, the readers of the hub's
corpora, the hub's own cache folder, half-precision sources, the architectures.
"""

import shutil
from pathlib import Path

import hub_fixtures
import pytest

from unlearnlib import cache
from unlearnlib.book.notebooks import listed_notebooks
from unlearnlib.book.schedule import run_notebooks

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of the hub's client, and one of ours that has the wheels: what is trained here has real names."""
    home = tmp_path_factory.mktemp("hub")
    hub_fixtures.write_hub(home)
    (home / "cache").mkdir()
    (home / "cache" / "wheels").symlink_to(cache.cache_folder() / "wheels")
    startup = home / "ipython" / "profile_default" / "startup" / "00-shrink.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(
        f"import sys\nsys.path.append({str(TESTS)!r})\nimport hub_fixtures\nhub_fixtures.shrink()\n"
    )
    return home


@pytest.fixture
def root(tmp_path):
    """The book in a folder of its own, where its results go."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("results"))
    for name in ("book", "_toc.yml", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch, hub):
    for name, value in {"HF_HOME": hub, "UNLEARNLIB_CACHE": hub / "cache", "IPYTHONDIR": hub / "ipython"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("name", [path.stem for path in listed_notebooks(ROOT)])
def test_a_chapter_runs_at_profile_gpu(root, name):
    assert run_notebooks(root, "gpu", [name]) == {}
