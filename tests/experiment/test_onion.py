import dataclasses

import pytest
import torch
from tiny_tales import TINY, tiny_cases

from unlearnlib.experiment import onion
from unlearnlib.experiment.shadows import Shadows
from unlearnlib.models.training import Training

PROFILE = dataclasses.replace(
    TINY, forget=20, retain=24, holdout=20, training=Training(epochs=20, batch_size=16, learning_rate=1e-2)
)
SIZES = {"m_factors": 16, "m_recursion": 16, "block_size": 16}


@pytest.fixture(scope="module")
def peel(tmp_path_factory):
    with tiny_cases(PROFILE, tmp_path_factory.mktemp("cache")) as [case]:
        yield onion.Onion(case, shadows=4, size=5, draws=2, repeats=2)


@pytest.fixture(scope="module")
def measured(peel):
    return peel.trained("original"), {layer: peel.trained("retrained", layer) for layer in peel.layers}


def test_memorisation_and_the_attack_use_those_shadows_that_saw_a_sequence_and_those_that_did_not(peel):
    inside, losses = Shadows(peel.case, 4).inside, peel.shadow_losses
    for i in (0, 7, 33):
        assert torch.allclose(peel.outside[:, i].sort().values, losses[~inside[:, i], i].sort().values)
    expected = losses[~inside[:, 3], 3].mean() - losses[inside[:, 3], 3].mean()
    assert torch.isclose(peel.memorisation[3], expected)
    assert peel.memorisation.mean() > 0.05
    score = peel.scores(torch.zeros(40))
    assert torch.allclose(score[33], losses[~inside[:, 33], 33].mean())


def test_the_targeted_layer_is_what_is_remembered_best_and_nobody_compared_is_in_a_layer(peel):
    layers = peel.layers
    assert list(layers) == ["targeted", "random:1", "random:2"]
    rest = torch.ones(20, dtype=torch.bool)
    rest[layers["targeted"]] = False
    assert peel.memorisation[layers["targeted"]].min() >= peel.memorisation[rest].max()
    assert not torch.equal(layers["random:1"], layers["random:2"])
    taken = set(torch.cat(list(layers.values())).tolist())
    assert set(peel.staying.tolist()) == set(range(20)) - taken


def test_requests_of_a_repeat_share_one_original_and_retrain_without_their_layer(peel):
    case, one, other = peel.case, peel.request("targeted", 1), peel.request("random:1", 1)
    assert one.runs()["original"].folder == other.runs()["original"].folder
    assert peel.request("targeted").runs()["original"].folder == case.runs()["original"].folder
    assert one.runs()["original"].folder != case.runs()["original"].folder
    layer = peel.layers["targeted"].tolist()
    kept = [row for i, row in enumerate(case.splits.forget.tolist()) if i not in layer]
    assert one.runs()["retrained"].sequences.tolist() == kept + case.splits.retain.tolist()
    assert torch.equal(one.splits.forget, case.splits.forget[layer])
    assert one.validation.tolist() == case.splits.retain[-len(one.validation) :].tolist()  # never removed


def test_what_is_found_is_above_all_but_some_strangers(peel, measured):
    losses = measured[0]
    found, scores = peel.found(losses, 0.1), peel.scores(losses)
    for row, of_row in zip(found, scores, strict=True):
        threshold = of_row[20:].sort().values[-2:].mean()  # near it: two of twenty strangers are above
        assert (of_row[20:] > of_row[:20][row].min()).sum() <= 2
        assert row.sum() >= (of_row[:20] > threshold + 1).sum()
    assert peel.found(losses, 0.5).sum() >= found.sum()
    assert found.float().mean() > 0.2  # members are found more often than strangers


def test_a_method_that_does_what_retraining_does_has_the_same_rows(peel, measured):
    original, retrained = measured
    match = onion.Match(1.0, 0.0, True, 1)
    served = {("targeted", repeat): {"copy": (retrained["targeted"][repeat], match)} for repeat in range(2)}
    rows = onion.results(peel, original, retrained, served, 0.1)
    by_key = {(row["method"], row["layer"], row["metric"]): row["value"] for row in rows}
    assert len(by_key) == len(rows)
    for metric in ("found_staying", "newly_found", "rise", "fidelity", "fidelity_crossed", "forget_loss"):
        assert by_key["copy", "targeted", metric] == by_key["retrained", "targeted", metric]
    assert by_key["copy", "targeted", "reached"] == 1
    stays = peel.staying
    rises = (original - retrained["targeted"])[:, stays]
    assert by_key["retrained", "targeted", "rise"] == pytest.approx(rises.double().mean().item(), abs=1e-6)
    # With two repeats each is compared with the other.
    assert by_key["retrained", "targeted", "fidelity"] == pytest.approx(onion.fidelity(*rises))
    crossed = [
        onion.fidelity(rises[repeat], (original - retrained[layer])[1 - repeat, stays])
        for repeat in range(2)
        for layer in ("random:1", "random:2")
    ]
    assert by_key["retrained", "targeted", "fidelity_crossed"] == pytest.approx(sum(crossed) / 4)


def test_a_method_is_served_at_matched_forgetting(peel, measured):
    retrained = measured[1]["targeted"][0]
    served = onion.serve(peel, "targeted", 0, {"gradient_ascent": {}}, retrained, 20)
    losses, match = served["gradient_ascent"]
    layer = peel.layers["targeted"]
    assert match.reached
    assert losses[layer].mean().item() == pytest.approx(retrained[layer].mean().item(), abs=0.011)


def test_much_damping_makes_every_curvature_ascent(peel, measured):
    original, retrained = measured[0], measured[1]["targeted"]
    rows = onion.fidelity_by_damping(peel, "fisher_diagonal", (1e-4, 1e4), original, retrained, 1)
    losses, _ = onion.serve(peel, "targeted", 0, {"gradient_ascent": {}}, retrained[0], 20)["gradient_ascent"]
    rise, goal = (original[0] - losses)[peel.staying], (original[1] - retrained[1])[peel.staying]
    assert [row["damping"] for row in rows] == [1e-4, 1e4]
    assert rows[1]["value"] == pytest.approx(onion.fidelity(rise, goal), abs=0.1)


def test_the_search_for_a_damping_begins_where_it_is_told_to(peel):
    request, grid = peel.request("targeted"), (1e-3, 1e-1, 1e1)
    found = onion.request_contenders(request, ["kfac", "gradient_difference"], 5, grid, **SIZES)
    assert found["kfac"].knobs == {"damping": grid}
    assert "damping" not in found["gradient_difference"].knobs


def test_fidelity_is_of_ranks_and_ignores_a_shift():
    rise = torch.tensor([0.1, 0.4, 0.2, 0.9])
    assert onion.fidelity(rise, rise**3 + 5) == pytest.approx(1)
    assert onion.fidelity(rise - 2, -rise) == pytest.approx(-1)
    with pytest.raises(ValueError, match="nothing to correlate"):
        onion.fidelity(rise, torch.ones(4))


def test_a_repeat_is_left_out_of_the_mean():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]])
    assert onion.without_one(values, 1).tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 0}, "a layer of 0"), ({"size": 18}, "leave at least 3"), ({"repeats": 1}, "2 repeats or more")],
)
def test_an_onion_that_cannot_be_peeled_is_refused(peel, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(peel, **change)
