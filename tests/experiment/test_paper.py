import dataclasses
import re
from pathlib import Path

import pytest
from tiny_tales import TINY, tiny_cases

from unlearnlib import experiment
from unlearnlib.experiment.paper import PAPER, Paper

PAGE = Path(__file__).parents[2] / "book" / "paper.md"


def test_the_page_has_a_row_for_every_unknown_and_no_other():
    rows = re.findall(r"^\| .* \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(Paper))


def test_the_profile_gpu_obeys():
    profile, four = experiment.chapter("four_datasets", "gpu")
    assert (profile.model, profile.training, profile.forget) == (PAPER.model, PAPER.training, PAPER.forget)
    assert (four.corpora, four.m_recursion, four.block_size) == (PAPER.corpora, PAPER.gradients, PAPER.block_size)
    profile, _ = experiment.chapter("gradient_ascent", "gpu")
    assert (profile.length, profile.retain, profile.holdout) == (PAPER.length, PAPER.retain, PAPER.holdout)
    for name in ("fisher", "fisher_updates", "fair_fight", "case_studies"):
        _, sizes = experiment.chapter(name, "gpu")
        assert (sizes.m_recursion, sizes.block_size) == (PAPER.gradients, PAPER.block_size)
    _, private = experiment.chapter("dp_sgd", "gpu")
    assert private.epsilons == PAPER.epsilons
    _, series = experiment.chapter("repeated_requests", "gpu")
    assert (series.number, series.size) == (PAPER.requests, PAPER.request_size)


def test_what_is_not_known_is_not_given():
    assert Paper().given == ()
    assert Paper(damping=1e-3).given == (("fisher_recursion", "damping", 1e-3),)
    assert Paper(ascent_rate=0.1).given == (("gradient_ascent:sgd", "learning_rate", 0.1),)


@pytest.mark.parametrize(
    ("method", "knob"), [("gradient_ascent:sgd", "learning_rate"), ("fisher_recursion", "damping")]
)
def test_a_knob_that_is_given_has_no_other_value(tmp_path, method, knob):
    with tiny_cases(dataclasses.replace(TINY, given=((method, knob, 0.125),)), tmp_path) as [case]:
        contenders = experiment.contenders_on(case, experiment.curvature_builders(case.estimation, case.seed))
    assert contenders[method].knobs == {knob: (0.125,)}
    assert len(contenders["gradient_difference"].knobs["learning_rate"]) == 3
