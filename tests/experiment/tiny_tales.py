"""A case so small that its models train in a moment, and a cache of its own for them."""

import contextlib
import dataclasses

import pytest

from unlearnlib.experiment import case, profiles
from unlearnlib.models import loading
from unlearnlib.models.training import Training

TINY = dataclasses.replace(
    profiles.PROFILES["quick"],
    corpus="tales",
    model=loading.small_opt(300, hidden_size=16, layers=1, heads=2),
    vocabulary=300,
    length=24,
    forget=6,
    retain=30,
    holdout=10,
    training=Training(epochs=2, learning_rate=1e-2),
    seeds=(0,),
)


@contextlib.contextmanager
def tiny_cases(profile, folder):
    """The cases of ``profile``, on tales of the user's cache; models trained within go to ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        corpus = case.load_corpus("tales")
        patch.setattr(case, "load_corpus", lambda name: corpus)
        patch.setenv("UNLEARNLIB_CACHE", str(folder))
        yield case.make_cases(profile)
