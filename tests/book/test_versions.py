"""The pins of the book against the ranges of the library, and both against the page on versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LIBRARY = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["notebooks"]]
RANGES = [*LIBRARY, *(Requirement(text) for text in EXTRAS["book"] + EXTRAS["test"])]
PINS = [
    Requirement(line)
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
PAGE = (ROOT / "book" / "versions.md").read_text(encoding="utf-8")


def lower_end(requirement):
    [low] = [each.version for each in requirement.specifier if each.operator == ">="]
    return low


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_every_pin_lies_in_its_range(wanted):
    if wanted.name == PROJECT["name"]:
        return
    pinned = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
    assert pinned
    for pin in pinned:  # one for each range of Python versions
        [exact] = pin.specifier
        assert exact.operator == "=="
        assert wanted.specifier.contains(exact.version), f"{pin} is not in {wanted}"


def test_what_the_library_and_the_chapters_need_is_a_range_with_a_lower_end():
    assert all(lower_end(wanted) for wanted in LIBRARY)


def test_the_page_has_the_lower_ends_and_the_pins():
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \| (.+?) \|$", PAGE, re.MULTILINE)
    assert [(name, low) for name, low, _ in rows] == [(each.name, lower_end(each)) for each in LIBRARY]
    for name, _, said in rows:
        pinned = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(name)]
        assert re.findall(r"\d[\d.]*\w*", said) == [next(iter(pin.specifier)).version for pin in pinned]


def test_binder_and_the_container_have_a_python_that_will_do():
    will_do = SpecifierSet(PROJECT["requires-python"])
    [binder] = re.fullmatch(r"python-(3\.\d+)\n", (ROOT / ".binder" / "runtime.txt").read_text()).groups()
    recipe = (ROOT / ".container" / "Dockerfile").read_text(encoding="utf-8")
    [container] = re.findall(r"^FROM python:(3\.\d+)-slim-\w+@sha256:[0-9a-f]{64}$", recipe, re.MULTILINE)
    assert will_do.contains(binder)
    assert will_do.contains(container)
