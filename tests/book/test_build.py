"""The settings that the book is rendered with."""

import subprocess

import pytest

from unlearnlib.book import build
from unlearnlib.book.pages import repository, with_repository


@pytest.mark.parametrize("profile", ["cpu", "quick"])
def test_results_unlike_the_reference_fail_the_build_once_the_pages_are_made(tmp_path, monkeypatch, profile):
    made = []
    monkeypatch.setattr(build, "run_notebooks", lambda *_: {})
    monkeypatch.setattr(build, "render", lambda *_: made.append(1) or tmp_path / "index.html")
    monkeypatch.setattr(build, "disagreements", lambda folder: ["`one`: 8 of 10 means ..."])
    if profile == "quick":
        assert build.make_book(tmp_path, profile) == tmp_path / "index.html"
    else:
        with pytest.raises(build.BuildError, match=r"do not agree(.|\n)*`one`: 8 of 10(.|\n)*The book is at"):
            build.make_book(tmp_path, profile)
    assert made


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/somebody/book.git",
        "https://github.com/somebody/book",
        "https://name:token@github.com/somebody/book.git",
        "git@github.com:somebody/book.git",
        "ssh://git@github.com:22/somebody/book.git",
    ],
)
def test_the_repository_is_that_of_the_remote(tmp_path, address):
    checkout(tmp_path, address)
    assert repository(tmp_path) == ("https://github.com/somebody/book", "published")
    settings = with_repository({"html": {}}, tmp_path)
    assert settings["repository"] == {"url": "https://github.com/somebody/book", "branch": "published"}
    assert settings["html"]["use_repository_button"]
    assert settings["launch_buttons"]["colab_url"]


@pytest.mark.parametrize("address", ["/home/somebody/book", "../book.git", "file:///srv/book.git", None])
def test_a_remote_that_is_no_place_on_the_web_gets_no_buttons(tmp_path, address):
    checkout(tmp_path, address)
    assert repository(tmp_path) is None
    assert with_repository({"html": {}}, tmp_path) == {"html": {}}


def test_a_folder_outside_git_gets_no_buttons(tmp_path):
    assert repository(tmp_path) is None


def test_a_host_that_the_launchers_do_not_know_gets_no_launch_buttons(tmp_path):
    checkout(tmp_path, "https://git.example.org/somebody/book.git")
    settings = with_repository({"html": {}}, tmp_path)
    assert settings["repository"]["url"] == "https://git.example.org/somebody/book"
    assert "launch_buttons" not in settings


def checkout(folder, address):
    subprocess.run(["git", "init", "-q", "-b", "published", folder], check=True)
    if address:
        subprocess.run(["git", "-C", folder, "remote", "add", "origin", address], check=True)
