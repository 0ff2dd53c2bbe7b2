"""What runs on GitHub: it can only be linted here, by two linters that need no network."""

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs.macos
import platformdirs.unix
import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
PINNED = re.compile(r"[\w-]+/[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def values(node: Any, key: str) -> Iterator[Any]:
    """All that a document in YAML has under ``key``, however deep."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key)
    if isinstance(node, dict | list):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from values(inner, key)


def unpinned(workflow: str) -> list[str]:
    """The actions that are not named by a whole commit hash with the version in a comment."""
    used = list(values(yaml.safe_load(workflow), "uses"))
    assert used
    return [action for action in used if not PINNED.search(workflow[workflow.index(action) :].splitlines()[0])]


def findings(folder: Path) -> str:
    """What the linters say against ``folder/.github``; nothing if all is well."""
    schema = [sys.executable, "-m", "check_jsonschema", "--color", "never", "--builtin-schema"]
    zizmor = [Path(sysconfig.get_path("scripts")) / "zizmor", "--offline", "--no-config", "--color", "never"]
    commands = [
        [*schema, "vendor.github-workflows", *folder.glob(".github/workflows/*.yml")],
        [*schema, "vendor.dependabot", folder / ".github" / "dependabot.yml"],
        [*zizmor, "--persona", "pedantic", "--strict-collection", "--quiet", folder],
    ]
    done = [subprocess.run(command, capture_output=True, encoding="utf-8") for command in commands]
    return "\n".join(each.stdout + each.stderr for each in done if each.returncode)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    return tmp_path


def test_the_linters_find_nothing(copy):
    assert findings(copy) == ""


@pytest.mark.parametrize(
    ("file", "right", "wrong", "finding"),
    [
        ("workflows/newest.yml", "timeout-minutes:", "timeout-minute:", "'timeout-minute' was unexpected"),
        ("workflows/tests.yml", "pull_request:", "pullrequest:", "'pullrequest': None} is not valid"),
        ("workflows/pages.yml", "pages: read", "pages: reed", "'reed' is not one of"),
        ("workflows/tests.yml", "run: .ci/run", "run: echo ${{ github.head_ref }}", "[template-injection]"),
        ("workflows/pages.yml", "permissions: {}", "permissions: write-all", "[excessive-permissions]"),
        ("dependabot.yml", "interval: monthly", "interval: mothly", "'mothly' is not one of"),
    ],
)
def test_the_linters_can_find_something(copy, file, right, wrong, finding):
    path = copy / ".github" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong))
    assert finding in findings(copy)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned(path):
    assert unpinned(path.read_text()) == []


@pytest.mark.parametrize("wrong", ["@v7", "@main", "@" + "0" * 39, "@" + "0" * 40, "@" + "0" * 40 + " # v7"])
def test_the_check_of_pins_can_fail(wrong):
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    broken = re.sub(r"(actions/checkout)@.*", rf"\1{wrong}", workflow)
    assert [action.split("@")[0] for action in unpinned(broken)] == ["actions/checkout"]


def test_they_call_what_is_there():
    commands = "\n".join(run for path in WORKFLOWS for run in values(yaml.safe_load(path.read_text()), "run"))
    targets = re.findall(r"\bmake (\S+)", commands)
    assert set(targets) == {"book", "test"}
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    files = re.findall(r"(?:\.ci|tests)/\S+", commands)
    assert len(files) > 1
    assert all((ROOT / file).exists() for file in files)


def test_the_cache_that_is_kept_is_the_librarys(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    systems = platformdirs.unix.Unix, platformdirs.macos.MacOS
    folders = [system("unlearnlib").user_cache_dir for system in systems]
    kept = [
        step["with"]
        for path in WORKFLOWS
        for steps in values(yaml.safe_load(path.read_text()), "steps")
        for step in steps
        if step.get("uses", "").startswith("actions/cache@")
    ]
    assert len(kept) == 2
    assert kept[0] == kept[1]
    assert [str(Path(line).expanduser()) for line in kept[0]["path"].split()] == folders
