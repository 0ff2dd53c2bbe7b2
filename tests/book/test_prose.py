import numpy as np
import pytest
import torch

from unlearnlib.book import prose
from unlearnlib.experiment import chapters
from unlearnlib.experiment.profiles import PROFILES


@pytest.fixture(autouse=True)
def as_its_text_knows_it(monkeypatch):
    """Other tests of this process may have asked chapters for more."""
    monkeypatch.setattr(chapters, "_DEPARTURES", set())
    monkeypatch.setattr(chapters, "OWN_CORPORA", {})


@pytest.fixture
def told(monkeypatch):
    kept = {}
    monkeypatch.setattr(prose, "glue", lambda name, value, display: kept.update({name: (value, display)}))
    return kept


def test_names_can_be_quoted_and_numbers_are_pythons(told):
    prose.tell({"kfac:held_share": np.float64(0.5), "1e-06": torch.tensor(3)}, seeds="2 seeds")
    assert told == {"kfac_held_share": (0.5, False), "1e_06": (3, False), "seeds": ("2 seeds", False)}
    assert type(told["kfac_held_share"][0]) is float


def test_two_names_that_become_one_are_refused(told):
    with pytest.raises(ValueError, match="could not tell 'a_b' from another"):
        prose.tell({"a:b": 1, "a_b": 2})
    with pytest.raises(ValueError, match="'seeds'"):
        prose.tell({"seeds": 1}, seeds=2)
    assert told == {}  # nothing is kept by halves


def shown_by(monkeypatch):
    shown = []
    monkeypatch.setattr(prose, "display", lambda page: shown.append(page.data))
    return shown


@pytest.mark.parametrize("profile", PROFILES)
def test_what_holds_is_said_without_ado(monkeypatch, profile):
    shown = shown_by(monkeypatch)
    prose.expect(profile, "one is less than two", np.bool_(True))
    assert shown == []


@pytest.mark.parametrize("profile", ["quick"])
def test_the_text_is_held_to_what_it_was_written_for(profile):
    with pytest.raises(AssertionError, match="the text says that one is less than two; in this run it is not so"):
        prose.expect(profile, "one is less than two", np.bool_(False))


def test_a_run_that_nobody_has_seen_corrects_the_text(monkeypatch):
    shown = shown_by(monkeypatch)
    prose.expect("gpu", "one is less than two", False)
    assert shown == ["**Otherwise in this run.** The text says that one is less than two. Here it is not so."]


@pytest.mark.parametrize("given", [{"corpus": "maths"}, {"seeds": 2}, {"retain": 64}, {"model": "some/model"}])
def test_so_does_a_run_of_other_parameters(monkeypatch, given):
    shown = shown_by(monkeypatch)
    chapters.chapter("fisher", "quick", **given)
    prose.expect("quick", "one is less than two", False)
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("fisher", {}),
        ("fisher", {"corpus": "reuters", "seeds": 1, "model": None}),  # the profile's own, by their names
        ("four_datasets", {"corpus": "maths"}),  # one of the four
    ],
)
def test_a_run_of_what_the_profile_has_is_held_to_the_text(name, given):
    chapters.chapter(name, "quick", **given)
    with pytest.raises(AssertionError):
        prose.expect("quick", "one is less than two", False)


def test_every_profile_is_one_or_the_other():
    assert set(PROFILES) - set(prose.WRITTEN_FOR) == {"cpu", "gpu"}
