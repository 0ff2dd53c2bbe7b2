import numpy as np
import pytest
import torch

from unlearnlib.book import prose
from unlearnlib.experiment.profiles import PROFILES


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


@pytest.mark.parametrize("profile", PROFILES)
def test_what_does_not_hold_is_corrected_on_the_page(monkeypatch, profile):
    shown = shown_by(monkeypatch)
    prose.expect(profile, "two is less than one", np.bool_(False))
    said = "The text says that two is less than one. Here it is not so."
    assert shown == [f"**Otherwise in this run** (profile `{profile}`). {said}"]
