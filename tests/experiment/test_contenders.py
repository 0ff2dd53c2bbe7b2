import pytest
import torch
from helpers import random_sequences, tiny_model

from unlearnlib import weights
from unlearnlib.experiment import contenders
from unlearnlib.experiment.curvatures import curvature_builders
from unlearnlib.losses import counted_passes, mean_loss


class ToyCase:
    """What contenders ask of a case, on a model that knows nothing."""

    seed = 0

    class profile:
        given = ()

    class splits:
        forget = random_sequences(6)
        retain = random_sequences(24, seed=1)

    estimation = random_sequences(20, seed=1)

    def original(self):
        return tiny_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def all_of_them():
    case = ToyCase()
    builds = curvature_builders(case.estimation, m=8, m_recursion=8, block_size=8)
    return case, contenders.contenders_on(case, builds)


def test_every_contender_forgets_with_the_setting_in_the_middle(all_of_them):
    case, everyone = all_of_them
    before = mean_loss(case.original(), case.splits.forget)
    for method, contender in everyone.items():
        if method == "finetuned":  # never looks at what is to be forgotten
            assert contender.reads == "retain"
            continue
        path = contender.path(**{name: grid[len(grid) // 2] for name, grid in contender.knobs.items()})
        match = path.to(before + 0.05)
        assert mean_loss(path.model, case.splits.forget) == pytest.approx(match.loss, abs=1e-6), method
        # Where nothing has been learnt, activations carry nothing to be lost, and no text teaches another.
        if method not in ("rmu", "gradient_ascent:repaired"):
            assert match.reached, method
            assert match.loss == pytest.approx(before + 0.05, abs=0.011), method


def test_a_curvature_is_built_once_and_each_path_starts_at_the_original(all_of_them):
    case, _ = all_of_them
    built = []
    builder = curvature_builders(case.estimation, m=8)["fisher_dual"]

    def build(model):
        built.append(model)
        return builder(model)

    path = contenders.removal(case, "fisher_dual", build).path
    before = mean_loss(case.original(), case.splits.forget)
    first = path(damping=1e-3)
    first.to(before + 0.05)
    second = path(damping=1e-2)
    assert second.to(before).strength == 0
    assert len(built) == 1


def test_one_product_goes_along_kfac_and_more_lead_elsewhere(all_of_them):
    case, everyone = all_of_them
    newton = everyone["newton_cg:kfac"].path
    builds = curvature_builders(case.estimation)
    kfac = contenders.removal(case, "kfac", builds["kfac"]).path(damping=1e-3).direction
    assert weights.cosine(newton(damping=1e-3, products=1.0).direction, kfac) == pytest.approx(1, abs=1e-4)
    assert weights.cosine(newton(damping=1e-3, products=4.0).direction, kfac) < 0.999


def test_the_natural_step_has_theorys_strength_and_takes_eight_products_with_all_that_stays(all_of_them):
    case, _ = all_of_them
    built, builder = [], curvature_builders(case.estimation)["kfac"]

    def build(model):
        built.append(model)
        return builder(model)

    newton = contenders.beyond(case, build)["newton_cg:natural"].path
    newton(damping=1e-2)
    with counted_passes() as passes:
        path = newton(damping=1e-3)
    assert passes.plain == pytest.approx(2 * 8 * len(case.estimation))
    assert len(built) == 1
    assert path.share == 6 / 24
    before = mean_loss(case.original(), case.splits.forget)
    match = path.to(before + 0.05)
    assert match.reached
    step = path.solve(1 / match.strength)
    moved = weights.difference(weights.snapshot(path.model), path.start)
    assert weights.norm(moved) == pytest.approx(6 / 24 * weights.norm(step), rel=1e-3)
    again = newton(damping=1e-3)  # from the original, whatever was done to the model
    assert again.to(before).strength == 0


def test_steps_of_removal_each_have_their_own_curvature(all_of_them):
    case, _ = all_of_them
    seen = []
    builder = curvature_builders(case.estimation)["kfac"]

    def build(model):
        seen.append(mean_loss(model, case.splits.forget))
        return builder(model)

    path = contenders.beyond(case, build)["kfac:steps"].path(damping=1e-4)
    before = mean_loss(path.model, case.splits.forget)
    assert path.to(before + 0.2).reached
    parts = [before + 0.2 * step / contenders.STEPS for step in range(contenders.STEPS)]
    assert seen == pytest.approx(parts, abs=0.011)
