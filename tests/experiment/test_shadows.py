import dataclasses

import pytest
import torch
from tiny_tales import TINY, tiny_cases

from unlearnlib.experiment.shadows import Shadows
from unlearnlib.losses import batched, sequence_losses
from unlearnlib.models.training import Training

PROFILE = dataclasses.replace(TINY, holdout=11)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    with tiny_cases(PROFILE, tmp_path_factory.mktemp("cache")) as [only]:
        yield only


def test_every_sequence_is_inside_of_half_of_the_models_and_each_trains_on_what_it_says(case):
    shadows = Shadows(case, 6)
    inside = shadows.inside
    assert inside.shape == (6, 17)
    assert (inside.sum(dim=0) == 3).all()
    assert torch.equal(inside, Shadows(case, 6).inside)
    for run, mine in zip(shadows.runs(), inside, strict=True):
        assert torch.equal(run.sequences, torch.cat([case.splits.retain, shadows.pool[mine]]))
    assert len({run.folder for run in shadows.runs()}) == 6


def test_scores_come_from_models_of_which_some_know_a_text(case):
    trained = dataclasses.replace(case.profile, training=Training(epochs=60, learning_rate=2e-2))
    shadows = Shadows(dataclasses.replace(case, profile=trained), 4)
    losses = shadows.scores(lambda model, rows: batched(sequence_losses, model, rows))
    assert losses.shape == (4, 17)
    assert losses[shadows.inside].mean() < losses[~shadows.inside].mean() - 0.5


@pytest.mark.parametrize("number", [2, 5])
def test_an_odd_number_or_too_few_are_refused(case, number):
    with pytest.raises(ValueError, match="even number of shadow models"):
        Shadows(case, number)
