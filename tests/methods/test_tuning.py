import math

import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib.methods import matching, tuning


class Bowl:
    """A path whose validation loss is known in closed form: the loss of the model is a function of the knobs."""

    def __init__(self, model, cost, reached=True, ends=0.0):
        self.model, self.start, self.cost, self.reached, self.ends = model, {}, cost, reached, ends

    def to(self, target):
        self.model.cost = self.cost
        return matching.Match(1.0, target if self.reached else self.ends, self.reached, 1)


@pytest.fixture
def tried(monkeypatch):
    """What is tried, in order; the validation loss is what the path says."""
    monkeypatch.setattr(tuning, "mean_loss", lambda model, rows: model.cost)
    return []


def bowl(tried, minimum, reaches=lambda setting: True, ends=lambda setting: 0.0):
    """A quadratic in the logarithms of the knobs, lowest at ``minimum``."""

    class Model:
        def parameters(self):
            return iter(())

        named_parameters = parameters

    def path(**setting):
        tried.append(setting)
        cost = sum(math.log(setting[name] / value) ** 2 for name, value in minimum.items())
        return Bowl(Model(), cost, reaches(setting), ends(setting))

    return path


GRID = (0.1, 1.0, 10.0)


def choose(path, knobs, most=12, target=4.0):
    return tuning.choose(knobs, path, torch.empty(0, 2), target, most)


def test_a_minimum_within_the_grid_costs_the_grid_and_no_more(tried):
    choice = choose(bowl(tried, {"damping": 1.0}), {"damping": GRID})
    assert (choice.setting, choice.tried, choice.at_edge) == ({"damping": 1.0}, 3, ())
    assert choice.reached


@pytest.mark.parametrize("minimum", [1e-4, 1e3])
def test_a_grid_is_widened_until_its_best_is_inside(tried, minimum):
    choice = choose(bowl(tried, {"damping": minimum}), {"damping": GRID})
    assert choice.setting["damping"] == pytest.approx(minimum)
    assert choice.at_edge == ()
    values = sorted(setting["damping"] for setting in tried)
    assert values[0] < 0.9 * minimum < 1.1 * minimum < values[-1]


def test_where_the_settings_run_out_the_edge_is_told(tried):
    choice = choose(bowl(tried, {"damping": 1e9}), {"damping": GRID}, most=5)
    assert choice.tried == 5
    assert choice.at_edge == ("damping",)
    assert choice.setting["damping"] == pytest.approx(1000.0)


def test_two_knobs_are_searched_in_turn_to_the_joint_minimum_and_nothing_twice(tried):
    knobs = {"learning_rate": (1e-4, 4e-4, 1.6e-3), "retain_weight": (1.0, 4.0, 16.0)}
    choice = choose(bowl(tried, {"learning_rate": 1e-4, "retain_weight": 64.0}), knobs, most=20)
    assert choice.setting == pytest.approx({"learning_rate": 1e-4, "retain_weight": 64.0})
    assert choice.at_edge == ()
    assert len({tuple(setting.values()) for setting in tried}) == len(tried) == choice.tried


def test_a_setting_that_misses_is_worse_than_any_that_reaches(tried):
    path = bowl(tried, {"damping": 1.0}, reaches=lambda setting: setting["damping"] > 5)
    choice = choose(path, {"damping": GRID}, most=6)
    assert choice.setting["damping"] == 10.0
    assert choice.reached


def test_if_all_miss_the_closest_is_taken_and_said_to_miss(tried):
    path = bowl(
        tried, {"damping": 1.0}, reaches=lambda _: False, ends=lambda setting: -abs(setting["damping"] - 10)
    )
    choice = choose(path, {"damping": GRID}, target=0.0)
    assert choice.setting["damping"] == 10.0
    assert not choice.reached


@pytest.mark.parametrize("breakdown", [matching.LeadsNowhere("nan"), FloatingPointError("inf")])
def test_a_setting_at_which_numbers_break_down_is_the_worst_and_is_told(tried, breakdown):
    inside = bowl(tried, {"damping": 1e-9}, reaches=lambda _: False)

    def path(damping):
        if damping < 1:
            raise breakdown
        return inside(damping=damping)

    choice = choose(path, {"damping": GRID}, target=5.0)
    assert choice.setting["damping"] >= 1.0
    table = choice.table.set_index("damping")
    assert math.isnan(table.loc[0.1, "validation_loss"])
    assert not table["reached"].any()


def test_a_method_without_knobs_is_tried_once(tried):
    choice = choose(bowl(tried, {}), {})
    assert (choice.setting, choice.tried, choice.at_edge) == ({}, 1, ())


def test_a_knob_of_one_value_is_given_and_the_others_are_searched(tried):
    path = bowl(tried, {"damping": 1e6, "rate": 1.0})
    choice = choose(path, {"damping": (0.5,), "rate": GRID})
    assert (choice.setting, choice.tried, choice.at_edge) == ({"damping": 0.5, "rate": 1.0}, 3, ())
    assert {setting["damping"] for setting in tried} == {0.5}
    choice = choose(bowl(tried, {"damping": 1e6}), {"damping": (0.5,)}, most=1)
    assert (choice.setting, choice.at_edge) == ({"damping": 0.5}, ())


@pytest.mark.parametrize("grid", [(), (1.0, 10.0), (10.0, 1.0, 0.1), (0.0, 1.0, 2.0), (1.0, 2.0, 10.0)])
def test_other_grids_are_refused(tried, grid):
    with pytest.raises(ValueError, match="damping is no ascending geometric"):
        choose(bowl(tried, {"damping": 1.0}), {"damping": grid})


def test_too_few_settings_are_refused_before_any_is_tried(tried):
    with pytest.raises(ValueError, match="allow 5 or more"):
        choose(bowl(tried, {"a": 1.0, "b": 1.0}), {"a": GRID, "b": GRID}, most=4)
    assert tried == []


def test_a_model_is_left_where_it_started_and_its_passes_are_counted():
    model, forget = tiny_model(), random_sequences(4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    direction = {name: torch.ones_like(p) for name, p in before.items()}
    loss = matching.mean_loss(model, forget)
    choice = tuning.choose(
        {"scale": GRID},
        lambda scale: matching.Line(model, {name: scale * d for name, d in direction.items()}, forget),
        random_sequences(3, seed=1),
        loss + 0.3,
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert choice.table["reached"].all()
    assert choice.plain_passes >= 3 * len(forget) / 3
    # However long the direction, the place at the target is the same.
    assert choice.table["validation_loss"].max() - choice.table["validation_loss"].min() < 0.05


def test_a_search_takes_the_smallest_worth_whatever_the_trial_tells():
    """Trials that train a model have no target to miss; one that diverged is worth less than any other."""
    losses = {1.0: math.nan, 2.0: 3.0, 4.0: 2.0, 8.0: 2.5}

    def trial(rate):
        matching.mean_loss(tiny_model(), random_sequences(5))
        return (False, losses[rate]), {"loss": losses[rate]}

    choice = tuning.search({"rate": (1.0, 2.0, 4.0)}, trial, most=4)
    assert choice.setting == {"rate": 4.0}
    assert choice.at_edge == ()
    assert list(choice.table.columns) == ["rate", "loss", "plain_passes"]
    assert choice.table["rate"].tolist() == [2.0, 1.0, 4.0, 8.0]
    assert choice.table["plain_passes"].tolist() == [5 / 3] * 4


def test_settings_that_are_all_equally_bad_do_not_draw_the_search_after_them(tried):
    path = bowl(tried, {"damping": 1.0}, reaches=lambda _: False, ends=lambda _: 1.0)
    choice = choose(path, {"damping": GRID}, target=0.0)
    assert (choice.setting, choice.tried) == ({"damping": 1.0}, 3)


def test_a_setting_whose_validation_loss_is_no_number_has_missed(tried, monkeypatch):
    monkeypatch.setattr(tuning, "mean_loss", lambda model, rows: math.nan)
    choice = choose(bowl(tried, {"damping": 1.0}), {"damping": GRID})
    assert not choice.reached
